"""Throughput: where the time between two lines of metrics goes, and how many tokens were trained on in it."""

import contextlib
import time
from collections.abc import Iterator

from jax.sharding import Mesh

from deepseek_jax.plan.topology import peak_flops

NON_STEP_TIMES = ("data", "eval", "checkpoint")  # what a run does between steps


class IntervalTimer:
  """Tokens and seconds since `reset`.

  tokens: targets of the steps; the caller adds them.
  seconds: {name: seconds} of NON_STEP_TIMES, as `measure` found them. The rest of the time is that of the steps.
  """

  def __init__(self) -> None:
    self.reset()

  def reset(self) -> None:
    """Starts a new interval now."""
    self.tokens = 0
    self.seconds = dict.fromkeys(NON_STEP_TIMES, 0.0)
    self._start = time.monotonic()

  @contextlib.contextmanager
  def measure(self, name: str) -> Iterator[None]:
    """Counts the time of the block as `name`, one of NON_STEP_TIMES."""
    start = time.monotonic()
    yield
    self.seconds[name] += time.monotonic() - start

  def throughput(self) -> dict[str, float]:
    """tokens_per_second, step_seconds, data_seconds, eval_seconds and checkpoint_seconds of the interval so far.

    Tokens per second count the time of steps and of waiting for data.
    """
    step_seconds = max(time.monotonic() - self._start - sum(self.seconds.values()), 1e-9)
    tokens_per_second = self.tokens / (step_seconds + self.seconds["data"])
    other_seconds = {f"{name}_seconds": seconds for name, seconds in self.seconds.items()}
    return {"tokens_per_second": tokens_per_second, "step_seconds": step_seconds, **other_seconds}


def device_metrics(mesh: Mesh, flops_per_second: float) -> dict[str, float | int]:
  """Metrics of the devices: model_flops_per_second, mfu and memory_bytes.

  Model FLOP/s of the whole mesh, MFU where the device's peak is known, and peak memory where the backend reports it.
  """
  metrics: dict[str, float | int] = {"model_flops_per_second": flops_per_second}
  device = mesh.devices.flat[0]
  if peak := peak_flops(device.device_kind):
    metrics["mfu"] = flops_per_second / (peak * mesh.size)
  if memory := mesh.local_devices[0].memory_stats():
    metrics["memory_bytes"] = memory["peak_bytes_in_use"]
  return metrics
