"""A run to compare: its final numbers, and its curves over steps, tokens, FLOPs or seconds."""

import dataclasses
import functools
from typing import Any

import numpy as np

from deepseek_jax.compare.effects import effective_fields
from deepseek_jax.console import printable
from deepseek_jax.storage import local_copy
from deepseek_jax.training.metrics import EVENTS, METRICS, PROCESS_EVENTS
from deepseek_jax.training.run_records import CONFIG, RunRecords, is_number, read_run

X_AXES = ("steps", "tokens", "flops", "seconds")
METRIC = "bits_per_byte"  # by which runs are judged, on held-out text


@dataclasses.dataclass(frozen=True)
class Numbers:
  """The final numbers of a run; None where it has none.

  Attributes:
    bits_per_byte, loss: of the last held-out evaluation, after `evaluated_step` updates; loss in nats per token.
    best_bits_per_byte, best_step: the smallest of all held-out evaluations.
    train_loss: of the last logged step, in nats per token.
    steps: completed updates, as far as they are logged.
    tokens: trained on.
    flops: of model matmuls for these tokens with causal attention, as MFU counts them.
    seconds: of steps and of waiting for data; without compilation, evaluation and checkpoints.
    tokens_per_second: median of what was logged.
    skipped: updates.
    end: why the run ended; None: it goes on, or was killed.
  """

  bits_per_byte: float | None
  loss: float | None
  evaluated_step: int | None
  best_bits_per_byte: float | None
  best_step: int | None
  train_loss: float | None
  steps: int
  tokens: int | None
  flops: float | None
  seconds: float | None
  tokens_per_second: float | None
  parameters: int | None
  skipped: int | None
  devices: str | None
  end: str | None


@dataclasses.dataclass(frozen=True)
class Curve:
  """x and y, float64 [n], finite, by increasing x."""

  x: np.ndarray
  y: np.ndarray

  def __len__(self) -> int:
    return len(self.x)


@dataclasses.dataclass(frozen=True)
class ComparedRun:
  """A run to compare.

  Attributes:
    place: its folder or URL.
    name: short, unique in a comparison.
    fields: the config fields that have an effect.
  """

  place: str
  name: str
  seed: int
  fields: dict[str, Any]
  records: RunRecords

  @functools.cached_property
  def numbers(self) -> Numbers:
    """The final numbers."""
    evaluations = self.records.events_by_step("eval")
    last = evaluations[-1] if evaluations else {}
    best = min((e for e in evaluations if is_number(e.get(METRIC))), key=lambda e: e[METRIC], default={})
    started: dict[str, Any] = {}
    for event in self.records.events:
      started |= event if event["event"] in ("start", "resume") else {}
    processes = [e for e in self.records.events if e["event"] in PROCESS_EVENTS]
    ended = processes[-1] if processes and processes[-1]["event"] == "end" else {}
    speed = self._values("tokens_per_second")
    return Numbers(
      bits_per_byte=_number(last.get(METRIC)),
      loss=_number(last.get("loss")),
      evaluated_step=last.get("step"),
      best_bits_per_byte=best.get(METRIC),
      best_step=best.get("step"),
      train_loss=self.last_value("loss"),
      steps=int(self.records.steps[-1]) if len(self.records.steps) else 0,
      tokens=_whole(self.last_value("tokens")),
      flops=self._last_x("flops"),
      seconds=self._last_x("seconds"),
      tokens_per_second=float(np.median(speed)) if len(speed) else None,
      parameters=_whole(_number(started.get("parameters"))),
      skipped=_whole(self.last_value("skipped")),
      devices=printable(str(started["devices"])) if "devices" in started else None,
      end=printable(str(ended.get("reason"))) if ended else None,
    )

  def last_value(self, metric: str) -> float | None:
    """The last logged value of a metric of metrics.jsonl; None where it was not logged, or is not finite."""
    column = self.records.columns.get(metric)
    return _number(float(column.values[-1])) if column and len(column) else None

  def curve(self, metric: str, x_axis: str) -> Curve:
    """The logged values of a metric over one of X_AXES, those that are finite; empty where either was not logged."""
    if metric not in self.records.columns:
      return _EMPTY
    column = self.records.columns[metric]
    return self._over(x_axis, column.steps, column.values)

  def heldout_curve(self, metric: str, x_axis: str) -> Curve:
    """The same of the held-out evaluations."""
    points = [(e["step"], e[metric]) for e in self.records.events_by_step("eval") if is_number(e.get(metric))]
    return self._over(x_axis, np.array([p[0] for p in points], float), np.array([p[1] for p in points], float))

  def _over(self, x_axis: str, steps: np.ndarray, values: np.ndarray) -> Curve:
    x = self._x.get(x_axis)
    if x is None or not len(x):
      return _EMPTY
    finite = np.isfinite(values)
    if x_axis == "steps":
      return Curve(steps[finite].astype(np.float64), values[finite])
    # Evaluations may be before the first logged step: at step 0 all axes are 0.
    logged, x = np.append(0, self.records.steps), np.append(0.0, x)
    return Curve(np.interp(steps[finite], logged, x), values[finite])

  @functools.cached_property
  def _x(self) -> dict[str, np.ndarray]:
    """{one of X_AXES: its value at each logged step}, of those that are known."""
    steps = self.records.steps
    axes = {"steps": steps.astype(np.float64)}
    if len(tokens := self._values("tokens")) == len(steps):
      axes["tokens"] = tokens
      if flops_per_token := self._flops_per_token():
        axes["flops"] = tokens * flops_per_token
    if "step_seconds" in self.records.columns:
      seconds = np.zeros(len(steps))
      for name in ("step_seconds", "data_seconds"):
        if name in self.records.columns:
          column = self.records.columns[name]
          seconds[np.searchsorted(steps, column.steps)] += np.nan_to_num(column.values)
      axes["seconds"] = np.cumsum(seconds)
    return axes

  def _flops_per_token(self) -> float | None:
    """What the run itself took for it, `plan.flops.training_flops`: counting a model's again would import jax."""
    columns = self.records.columns
    if not {"model_flops_per_second", "tokens_per_second"} <= columns.keys():
      return None
    flops, tokens = columns["model_flops_per_second"], columns["tokens_per_second"]
    at = np.isin(tokens.steps, flops.steps) & (tokens.values > 0)
    ratio = flops.values[np.isin(flops.steps, tokens.steps[at])] / tokens.values[at]
    ratio = ratio[np.isfinite(ratio)]
    return float(np.median(ratio)) if len(ratio) else None

  def _values(self, metric: str) -> np.ndarray:
    """The finite values of a metric."""
    if metric not in self.records.columns:
      return np.empty(0)
    values = self.records.columns[metric].values
    return values[np.isfinite(values)]

  def _last_x(self, x_axis: str) -> float | None:
    x = self._x.get(x_axis)
    return float(x[-1]) if x is not None and len(x) else None


_EMPTY = Curve(np.empty(0), np.empty(0))


def read_compared_run(place: str, name: str) -> ComparedRun:
  """The run in a folder or at a URL.

  Raises DataError for one without its config or with a damaged file, StorageError for a bucket that cannot be read.
  """
  with local_copy(place, (CONFIG, METRICS, EVENTS)) as folder:
    records = read_run(folder)
  seed = records.config.get("seed", 0)
  return ComparedRun(place, name, seed if isinstance(seed, int) else 0, effective_fields(records.config), records)


def _number(value: Any) -> float | None:
  return value if is_number(value) and np.isfinite(value) else None


def _whole(value: float | None) -> int | None:
  return None if value is None else int(value)
