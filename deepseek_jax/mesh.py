"""The device mesh: four named axes, all Explicit, so that every array's layout is part of its type."""

import dataclasses
import math

import jax
from jax.sharding import AbstractMesh, AxisType

from deepseek_jax.config import Config, MeshConfig
from deepseek_jax.errors import ConfigError
from deepseek_jax.model_config import ModelConfig

AXES = ("data", "fsdp", "expert", "tensor")


def least_devices(config: MeshConfig) -> int:
  """The fewest devices that the mesh fits on: the product of its sizes, -1 counted as 1."""
  return math.prod(getattr(config, axis) for axis in AXES if getattr(config, axis) > 0)


def mesh_sizes(config: MeshConfig, devices: int) -> tuple[int, ...]:
  """Sizes of AXES on `devices` devices, -1 resolved. Raises ConfigError when the product cannot be `devices`."""
  wanted, fixed = [getattr(config, axis) for axis in AXES], least_devices(config)
  sizes = tuple(max(devices // fixed, 1) if size == -1 else size for size in wanted)
  if math.prod(sizes) != devices:
    shape = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, wanted, strict=True))
    raise ConfigError(
      f"mesh {shape} needs {fixed} devices{' or a multiple' if -1 in wanted else ''}, {devices} are here: change the mesh "
      "fields, or set one of them to -1 to take the rest"
    )
  return sizes


def make_mesh(config: MeshConfig, devices=None) -> jax.sharding.Mesh:
  """An all-Explicit mesh over `devices` (default: all). One device is a 1 x 1 x 1 x 1 mesh."""
  devices = devices if devices is not None else jax.devices()
  sizes = mesh_sizes(config, len(devices))
  return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Explicit,) * len(AXES), devices=devices)


def abstract_mesh(config: MeshConfig) -> AbstractMesh:
  """The mesh of resolved sizes without its devices: layouts can be traced on it, nothing can run."""
  sizes = mesh_sizes(config, least_devices(config))
  return AbstractMesh(sizes, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def check_x64(model: ModelConfig):
  """Raises ConfigError where a float64 model would run in float32, as JAX does without its x64 mode."""
  if model.param_dtype == "float64" and not jax.config.jax_enable_x64:
    raise ConfigError(
      'model.param_dtype=float64 needs JAX_ENABLE_X64=1 in the environment, or jax.config.update("jax_enable_x64", True)'
    )


def resolve_mesh(config: Config, devices: int) -> Config:
  """`config` with its mesh sizes resolved for `devices`, and so checked against the model and the batch."""
  sizes = mesh_sizes(config.mesh, devices)
  return dataclasses.replace(config, mesh=MeshConfig(**dict(zip(AXES, sizes, strict=True))))
