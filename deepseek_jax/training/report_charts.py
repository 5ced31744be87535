"""The charts of a run's report: curves over steps, and over layers."""

import fnmatch
from collections.abc import Iterator, Sequence

import numpy as np

from deepseek_jax.training.health import loss_spikes
from deepseek_jax.training.page import escape
from deepseek_jax.training.plot import BINS, Series, line_chart
from deepseek_jax.training.run_records import Column, RunRecords, is_number

# Seconds of an interval between two lines, and the words for what they went into.
TIMES = {
  "step_seconds": "step",
  "data_seconds": "data wait",
  "eval_seconds": "evaluation",
  "checkpoint_seconds": "checkpoint",
}
# title, unit, key in metrics.jsonl (of several by a * at its end), key in eval events or None, scale. A chart is left out
# if its key was never logged, and where a count is always 0. Other metrics follow, each in a chart of its own.
CHARTS = (
  ("Loss", "nats per token, log scale", "loss", "loss", "log"),
  ("Bits per byte", "log scale", "bits_per_byte", "bits_per_byte", "log"),
  ("Learning rate", "", "learning_rate", None, "from zero"),
  ("Gradient norm", "before clipping, log scale", "grad_norm", None, "log"),
  ("Loss of multi-token prediction", "nats per token by depth, log scale", "mtp_loss_*", None, "log"),
  ("Max violation", "mean over layers; 0: balanced experts", "max_vio", None, "from zero"),
  ("Balance loss", "weights included", "balance_loss", None, "from zero"),
  ("Overflow", "assignments beyond the expert buffers", "overflow", None, "from zero"),
  ("Skipped updates", "since step 0", "skipped", None, "from zero"),
  ("Throughput", "tokens per second", "tokens_per_second", None, "from zero"),
  ("Model FLOP/s", "", "model_flops_per_second", None, "from zero"),
  ("MFU", "fraction of the chip's peak FLOP/s", "mfu", None, "from zero"),
  ("Host time of a step", "seconds; largest and median of the processes", "host_seconds_*", None, "from zero"),
  ("Device memory", "bytes", "memory_bytes", None, "from zero"),
)
COUNTS = ("overflow", "skipped")
# Not drawn, or in other charts: what the tiles and the section of times have, and inputs of the step beside the rate.
OTHER_KEYS = (
  "tokens",
  "samples",
  "total_loss",
  "mtp_weight",
  "bias_update_rate",
  "slowest_process",
  "straggler",
  *TIMES,
)
# Title, unit and scale of NAME in the metrics GROUP/LAYER/NAME of each layer; others have their name as the title.
LAYER_CHARTS = {
  "max_vio": ("Max violation by layer", "largest load of an expert / mean - 1", "from zero"),
  "entropy": ("Entropy of loads by layer", "of its maximum; 1: balanced", "from zero"),
  "dead_experts": ("Dead experts by layer", "experts that no token chose", "from zero"),
  "activations": ("RMS of activations by layer", "of the residual stream after it, log scale", "log"),
  "gradients": ("RMS of gradients by layer", "before clipping, log scale", "log"),
}


def charts(run: RunRecords) -> str:
  """The section of all charts; nothing for a run without a step."""
  marks = {e["step"]: f"resumed from step {e['step']:,}" for e in run.events if e["event"] == "resume"}
  marks |= {
    e["step"]: f"stage {e.get('stage')} from step {e['step']:,} on" for e in run.events if e["event"] == "stage"
  }
  figures = []
  for title, unit, key, eval_key, scale in (*CHARTS, *_other_charts(run)):
    series = _series(run, key, title)
    if eval_key:
      series = [Series("train", _points(run, key)), Series("held-out", _heldout(run, eval_key), "dots")]
    if key == "loss":
      series += [*_total_loss(run), *_spikes(run)]
    if key == "grad_norm":
      series += _running_median(run, key)
    drawn = [s.array()[:, 1] for s in series if len(s.points)]
    if drawn and not (key in COUNTS and not any(values.any() for values in drawn)):
      figures.append(figure(title, unit, series, line_chart(series, marks, scale)))
  figures += _layer_charts(run)
  note = (
    f"Over completed updates. Long runs are downsampled to the minimum and maximum of each of {BINS} bins. Dashed "
    "lines are resume points and stages; red ticks on the lower edge are values that were not finite; rings mark spikes of the loss. Hover for numbers."
  )
  return f'<section class="charts">{"".join(figures)}</section><p class="note">{note}</p>' if figures else ""


def figure(title: str, unit: str, series: Sequence[Series], chart: str) -> str:
  """A chart under its title, with a legend where there are several curves."""
  named = [(i, s.name) for i, s in enumerate(series) if len(s.points)]
  classes = {i: "rings" if series[i].style == "rings" else f"s{i}" for i, _ in named}
  legend = "".join(f'<i class="{classes[i]}">{escape(label)}</i>' for i, label in named) if len(series) > 1 else ""
  return f"<figure><figcaption><b>{escape(title)}</b> <span>{unit}</span>{legend}</figcaption>{chart}</figure>"


def _points(run: RunRecords, key: str) -> np.ndarray:
  """[n, 2], the steps and values of a metric; [0, 2] where it was not logged."""
  column = run.columns.get(key)
  return np.zeros((0, 2)) if column is None else np.column_stack([column.steps, column.values])


def _heldout(run: RunRecords, key: str) -> list[tuple[float, float | None]]:
  evals = run.events_by_step("eval")
  return [(e["step"], e[key] if is_number(e[key]) else None) for e in evals if key in e]


def _series(run: RunRecords, key: str, title: str) -> list[Series]:
  """The curve of `key`, or one for each metric that its * stands for."""
  if not key.endswith("*"):
    return [Series(title.lower(), _points(run, key))]
  prefix = key[:-1]
  found = sorted(k for k in run.columns if k.startswith(prefix))
  names = {k: k.removeprefix(prefix) for k in found}
  return [Series(f"depth {name}" if name.isdigit() else name, _points(run, k)) for k, name in names.items()]


def _total_loss(run: RunRecords) -> list[Series]:
  """The curve of what is optimized, where it is not the loss alone."""
  total, loss = _points(run, "total_loss"), _points(run, "loss")
  is_same = total.shape == loss.shape and np.array_equal(total[:, 1], loss[:, 1], equal_nan=True)
  return [] if is_same else [Series("train, all terms", total)]


def _spikes(run: RunRecords) -> list[Series]:
  """Rings around the spikes of the loss, where it has any."""
  points = _points(run, "loss")
  found = loss_spikes(run.columns["loss"]) if len(points) else np.zeros(0, np.int64)
  return [Series("spikes", points[found], "rings")] if len(found) else []


def _running_median(run: RunRecords, key: str) -> list[Series]:
  """Medians of at most 100 stretches, each at its middle."""
  stretches = run.columns[key].stretches(100, least=8) if key in run.columns else []
  points = [(float(np.median(s.steps)), float(np.median(s.values))) for s in stretches]
  return [Series("running median", points)] if len(points) > 1 else []


def _other_charts(run: RunRecords) -> list[tuple[str, str, str, None, str]]:
  """Charts of the metrics that CHARTS does not name, as those of an observation of a variant's own."""
  keys = {key for key in run.columns if "/" not in key} - {*OTHER_KEYS}
  named = [key for _, _, key, _, _ in CHARTS]
  return [(key, "", key, None, "linear") for key in sorted(keys) if not any(fnmatch.fnmatchcase(key, k) for k in named)]


def _layer_charts(run: RunRecords) -> Iterator[str]:
  """Charts over layers of the metrics GROUP/LAYER/NAME: means over the first, the middle and the last tenth of the rows."""
  keys = [key.split("/") for key in run.columns if key.count("/") == 2]
  size = max(len(run.steps) // 10, 1)
  starts = sorted({0, (len(run.steps) - size) // 2, len(run.steps) - size})
  for group, name in dict.fromkeys((group, name) for group, _, name in keys):
    layers = [key[1] for key in keys if key[::2] == [group, name]]
    series = []
    for start in starts:
      first, last = run.steps[start], run.steps[start + size - 1]
      means = [_mean(run.columns[f"{group}/{layer}/{name}"], first, last) for layer in layers]
      label = f"steps {first:,} to {last:,}" if size > 1 else f"step {first:,}"
      series.append(Series(label, [(i, mean) for i, mean in enumerate(means) if mean is not None]))
    title, unit, scale = LAYER_CHARTS.get(name, (f"{name} by layer", "", "from zero"))
    names = [layer.removeprefix("layer_").replace("_", " ") for layer in layers]
    yield figure(title, unit, series, line_chart(series, scale=scale, x_names=names))


def _mean(column: Column, first: int, last: int) -> float | None:
  """The mean of what is finite at the steps `first` to `last`."""
  values = column.values[slice(*np.searchsorted(column.steps, [first, last + 1]))]
  values = values[~np.isnan(values)]
  return float(values.mean()) if len(values) else None
