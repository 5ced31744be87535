"""The numbers of a run on disk: `metrics.jsonl`, `events.jsonl`, and a mirror for TensorBoard.

Both files hold one JSON object per line. A float that is not finite is written as null, because JSON has no NaN: a key
that is absent was not measured, a key that is null was measured and is not a number.
"""

import json
import math
import os
import time

from deepseek_jax.errors import DataError

METRICS, EVENTS, SELFTEST = "metrics.jsonl", "events.jsonl", "selftest.json"
RESUMED = METRICS, EVENTS, SELFTEST  # what a resume reads or adds to

# What happened to the process stays true after a restore; what was measured past the restored step is measured again.
PROCESS_EVENTS = ("start", "resume", "end")


class MetricsWriter:
  """Appends to the metrics and events of `workdir`, from one process, each line flushed when it is written.

  `resume_step` is the number of completed updates that the run starts from (0: a fresh start). Lines past it and a
  torn last line are cut on opening, so that no step is counted twice. Raises DataError for a file that is no JSONL.
  """

  def __init__(self, workdir, tensorboard, resume_step):
    os.makedirs(workdir, exist_ok=True)
    metrics, events = os.path.join(workdir, METRICS), os.path.join(workdir, EVENTS)
    _cut(metrics, lambda line: line["step"] <= resume_step)
    _cut(events, lambda line: line["event"] in PROCESS_EVENTS or line["step"] <= resume_step)
    self._metrics, self._events = open(metrics, "ab"), open(events, "ab")
    self._tensorboard = _summary_writer(os.path.join(workdir, "tensorboard"), resume_step) if tensorboard else None

  def write(self, step, values, histograms=None):
    """One line of metrics at `step` completed updates; `values` maps names to Python, NumPy or JAX scalars.

    `histograms` maps names to the heights of bars 0, 1, ..., for TensorBoard alone: in the file they would outweigh all
    the rest.
    """
    values = _plain(values)
    _append(self._metrics, {"step": step, **values})
    if self._tensorboard:
      for name, heights in (histograms or {}).items():
        self._tensorboard.add_histogram_raw(
          name, min=0, max=len(heights), num=sum(heights), sum=sum(i * h for i, h in enumerate(heights)),
          sum_squares=sum(i**2 * h for i, h in enumerate(heights)),
          bucket_limits=range(1, len(heights) + 1), bucket_counts=heights, global_step=step,
        )  # fmt: skip
    self._mirror(step, values)

  def event(self, name, step, **values):
    """One line of events, stamped with the time in Unix seconds. Evaluations and samples go to TensorBoard as well."""
    values = _plain(values)
    _append(self._events, {"event": name, "step": step, "time": time.time(), **values})
    if name not in PROCESS_EVENTS:
      self._mirror(step, values, name + "/")

  def close(self):
    self._metrics.close()
    self._events.close()
    if self._tensorboard:
      self._tensorboard.close()

  def _mirror(self, step, values, prefix=""):
    if not self._tensorboard:
      return
    for name, value in values.items():
      if isinstance(value, str):
        self._tensorboard.add_text(prefix + name, value, step)
      elif isinstance(value, (int, float)):
        self._tensorboard.add_scalar(prefix + name, value, step)
    self._tensorboard.flush()


class NoWriter:
  """Stands for a MetricsWriter in the processes of a run that leave writing to the first."""

  def write(self, step, values, histograms=None): ...

  def event(self, name, step, **values): ...

  def close(self): ...


def read(path):
  """The objects of a JSONL file, in order; [] where there is no file. A torn last line is left out.

  Raises DataError, with the line's number, for any other line that is not an object with an integer `step`.
  """
  return [line for _, line in _lines(path)]


def _lines(path):
  """Yields (bytes, object) of each whole line: one at a time, since a long run's file need not fit in memory twice."""
  if not os.path.exists(path):
    return
  with open(path, "rb") as file:
    for number, raw in enumerate(file, 1):
      if not raw.endswith(b"\n"):
        return
      try:
        line = json.loads(raw)
        valid = isinstance(line, dict) and type(line.get("step")) is int
      except ValueError:
        valid = False
      if not valid or (os.path.basename(path) == EVENTS and not isinstance(line.get("event"), str)):
        raise DataError(
          f"{path}, line {number}: expected a JSON object with an integer step, got {raw[:60]!r}; "
          "remove that line, or move the file away to start a new one"
        )
      yield raw, line


def _cut(path, keep):
  """Rewrites `path` with its whole lines for which `keep` holds; atomic, and untouched if that is all of it."""
  if not os.path.exists(path):
    return
  partial = path + ".partial"
  with open(partial, "wb") as file:
    for raw, line in _lines(path):
      if keep(line):
        file.write(raw)
  if os.path.getsize(partial) == os.path.getsize(path):
    os.remove(partial)
  else:
    os.replace(partial, path)


def _append(file, line):
  file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
  file.flush()


def _plain(value):
  """`value` as JSON can hold it: scalars of NumPy and JAX unwrapped, floats that are not finite as None."""
  if isinstance(value, dict):
    return {name: _plain(item) for name, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(item) for item in value]
  if hasattr(value, "item"):
    value = value.item()
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _summary_writer(folder, resume_step):
  from tensorboardX import SummaryWriter  # here, because it costs 0.2 s that a run without TensorBoard need not pay

  # Event files are only appended to: TensorBoard itself hides what earlier ones hold from purge_step on. Their names
  # hold the time in seconds, so that without the suffix a quick restart would overwrite the file before it.
  return SummaryWriter(folder, purge_step=resume_step + 1, filename_suffix=f".from_step_{resume_step}")
