"""`report.html`: one page about a run that needs no network, made from the files in the run's folder.

Inputs are `config.json`, `metrics.jsonl` and `events.jsonl`. A run that was stopped, killed or never made a step has a
report too. Every text is escaped, and the page's content security policy forbids it to load or run anything.
"""

import datetime
import fnmatch
import html
import json
import os
import pathlib
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from deepseek_jax.config import Config
from deepseek_jax.schema import flatten_config, leaf_paths
from deepseek_jax.training import metrics, run_records
from deepseek_jax.training.plot import BINS, Point, Series, format_compact, line_chart
from deepseek_jax.training.run_records import is_number

Line = dict[str, Any]  # an object of metrics.jsonl
Event = dict[str, Any]  # an object of events.jsonl

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
  ("Device memory", "bytes", "memory_bytes", None, "from zero"),
)
COUNTS = ("overflow", "skipped")
# Not drawn, or in other charts: what the tiles and the section of times have, and inputs of the step beside the rate.
OTHER_KEYS = ("step", "tokens", "samples", "total_loss", "mtp_weight", "bias_update_rate")
# Title and unit of NAME in the metrics router/LAYER/NAME of each layer; others have their name as the title.
LAYER_CHARTS = {
  "max_vio": ("Max violation by layer", "largest load of an expert / mean - 1"),
  "entropy": ("Entropy of loads by layer", "of its maximum; 1: balanced"),
  "dead_experts": ("Dead experts by layer", "experts that no token chose"),
}
TIMES = {
  "step_seconds": "step",
  "data_seconds": "data wait",
  "eval_seconds": "evaluation",
  "checkpoint_seconds": "checkpoint",
}
# Control characters are not allowed in HTML, but a byte-level model may write any of them: show their Unicode pictures.
_CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}


def write_report(workdir: str | os.PathLike[str]) -> str:
  """Writes WORKDIR/report.html atomically and returns its path. Raises DataError for an input that cannot be read."""
  path = os.path.join(workdir, "report.html")
  config = run_records.read_config(os.path.join(workdir, run_records.CONFIG))
  lines = metrics.read_jsonl(os.path.join(workdir, metrics.METRICS))
  events = metrics.read_jsonl(os.path.join(workdir, metrics.EVENTS))
  page = _page(config, lines, events)
  with open(path + ".partial", "w", encoding="utf-8", errors="replace") as file:  # lone surrogates become "?"
    file.write(page)
  os.replace(path + ".partial", path)
  return path


def _page(config: dict[str, Any], lines: Sequence[Line], events: Sequence[Event]) -> str:
  name = str(config.get("name", "run"))
  style = pathlib.Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
  parts = [
    _header(name, events),
    _tiles(config, lines, events),
    _charts(lines, events),
    _section("Where the time goes", _times(lines)),
    _section("Sample", _sample(events)),
    _section("Held-out evaluation", _evaluations(events)),
    _section("Starts, resumes, ends", _history(events)),
    _section("Config", _config(config)),
    _section("Environment", _environment(events)),
  ]
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    '<meta name="color-scheme" content="light dark">'
    f"<title>{_escape(name)} · training report</title><style>{style}</style></head>\n<body>"
    + "\n".join(filter(None, parts))
    + "</body></html>\n"
  )


def _header(name: str, events: Sequence[Event]) -> str:
  process_events = [e for e in events if e["event"] in metrics.PROCESS_EVENTS]
  has_ended = bool(process_events) and process_events[-1]["event"] == "end"
  status = str(process_events[-1].get("reason")) if has_ended else "no end was recorded: running, or killed"
  subtitle = []
  start: Event = next((e for e in events if e["event"] == "start"), {})
  if is_number(start.get("parameters")):
    subtitle.append(f"{start['parameters']:,} parameters")
  if events:
    subtitle.append(f"last event {_format_time(events[-1].get('time'))}")
  kind = "good" if status == "finished" else "open"
  return (
    f'<header><h1>{_escape(name)} <span class="pill {kind}">{_escape(status)}</span></h1>'
    f"<p>{_escape(' · '.join(subtitle))}</p></header>"
  )


def _tiles(config: dict[str, Any], lines: Sequence[Line], events: Sequence[Event]) -> str:
  last = lines[-1] if lines else {}
  heldout = (_events_by_step(events, "eval") or [{}])[-1]
  planned_steps = dict(_leaves(config)).get("train.steps")
  speeds = [value for _, value in _points(lines, "tokens_per_second") if value is not None]
  evaluated = f"at step {heldout['step']:,}" if heldout else "not evaluated"
  tiles = [
    ("held-out bits/byte", _format_fixed(heldout.get("bits_per_byte")), evaluated),
    ("held-out loss", _format_fixed(heldout.get("loss")), "nats per token"),
    ("train loss", _format_fixed(last.get("loss")), f"at step {last['step']:,}" if last else "no step was logged"),
    ("steps", f"{last.get('step', 0):,}", f"of {planned_steps:,}" if is_number(planned_steps) else ""),
    ("tokens", format_compact(last["tokens"]) if is_number(last.get("tokens")) else "–", "trained on"),
    ("tokens per second", format_compact(statistics.median(speeds)) if speeds else "–", "median"),
    ("time", _format_duration(sum(_total_seconds(lines).values())), "logged"),
  ]
  if is_number(last.get("skipped")) and last["skipped"]:
    tiles.append(("skipped updates", f"{last['skipped']:,}", "the log says why"))
  cells = [
    f"<div><b>{_escape(v)}</b><span>{_escape(k)}</span><small>{_escape(note)}</small></div>" for k, v, note in tiles
  ]
  return f'<section class="tiles">{"".join(cells)}</section>'


def _charts(lines: Sequence[Line], events: Sequence[Event]) -> str:
  marks = sorted({e["step"] for e in events if e["event"] == "resume"})
  figures = []
  for title, unit, key, eval_key, scale in (*CHARTS, *_other_charts(lines)):
    series = _series(lines, key, title)
    if eval_key:
      series = [
        Series("train", _points(lines, key)),
        Series("held-out", _points(_events_by_step(events, "eval"), eval_key), "dots"),
      ]
    if key == "loss" and any(line.get("total_loss") != line.get("loss") for line in lines):
      series.append(Series("train, all terms", _points(lines, "total_loss")))
    if any(s.points for s in series) and not (
      key in COUNTS and not any(value for s in series for _, value in s.points)
    ):
      figures.append(_figure(title, unit, series, line_chart(series, marks, scale)))
  figures += _layer_charts(lines)
  note = (
    f"Over completed updates. Long runs are downsampled to the minimum and maximum of each of {BINS} bins. Dashed "
    "lines are resume points; red ticks on the lower edge are values that were not finite. Hover for numbers."
  )
  return f'<section class="charts">{"".join(figures)}</section><p class="note">{note}</p>' if figures else ""


def _series(lines: Sequence[Line], key: str, title: str) -> list[Series]:
  """The curve of `key`, or one for each metric that its * stands for."""
  if not key.endswith("*"):
    return [Series(title.lower(), _points(lines, key))]
  prefix = key[:-1]
  found = sorted({k for line in lines for k in line if k.startswith(prefix)})
  return [Series(f"depth {k.removeprefix(prefix)}", _points(lines, k)) for k in found]


def _other_charts(lines: Sequence[Line]) -> list[tuple[str, str, str, None, str]]:
  """Charts of the metrics that CHARTS does not name, as those of an observation of a variant's own."""
  keys = {key for line in lines for key in line if "/" not in key} - {*TIMES, *OTHER_KEYS}
  named = [key for _, _, key, _, _ in CHARTS]
  return [(key, "", key, None, "linear") for key in sorted(keys) if not any(fnmatch.fnmatchcase(key, k) for k in named)]


def _layer_charts(lines: Sequence[Line]) -> Iterator[str]:
  """Charts over layers of the metrics GROUP/LAYER/NAME: means over the first, the middle and the last tenth of `lines`."""
  keys = [key.split("/") for key in dict.fromkeys(key for line in lines for key in line if key.count("/") == 2)]
  size = max(len(lines) // 10, 1)
  starts = sorted({0, (len(lines) - size) // 2, len(lines) - size})
  for group, name in dict.fromkeys((group, name) for group, _, name in keys):
    layers = [key[1] for key in keys if key[::2] == [group, name]]
    series = []
    for part in (lines[start : start + size] for start in starts):
      means = enumerate(_mean(_points(part, f"{group}/{layer}/{name}")) for layer in layers)
      label = f"steps {part[0]['step']:,} to {part[-1]['step']:,}" if size > 1 else f"step {part[0]['step']:,}"
      series.append(Series(label, [(i, mean) for i, mean in means if mean is not None]))
    title, unit = LAYER_CHARTS.get(name, (f"{name} by layer", ""))
    names = [layer.removeprefix("layer_").replace("_", " ") for layer in layers]
    yield _figure(title, unit, series, line_chart(series, scale="from zero", x_names=names))


def _mean(points: Sequence[Point]) -> float | None:
  values = [value for _, value in points if value is not None]
  return statistics.fmean(values) if values else None


def _figure(title: str, unit: str, series: Sequence[Series], chart: str) -> str:
  """A chart under its title, with a legend where there are several curves."""
  named = [(i, s.name) for i, s in enumerate(series) if s.points]
  legend = "".join(f'<i class="s{i}">{_escape(label)}</i>' for i, label in named) if len(series) > 1 else ""
  return f"<figure><figcaption><b>{_escape(title)}</b> <span>{unit}</span>{legend}</figcaption>{chart}</figure>"


def _times(lines: Sequence[Line]) -> str:
  seconds = {key: value for key, value in _total_seconds(lines).items() if value > 0}
  total, bar, legend = sum(seconds.values()), [], []
  for key, value in seconds.items():
    color, fraction, label = f"t{list(TIMES).index(key)}", value / total, f"{TIMES[key]} {_format_duration(value)}"
    bar.append(f'<i class="{color}" style="width:{fraction:.3%}" title="{label}"></i>')
    legend.append(f'<li><i class="{color}"></i><b>{fraction:.1%}</b> {label}</li>')
  return f'<div class="bar">{"".join(bar)}</div><ul class="legend">{"".join(legend)}</ul>' if total else ""


def _sample(events: Sequence[Event]) -> str:
  samples = [e for e in events if e["event"] == "sample"]
  if not samples:
    return ""
  return f"<pre><b>{_escape(samples[-1].get('prompt', ''))}</b>{_escape(samples[-1].get('text', ''))}</pre>"


def _evaluations(events: Sequence[Event]) -> str:
  rows = [
    (f"{e['step']:,}", _format_fixed(e.get("bits_per_byte")), _format_fixed(e.get("loss")), e.get("sequences", "–"))
    for e in reversed(_events_by_step(events, "eval"))
  ]
  return _table(("step", "bits per byte", "loss", "sequences"), rows) if rows else ""


def _history(events: Sequence[Event]) -> str:
  """A row for every start, resume and end. A resume shows the details that differ from the process before it."""
  rows = []
  previous: dict[str, Any] = {}
  for e in events:
    if e["event"] not in metrics.PROCESS_EVENTS:
      continue
    details = _details(e)
    if e["event"] != "end":
      changed = {k: v for k, v in details.items() if previous and previous.get(k) != v}
      details, previous = changed, details
    text = ", ".join(f"{k} {v}" for k, v in details.items())
    rows.append((_format_time(e.get("time")), e["event"], f"{e['step']:,}", text))
  return _table(("time", "event", "step", "details"), rows) if rows else ""


def _config(config: dict[str, Any]) -> str:
  """A table of all fields, in which those that differ from the default are marked."""
  defaults = json.loads(json.dumps(flatten_config(Config())))  # tuples as the lists that JSON makes of them
  fields = leaf_paths(Config)
  groups: dict[str, list[str]] = {}
  for path, value in _leaves(config):
    is_known = path in defaults
    changed = is_known and defaults[path] != value
    doc = fields[path].metadata["doc"] if is_known else "no such field in this version"
    default = "" if is_known else "–"
    if changed:
      default = _format_json(defaults[path])
    row = (
      f'<tr{" class=changed" if changed else ""} title="{_escape(doc)}">'
      f"<th>{_escape(path.rsplit('.', 1)[-1])}</th><td>{_format_json(value)}</td><td>{default}</td></tr>"
    )
    groups.setdefault(path.rpartition(".")[0] or "run", []).append(row)
  tables = [
    f"<table><caption>{_escape(group)}</caption><thead><tr><th></th><td>value</td><td>default</td></tr></thead>"
    f"<tbody>{''.join(rows)}</tbody></table>"
    for group, rows in groups.items()
  ]
  note = '<p class="note">Marked rows differ from the default, which is beside them. Hover for what a field means.</p>'
  return f'{note}<div class="config">{"".join(tables)}</div>'


def _environment(events: Sequence[Event]) -> str:
  """A table of the newest details of the processes, and the hash of the newest state."""
  details: dict[str, Any] = {}
  for e in events:
    if e["event"] in ("start", "resume"):
      details.update(_details(e))
    elif e["event"] == "end" and e.get("state_sha256"):
      details["state_sha256"] = f"{e['state_sha256']} after step {e['step']:,}"
  return _table((), details.items()) if details else ""


def _details(event: Event) -> dict[str, Any]:
  """What an event has in addition to its name, step and time; dicts as text."""
  details = {k: v for k, v in event.items() if k not in ("event", "step", "time")}
  for name, value in details.items():
    if isinstance(value, dict):
      details[name] = ", ".join(f"{k}={v}" for k, v in value.items())
  return details


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
  head = f"<thead><tr>{''.join(f'<th>{_escape(name)}</th>' for name in columns)}</tr></thead>" if columns else ""
  body = "".join(f"<tr>{''.join(f'<td>{_escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
  return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def _section(title: str, body: str) -> str:
  return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def _events_by_step(events: Sequence[Event], name: str) -> list[Event]:
  """Events called `name` by increasing step; of two at the same step (before and after a resume) the later one."""
  by_step = {e["step"]: e for e in events if e["event"] == name}
  return [by_step[step] for step in sorted(by_step)]


def _points(lines: Sequence[Line], key: str) -> list[Point]:
  return [(line["step"], line[key] if is_number(line[key]) else None) for line in lines if key in line]


def _total_seconds(lines: Sequence[Line]) -> dict[str, float]:
  return {key: sum(line[key] for line in lines if is_number(line.get(key))) for key in TIMES}


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from _leaves(value, f"{prefix}{key}.")
    else:
      yield prefix + key, value


def _format_fixed(value: Any) -> str:
  return f"{value:.4f}" if is_number(value) else "–"


def _format_duration(duration: float) -> str:
  """`duration` in seconds as "1 h 2 min", "2 min 3 s" or "3.14 s"."""
  minutes, seconds = divmod(round(duration), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours} h {minutes} min"
  return f"{minutes} min {seconds} s" if minutes else f"{duration:.3g} s"


def _format_time(seconds: Any) -> str:
  if not is_number(seconds):
    return "at an unknown time"
  return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _format_json(value: Any) -> str:
  return _escape(json.dumps(value, ensure_ascii=False))


def _escape(value: Any) -> str:
  return html.escape(str(value).translate(_CONTROL_PICTURES))
