"""What the results of a self-test depend on besides shapes: the accelerator, jax, and the source of the kernels."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess

import jax

# No public name counts accelerators without opening them, or tells which of them a scheduler gave this process.
from jax._src import hardware_utils, xla_bridge

from deepseek_jax.config import Config

KERNELS = pathlib.Path(__file__).parents[1] / "kernels"
PACKAGES = "jax", "jaxlib", "libtpu", "tokamax", "jax-cuda12-plugin", "jax-cuda13-plugin"
# What decides which devices a process sees, and how programs for them are compiled.
VARIABLES = (
  "CUDA_VISIBLE_DEVICES", "JAX_LOCAL_DEVICE_IDS", "JAX_PLATFORMS", "LIBTPU_INIT_ARGS", "TPU_CHIPS_PER_PROCESS_BOUNDS",
  "TPU_PROCESS_BOUNDS", "TPU_VISIBLE_CHIPS", "TPU_VISIBLE_DEVICES", "XLA_FLAGS",
)  # fmt: skip
# A process that sees one chip of a TPU host, and does not wait for other hosts of the slice.
ONE_TPU_CHIP = {"TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1", "TPU_PROCESS_BOUNDS": "1,1,1"}


def accelerators() -> list[str]:
  """One name for each TPU chip or NVIDIA GPU of this host that jax may use; none is opened."""
  platforms = os.environ.get("JAX_PLATFORMS")
  if platforms and not {"cuda", "gpu", "tpu"} & set(platforms.split(",")):
    return []
  chips, version = hardware_utils.num_available_tpu_chips_and_device_id()
  if chips:
    return [f"TPU {version.name}"] * len(visible_tpu_chips(chips))
  if not hardware_utils.has_visible_nvidia_gpu():
    return []
  models = pathlib.Path("/proc/driver/nvidia/gpus").glob("*/information")
  return sorted(re.findall(r"Model:\s*(.*)", "".join(path.read_text() for path in models))) or ["NVIDIA GPU"]


def visible_tpu_chips(chips: int = 1) -> list[str]:
  """Numbers of the chips that the environment leaves to this process, of a host with `chips` of them."""
  return os.environ.get("TPU_VISIBLE_CHIPS", ",".join(map(str, range(chips)))).split(",")


def child_environment(chips: list[str]) -> dict[str, str]:
  """The environment of a process that tests kernels on the first of `chips`."""
  environment = {name: value for name, value in os.environ.items() if not name.startswith("MEGASCALE_")}
  environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
  if any(chip.startswith("TPU") for chip in chips):
    environment |= ONE_TPU_CHIP | {"TPU_VISIBLE_CHIPS": visible_tpu_chips()[0]}
  return environment


def cuda_devices() -> str:
  """The GPUs that jax.distributed gave this process, "0,1", or "all"."""
  return xla_bridge.CUDA_VISIBLE_DEVICES.value


def describe_device(device: jax.Device) -> dict[str, str]:
  """Chip, driver, versions and kernels, for a bug report; results hold for `chip`, `packages` and `kernels` alone."""
  return {
    "chip": device.device_kind,
    "driver": driver(device),
    **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
    "packages": packages(),
    "kernels": kernels_sha256(),
  }


def driver(device: jax.Device) -> str:
  """The driver's version, or what the platform's runtime says of itself."""
  if device.platform != "gpu":
    return " ".join(device.client.platform_version.split())
  try:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()
    return f"{found[0]}, {' '.join(device.client.platform_version.split())}"
  except (OSError, subprocess.SubprocessError, IndexError):
    return " ".join(device.client.platform_version.split())


@functools.cache
def packages() -> str:
  """Versions of what makes and compiles kernels, "jax 0.11.2, jaxlib 0.11.2"."""
  installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
  return ", ".join(f"{name} {installed[name]}" for name in PACKAGES if name in installed)


@functools.cache
def kernels_sha256() -> str:
  """A digest of the source of all kernels and of their table of tiles."""
  digest = hashlib.sha256()
  for path in sorted([*KERNELS.rglob("*.py"), *KERNELS.rglob("*.json")]):
    digest.update(f"{path.relative_to(KERNELS)}\0".encode() + path.read_bytes())
  return digest.hexdigest()[:16]


def results_key(machine: dict[str, str]) -> str:
  """What results are kept under: those of another chip, other packages or other kernels do not count."""
  return _digest([machine[name] for name in ("chip", "packages", "kernels")])


def run_key(config: Config, chips: list[str], processes: int) -> str:
  """Equal for runs that have the same kernels to test and the same results; known before a device is opened."""
  parts = [getattr(config, name) for name in ("model", "mesh", "parallel")]
  shapes = [config.data.seq, config.data.mask_documents, config.train.microbatch or config.train.global_batch]
  variables = {name: os.environ.get(name) for name in VARIABLES}
  return _digest(
    [*map(dataclasses.asdict, parts), shapes, chips, cuda_devices(), processes, variables, packages(), kernels_sha256()]
  )


def _digest(content) -> str:
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
