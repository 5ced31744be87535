"""What the results of a self-test depend on besides shapes: the accelerator, jax, and the source of the kernels."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import subprocess

import jax

# No public name counts accelerators without opening them, or tells which of them a scheduler gave this process.
from jax._src import hardware_utils, xla_bridge

from deepseek_jax.config import Config

NVIDIA_GPUS = pathlib.Path("/proc/driver/nvidia/gpus")
UNKNOWN_GPU = "NVIDIA GPU"
PACKAGE = pathlib.Path(__file__).parents[1]
SOURCE = PACKAGE / "kernels", PACKAGE / "selftest"
PACKAGES = re.compile(r"jax|libtpu|tokamax|nvidia-(cuda|cublas|cudnn)")  # names of distributions begin so
# What decides which devices a process sees, and how programs for them are compiled.
TPU_PLACES = (
  "CLOUD_TPU_TASK_ID", "TPU_CHIPS_PER_HOST_BOUNDS", "TPU_CHIPS_PER_PROCESS_BOUNDS", "TPU_HOST_BOUNDS", "TPU_PROCESS_ADDRESSES",
  "TPU_PROCESS_BOUNDS", "TPU_PROCESS_PORT", "TPU_VISIBLE_CHIPS", "TPU_VISIBLE_DEVICES", "TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID",
)  # fmt: skip
PLACES = "CUDA_VISIBLE_DEVICES", "JAX_LOCAL_DEVICE_IDS", "JAX_PLATFORMS", "TPU_VISIBLE_CHIPS", "TPU_VISIBLE_DEVICES"
FLAGS = "LIBTPU_INIT_ARGS", "TPU_LIBRARY_PATH", "XLA_FLAGS"
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
  models = "".join(path.read_text() for path in NVIDIA_GPUS.glob("*/information"))
  return sorted(re.findall(r"Model:\s*(.*)", models)) or [UNKNOWN_GPU]


def visible_tpu_chips(chips: int = 1) -> list[str]:
  """Numbers of the chips that the environment leaves to this process, of a host with `chips` of them."""
  named = os.environ.get("TPU_VISIBLE_CHIPS") or os.environ.get("TPU_VISIBLE_DEVICES")
  return (named or ",".join(map(str, range(chips)))).split(",")


def child_environment(chips: list[str]) -> dict[str, str]:
  """The environment of a process that tests kernels on the first of `chips`."""
  environment = {name: value for name, value in os.environ.items() if not name.startswith("MEGASCALE_")}
  environment |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_TRACEBACK_FILTERING": "off"}
  if any(chip.startswith("TPU") for chip in chips):
    environment = {name: value for name, value in environment.items() if name not in TPU_PLACES}
    environment |= ONE_TPU_CHIP | {"TPU_VISIBLE_CHIPS": visible_tpu_chips()[0]}
  return environment


def cuda_devices() -> str:
  """The GPUs that jax.distributed gave this process, "0,1", or "all"."""
  return xla_bridge.CUDA_VISIBLE_DEVICES.value


def describe_device(device: jax.Device, compute_dtype: str) -> dict[str, str]:
  """Chip, driver, versions, flags and source, for a bug report: results hold for these alone."""
  return {
    "chip": device.device_kind,
    "driver": driver(device),
    **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
    "packages": packages(),
    "kernels": source_sha256(),
    "flags": " ".join(f"{name}={os.environ[name]}" for name in FLAGS if os.environ.get(name)),
    "matmul_precision": "default" if compute_dtype == "bfloat16" else "highest",
  }


def driver(device: jax.Device) -> str:
  """The driver's version, and what the platform's runtime says of itself."""
  runtime = " ".join(device.client.platform_version.split())
  if device.platform != "gpu":
    return runtime
  try:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()
    return f"{found[0]}, {runtime}"
  except (OSError, subprocess.SubprocessError, IndexError):
    return runtime


@functools.cache
def packages() -> str:
  """Versions of what makes and compiles kernels, "jax 0.11.2, jaxlib 0.11.2"."""
  installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
  return ", ".join(f"{name} {installed[name]}" for name in sorted(installed) if PACKAGES.match(name))


@functools.cache
def source_sha256() -> str:
  """A digest of the source of all kernels, of their table of tiles, and of their test."""
  digest = hashlib.sha256()
  for path in sorted(path for folder in SOURCE for kind in ("*.py", "*.json") for path in folder.rglob(kind)):
    digest.update(f"{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes())
  return digest.hexdigest()[:16]


def results_key(machine: dict[str, str]) -> str:
  """What results are kept under."""
  return _digest(machine)


def run_key(config: Config, chips: list[str], processes: int) -> str:
  """Equal for runs that have the same kernels to test and the same results; known before a device is opened."""
  parts = [getattr(config, name) for name in ("model", "mesh", "parallel")]
  shapes = [config.data.seq, config.data.mask_documents, config.train.microbatch or config.train.global_batch]
  variables = {name: os.environ.get(name) for name in (*PLACES, *FLAGS)}
  machine = [chips, cuda_devices(), processes, variables, packages(), source_sha256()]
  if UNKNOWN_GPU in chips:  # then other hosts may have another one, or more of them
    machine.append(platform.node())
  return _digest([*map(dataclasses.asdict, parts), shapes, machine])


def _digest(content) -> str:
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
