"""What a notebook asks first: which device there is, what it multiplies well, and whether this is a smoke run."""

import dataclasses
import os
import pathlib
import shutil

import jax

from deepseek_jax.plan.topology import has_bfloat16_units

SMOKE = "DEEPSEEK_JAX_SMOKE"  # the environment variable; "1": every cell of a notebook runs, on the smallest sizes


@dataclasses.dataclass(frozen=True)
class Device:
  """The devices of this process.

  Attributes:
    platform: "cpu", "gpu" or "tpu". kind: as the platform calls it. count: how many.
    compute_dtype: for model.compute_dtype: bfloat16 where the device multiplies it, else float32.
    note: what the user should know; empty where that is nothing.
  """

  platform: str
  kind: str
  count: int
  compute_dtype: str
  note: str = ""

  def __str__(self) -> str:
    note = f"\nnote: {self.note}" if self.note else ""
    return (
      f"{self.count} x {self.kind} ({self.platform}), jax {jax.__version__}, computes in {self.compute_dtype}{note}"
    )


def find_device() -> Device:
  """The devices that jax finds, with a note where the machine has more, or the dtype is not what one would expect."""
  devices = jax.devices()
  first = devices[0]
  platform, kind = first.platform, first.device_kind
  dtype, note = "float32", ""
  if platform == "tpu":
    dtype = "bfloat16"
  elif platform == "gpu":
    if has_bfloat16_units(first):
      dtype = "bfloat16"
    else:
      note = f"{kind} has no bfloat16 units, so that models compute in float32"
  elif found := _accelerator_without_jax():
    extra = {"GPU": "cuda13", "TPU": "tpu"}[found]
    note = (
      f"this machine has a {found}, and this jax does not use it: pip install 'jax[{extra}]', then restart the runtime"
    )
  return Device(platform, kind, len(devices), dtype, note)


def is_smoke_run() -> bool:
  """Whether the environment asks for the smallest sizes, as CI does: DEEPSEEK_JAX_SMOKE=1."""
  return os.environ.get(SMOKE) == "1"


def _accelerator_without_jax() -> str | None:
  """What the machine has although jax runs on the CPU: "GPU", "TPU" or None."""
  if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
    return None  # asked for
  if shutil.which("nvidia-smi") and list(pathlib.Path("/dev").glob("nvidia[0-9]*")):
    return "GPU"
  return "TPU" if list(pathlib.Path("/dev").glob("accel[0-9]*")) else None
