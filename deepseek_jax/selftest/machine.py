"""The machine of a self-test: its accelerators, and what results depend on (chip, versions, flags, source)."""

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
from typing import Any

import jax

# No public function counts accelerators without opening them, or says which of them a scheduler gave this process.
from jax._src import hardware_utils, xla_bridge

from deepseek_jax.config import Config

NVIDIA_GPUS = pathlib.Path("/proc/driver/nvidia/gpus")
UNKNOWN_GPU = "NVIDIA GPU"
PACKAGE = pathlib.Path(__file__).parents[1]
SOURCE_FOLDERS = PACKAGE / "kernels", PACKAGE / "selftest"
PACKAGES = re.compile(r"jax|libtpu|tokamax|nvidia-(cuda|cublas|cudnn)")  # prefixes of distributions that make kernels
# Environment variables that decide which devices a process sees, and how programs for them are compiled.
TPU_DEVICE_VARIABLES = (
  "CLOUD_TPU_TASK_ID", "TPU_CHIPS_PER_HOST_BOUNDS", "TPU_CHIPS_PER_PROCESS_BOUNDS", "TPU_HOST_BOUNDS", "TPU_PROCESS_ADDRESSES",
  "TPU_PROCESS_BOUNDS", "TPU_PROCESS_PORT", "TPU_VISIBLE_CHIPS", "TPU_VISIBLE_DEVICES", "TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID",
)  # fmt: skip
DEVICE_VARIABLES = (
  "CUDA_VISIBLE_DEVICES",
  "JAX_LOCAL_DEVICE_IDS",
  "JAX_PLATFORMS",
  "TPU_VISIBLE_CHIPS",
  "TPU_VISIBLE_DEVICES",
)
FLAG_VARIABLES = "LIBTPU_INIT_ARGS", "TPU_LIBRARY_PATH", "XLA_FLAGS"
# A process that sees one chip of a TPU host, and does not wait for other hosts of the slice.
ONE_TPU_CHIP = {"TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1", "TPU_PROCESS_BOUNDS": "1,1,1"}


def accelerators() -> list[str]:
  """The kind of each TPU chip or NVIDIA GPU of this host that jax may use, without opening one."""
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
  """Numbers of the chips that environment variables give this process, of a host with `chips` of them."""
  visible = os.environ.get("TPU_VISIBLE_CHIPS") or os.environ.get("TPU_VISIBLE_DEVICES")
  return (visible or ",".join(map(str, range(chips)))).split(",")


def child_environment(chips: list[str]) -> dict[str, str]:
  """The environment of a process that tests kernels on the first of `chips`."""
  environment = {name: value for name, value in os.environ.items() if not name.startswith("MEGASCALE_")}
  environment |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_TRACEBACK_FILTERING": "off"}
  if any(chip.startswith("TPU") for chip in chips):
    environment = {name: value for name, value in environment.items() if name not in TPU_DEVICE_VARIABLES}
    environment |= ONE_TPU_CHIP | {"TPU_VISIBLE_CHIPS": visible_tpu_chips()[0]}
  return environment


def cuda_devices() -> str:
  """The GPUs that jax.distributed gave this process, "0,1", or "all"."""
  return xla_bridge.CUDA_VISIBLE_DEVICES.value


def describe_device(device: jax.Device, compute_dtype: str) -> dict[str, str]:
  """Chip, driver, versions, flags and digest of the source: what a bug report needs, and what results hold for."""
  return {
    "chip": device.device_kind,
    "driver": driver_version(device),
    **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
    "packages": package_versions(),
    "kernels": source_sha256(),
    "flags": " ".join(f"{name}={os.environ[name]}" for name in FLAG_VARIABLES if os.environ.get(name)),
    "matmul_precision": "default" if compute_dtype == "bfloat16" else "highest",
  }


def driver_version(device: jax.Device) -> str:
  """The versions of the driver and of the platform's runtime."""
  runtime = " ".join(device.client.platform_version.split())
  if device.platform != "gpu":
    return runtime
  try:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    versions = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()
    return f"{versions[0]}, {runtime}"
  except (OSError, subprocess.SubprocessError, IndexError):
    return runtime


@functools.cache
def package_versions() -> str:
  """Versions of the packages that make and compile kernels, "jax 0.11.2, jaxlib 0.11.2"."""
  installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
  return ", ".join(f"{name} {installed[name]}" for name in sorted(installed) if PACKAGES.match(name))


@functools.cache
def source_sha256() -> str:
  """A digest of the source of all kernels, of tiles.json, and of the self-test."""
  digest = hashlib.sha256()
  for path in sorted(path for folder in SOURCE_FOLDERS for kind in ("*.py", "*.json") for path in folder.rglob(kind)):
    digest.update(f"{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes())
  return digest.hexdigest()[:16]


def results_key(machine: dict[str, str]) -> str:
  """The key under which results of a machine, as `describe_device` gives it, are saved."""
  return _digest(machine)


def run_key(config: Config, chips: list[str], processes: int) -> str:
  """The key of a run: equal for runs with the same cases and the same results. It opens no device."""
  parts = [getattr(config, name) for name in ("model", "mesh", "parallel")]
  shapes = [config.data.seq, config.data.mask_documents, config.train.microbatch or config.train.global_batch]
  variables = {name: os.environ.get(name) for name in (*DEVICE_VARIABLES, *FLAG_VARIABLES)}
  machine = [chips, cuda_devices(), processes, variables, package_versions(), source_sha256()]
  if UNKNOWN_GPU in chips:  # other hosts may then have other GPUs, or more of them
    machine.append(platform.node())
  return _digest([*map(dataclasses.asdict, parts), shapes, machine])


def _digest(content: Any) -> str:
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
