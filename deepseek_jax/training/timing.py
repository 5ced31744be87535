"""Throughput: where the time between two lines of metrics goes, and how many tokens were trained on in it."""

import concurrent.futures
import time
from typing import Any

import jax
from jax.sharding import Mesh

from deepseek_jax.plan.topology import peak_flops
from deepseek_jax.training.clock import PhaseClock

TimedMetrics = tuple[dict[str, Any], float]  # (metrics on the host, time.monotonic() when they were there)
NON_STEP_TIMES = ("data", "eval", "checkpoint")  # phases between steps


class MetricsReader:
  """Reads the metrics of steps in a thread, so that each has the time at which the device was done with it.

  The loop is busy when that happens: it starts the next step, saves or writes.
  """

  def __init__(self) -> None:
    self._thread = concurrent.futures.ThreadPoolExecutor(1, "metrics")

  def read(self, metrics: dict[str, Any]) -> concurrent.futures.Future[TimedMetrics]:
    """Starts to read `metrics`, of a tree of arrays."""
    return self._thread.submit(_read, metrics)

  def close(self) -> None:
    """Ends the thread; what it reads is not waited for."""
    self._thread.shutdown(wait=False)


def _read(metrics: dict[str, Any]) -> TimedMetrics:
  jax.block_until_ready(metrics)
  arrived = time.monotonic()
  return jax.device_get(metrics), arrived


class IntervalTimer:
  """Tokens and seconds of intervals that follow one another without a gap: what they have adds up to the wall time.

  Args:
    clock: of the run, whose phases it takes, until another timer does.

  tokens: targets of the steps of this interval; the caller adds them.
  """

  def __init__(self, clock: PhaseClock) -> None:
    self._spans: list[tuple[str, float, float]] = []  # (one of NON_STEP_TIMES, start, end) since the interval began
    clock.listener = self._add_span
    self.start_interval(time.monotonic())

  def start_interval(self, start: float) -> None:
    """Ends the interval and starts the next one at `start`, a time of time.monotonic()."""
    self.tokens = 0
    self._start = start
    self._spans = [span for span in self._spans if span[2] > start]

  def _add_span(self, phase: str, start: float, end: float) -> None:
    if phase in NON_STEP_TIMES:
      self._spans.append((phase, start, end))

  def throughput(self, end: float) -> dict[str, float]:
    """tokens_per_second, step_seconds, data_seconds, eval_seconds and checkpoint_seconds of the interval up to `end`.

    The four times add up to the interval. Tokens per second count the time of steps and of waiting for data.
    """
    seconds = dict.fromkeys(NON_STEP_TIMES, 0.0)
    for name, span_start, span_end in self._spans:
      seconds[name] += max(0.0, min(span_end, end) - max(span_start, self._start))
    step_seconds = max(end - self._start - sum(seconds.values()), 1e-9)
    tokens_per_second = self.tokens / (step_seconds + seconds["data"])
    other_seconds = {f"{name}_seconds": value for name, value in seconds.items()}
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
