"""The device mesh: six named axes, all Explicit, so that every array's layout is part of its type."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding

from deepseek_jax.config import Config
from deepseek_jax.config_sections import MeshConfig
from deepseek_jax.errors import ConfigError
from deepseek_jax.model_config import ModelConfig

# From the slowest network to the fastest: neighbors on the last axes are neighbors in the machine.
AXES = ("data", "stage", "fsdp", "expert", "context", "tensor")


def min_devices(config: MeshConfig) -> int:
  """The smallest number of devices that the mesh fits on: the product of its sizes, with -1 as 1."""
  return math.prod(getattr(config, axis) for axis in AXES if getattr(config, axis) > 0)


def mesh_sizes(config: MeshConfig, devices: int) -> tuple[int, ...]:
  """Sizes of AXES on `devices` devices, -1 resolved. Raises ConfigError when the product cannot be `devices`."""
  requested, fixed = [getattr(config, axis) for axis in AXES], min_devices(config)
  sizes = tuple(max(devices // fixed, 1) if size == -1 else size for size in requested)
  if math.prod(sizes) != devices:
    shape = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, requested, strict=True))
    advice = " or ".join(  # of one axis, where the others stay as they are
      f"mesh.{axis}={devices * size // fixed}"
      for axis, size in zip(AXES, requested, strict=True)
      if (size > 1 or axis in ("data", "fsdp")) and size > 0 and devices * size % fixed == 0
    )
    raise ConfigError(
      f"mesh {shape} needs {fixed} devices{' or a multiple' if -1 in requested else ''}, {devices} are here: "
      + (f"set {advice}" if advice else f"change the mesh fields so that their product is {devices}")
    )
  return sizes


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """An all-Explicit mesh over `devices`, default `jax.devices()`. One device is a mesh too, of sizes 1.

  Slices (TPU pods on a data-center network) are divided over `data`, so that the other axes stay within a slice.

  Raises ConfigError when `data` is not a multiple of the number of slices.
  """
  devices = devices if devices is not None else jax.devices()
  sizes, types = mesh_sizes(config, len(devices)), (AxisType.Explicit,) * len(AXES)
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if slices == 1:
    return Mesh(create_device_mesh(sizes, devices, allow_split_physical_axes=True), AXES, axis_types=types)
  check_slices(sizes, slices)
  ici_shape, dcn_shape = (sizes[0] // slices, *sizes[1:]), (slices, *(1,) * (len(AXES) - 1))
  grid = create_hybrid_device_mesh(ici_shape, dcn_shape, devices, allow_split_physical_axes=True)
  return Mesh(grid, AXES, axis_types=types)


def check_slices(sizes: tuple[int, ...], slices: int) -> None:
  """Raises ConfigError unless a mesh of `sizes` of AXES fits on that many slices."""
  if sizes[0] % slices:
    raise ConfigError(
      f"mesh.data={sizes[0]} on {slices} slices: the network between slices carries only `data`, so make it a multiple "
      f"of {slices}, or -1"
    )


def abstract_mesh(config: MeshConfig, device: AbstractDevice | None = None) -> AbstractMesh:
  """The mesh of `min_devices` without its devices: programs can be traced on it, nothing can run.

  device: the kind of device that programs are traced for, where that matters.
  """
  sizes = mesh_sizes(config, min_devices(config))
  return AbstractMesh(sizes, AXES, axis_types=(AxisType.Explicit,) * len(AXES), abstract_device=device)


def make_process_max(mesh: Mesh, length: int) -> Callable[[Sequence[int]], jax.Array]:
  """A function that all processes call with `length` integers: it gives their maxima over processes.

  They are int32 [length], replicated. It does not block: only reading the array waits for the other processes.
  """
  sharded, replicated = NamedSharding(mesh, jax.P(AXES)), NamedSharding(mesh, jax.P())
  maximum = jax.jit(lambda rows: rows.max(0), out_shardings=replicated)

  def process_max(values: Sequence[int]) -> jax.Array:
    row = np.array([values], np.int32)
    return maximum(jax.make_array_from_callback((mesh.size, length), sharded, lambda index: row))

  return process_max


def check_x64(model: ModelConfig) -> None:
  """Raises ConfigError where a float64 model would run in float32, as JAX does without its x64 mode."""
  if model.param_dtype == "float64" and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
    raise ConfigError(
      'model.param_dtype=float64 needs JAX_ENABLE_X64=1 in the environment, or jax.config.update("jax_enable_x64", True)'
    )


def resolve_mesh(config: Config, devices: int) -> Config:
  """`config` with its mesh sizes resolved for `devices`. Making it checks them against the model and the batch."""
  sizes = mesh_sizes(config.mesh, devices)
  return dataclasses.replace(config, mesh=MeshConfig(**dict(zip(AXES, sizes, strict=True))))
