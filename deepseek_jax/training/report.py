"""`report.html`: one page about a run that needs no network, made from the files in the run's folder.

Inputs are `config.json`, `metrics.jsonl`, `events.jsonl`, `goodput.jsonl` and, of a model with experts, `expert_loads.bin`. A run that was stopped, killed or never made a step has a
report too. Every text is escaped, and the page's content security policy forbids it to load or run anything.
"""

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from deepseek_jax.config import Config
from deepseek_jax.schema import config_leaves, flatten_config, leaf_paths
from deepseek_jax.training import metrics
from deepseek_jax.training.expert_heatmap import heatmaps
from deepseek_jax.training.expert_loads import read_expert_loads
from deepseek_jax.training.goodput import CATEGORIES, Goodput, read_goodput
from deepseek_jax.training.health import Finding, find
from deepseek_jax.training.page import (
  document,
  escape,
  format_duration,
  format_fixed,
  format_json,
  format_time,
  section,
  table,
)
from deepseek_jax.training.plot import format_compact
from deepseek_jax.training.report_charts import TIMES, charts
from deepseek_jax.training.run_records import Event, RunRecords, is_number, read_run


def write_report(workdir: str | os.PathLike[str]) -> str:
  """Writes WORKDIR/report.html atomically and returns its path. Raises DataError for an input that cannot be read."""
  path = os.path.join(workdir, "report.html")
  page = make_page(workdir)
  with open(path + ".partial", "wb") as file:
    file.write(page)
  os.replace(path + ".partial", path)
  return path


def make_page(workdir: str | os.PathLike[str], refresh_seconds: int = 0) -> bytes:
  """The report of the run in `workdir`. Raises DataError as `write_report`.

  refresh_seconds: as in `page.document`.
  """
  run, loads, goodput = read_run(workdir), read_expert_loads(workdir), read_goodput(workdir)
  name = str(run.config.get("name", "run"))
  parts = [
    _header(name, run.events),
    _tiles(run),
    section("Health", _health(find(run, loads))),
    charts(run),
    section("Expert loads", heatmaps(loads) if loads else ""),
    section("Where the time goes", _times(run)),
    section("Goodput", _goodput(goodput)),
    section("Sample", _sample(run.events)),
    section("Held-out evaluation", _evaluations(run)),
    section("Starts, resumes, stages, ends", _history(run.events)),
    section("Config", _config(run.config)),
    section("Environment", _environment(run.events)),
  ]
  page = document(f"{name} · training report", parts, refresh_seconds=refresh_seconds)
  return page.encode(errors="replace")  # lone surrogates become "?"


def _header(name: str, events: Sequence[Event]) -> str:
  process_events = [e for e in events if e["event"] in metrics.PROCESS_EVENTS]
  has_ended = bool(process_events) and process_events[-1]["event"] == "end"
  status = str(process_events[-1].get("reason")) if has_ended else "no end was recorded: running, or killed"
  subtitle = []
  start: Event = next((e for e in events if e["event"] == "start"), {})
  if is_number(start.get("parameters")):
    subtitle.append(f"{start['parameters']:,} parameters")
  if events:
    subtitle.append(f"last event {format_time(events[-1].get('time'))}")
  kind = "good" if status == "finished" else "open"
  return (
    f'<header><h1>{escape(name)} <span class="pill {kind}">{escape(status)}</span></h1>'
    f"<p>{escape(' · '.join(subtitle))}</p></header>"
  )


def _tiles(run: RunRecords) -> str:
  heldout = (run.events_by_step("eval") or [{}])[-1]
  planned_steps = dict(config_leaves(run.config)).get("train.steps")
  last_step = int(run.steps[-1]) if len(run.steps) else 0
  tokens, skipped, speeds = _last(run, "tokens"), _last(run, "skipped"), _finite(run, "tokens_per_second")
  tiles = [
    (
      "held-out bits/byte", format_fixed(heldout.get("bits_per_byte")),
      f"at step {heldout['step']:,}" if heldout else "not evaluated",
    ),
    ("held-out loss", format_fixed(heldout.get("loss")), "nats per token"),
    ("train loss", format_fixed(_last(run, "loss")), f"at step {last_step:,}" if last_step else "no step was logged"),
    ("steps", f"{last_step:,}", f"of {planned_steps:,}" if is_number(planned_steps) and planned_steps else ""),
    ("tokens", "–" if tokens is None else format_compact(tokens), "trained on"),
    ("tokens per second", format_compact(float(np.median(speeds))) if len(speeds) else "–", "median"),
    ("time", format_duration(sum(_total_seconds(run).values())), "logged"),
  ]  # fmt: skip
  if skipped:
    tiles.append(("skipped updates", f"{skipped:,.0f}", "the log says why"))
  cells = [
    f"<div><b>{escape(v)}</b><span>{escape(k)}</span><small>{escape(note)}</small></div>" for k, v, note in tiles
  ]
  return f'<section class="tiles">{"".join(cells)}</section>'


def _health(findings: Sequence[Finding]) -> str:
  if not findings:
    return '<p class="fine">Nothing to note.</p>'
  items = [
    f"<li><b>{escape(f.title)}</b> <span>{escape(f.evidence)}</span> <em>{escape(f.advice)}</em></li>" for f in findings
  ]
  return f'<ul class="health">{"".join(items)}</ul>'


def _times(run: RunRecords) -> str:
  seconds = {key: value for key, value in _total_seconds(run).items() if value > 0}
  total, bar, legend = sum(seconds.values()), [], []
  for key, value in seconds.items():
    color, fraction, label = f"t{list(TIMES).index(key)}", value / total, f"{TIMES[key]} {format_duration(value)}"
    bar.append(f'<i class="{color}" style="width:{fraction:.3%}" title="{label}"></i>')
    legend.append(f'<li><i class="{color}"></i><b>{fraction:.1%}</b> {label}</li>')
  return f'<div class="bar">{"".join(bar)}</div><ul class="legend">{"".join(legend)}</ul>' if total else ""


def _goodput(goodput: Goodput) -> str:
  """A table of the wall time over all restarts; nothing for a run without records."""
  if not goodput.total:
    return ""
  shares = sorted(goodput.seconds.items(), key=lambda item: -item[1])
  rows = [(CATEGORIES[name], format_duration(s), f"{s / goodput.total:.1%}") for name, s in shares if s > 0]
  starts = f"{goodput.starts} start{'s' if goodput.starts > 1 else ''}"
  note = (
    f"{goodput.fraction:.1%} of {format_duration(goodput.total)} of wall time went into steps that count, in {starts}."
  )
  return f'<p class="note">{escape(note)}</p>{table(("", "time", "share"), rows)}'


def _sample(events: Sequence[Event]) -> str:
  samples = [e for e in events if e["event"] == "sample"]
  if not samples:
    return ""
  return f"<pre><b>{escape(samples[-1].get('prompt', ''))}</b>{escape(samples[-1].get('text', ''))}</pre>"


def _evaluations(run: RunRecords) -> str:
  rows = [
    (f"{e['step']:,}", format_fixed(e.get("bits_per_byte")), format_fixed(e.get("loss")), e.get("sequences", "–"))
    for e in reversed(run.events_by_step("eval"))
  ]
  return table(("step", "bits per byte", "loss", "sequences"), rows) if rows else ""


def _history(events: Sequence[Event]) -> str:
  """A row for every event of a process, and stage. A resume or stage shows the details that differ from what was before."""
  rows = []
  previous: dict[str, Any] = {}
  for e in events:
    if e["event"] not in (*metrics.PROCESS_EVENTS, "stage"):
      continue
    details = _details(e)
    if e["event"] in ("start", "resume", "stage"):
      changed = {k: v for k, v in details.items() if previous and previous.get(k) != v}
      details, previous = changed, details
    text = ", ".join(f"{k} {v}" for k, v in details.items())
    rows.append((format_time(e.get("time")), e["event"], f"{e['step']:,}", text))
  return table(("time", "event", "step", "details"), rows) if rows else ""


def _config(config: dict[str, Any]) -> str:
  """A table of all fields, in which those that differ from the default are marked."""
  defaults = json.loads(json.dumps(flatten_config(Config())))  # tuples as the lists that JSON makes of them
  fields = leaf_paths(Config)
  groups: dict[str, list[str]] = {}
  for path, value in config_leaves(config):
    is_known = path in defaults
    changed = is_known and defaults[path] != value
    doc = fields[path].metadata["doc"] if is_known else "no such field in this version"
    default = "" if is_known else "–"
    if changed:
      default = format_json(defaults[path])
    row = (
      f'<tr{" class=changed" if changed else ""} title="{escape(doc)}">'
      f"<th>{escape(path.rsplit('.', 1)[-1])}</th><td>{format_json(value)}</td><td>{default}</td></tr>"
    )
    groups.setdefault(path.rpartition(".")[0] or "run", []).append(row)
  tables = [
    f"<table><caption>{escape(group)}</caption><thead><tr><th></th><td>value</td><td>default</td></tr></thead>"
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
  return table((), details.items()) if details else ""


def _details(event: Event) -> dict[str, Any]:
  """What an event has in addition to its name, step and time; dicts as text."""
  details = {k: v for k, v in event.items() if k not in ("event", "step", "time")}
  for name, value in details.items():
    if isinstance(value, dict):
      details[name] = ", ".join(f"{k}={v}" for k, v in value.items())
  return details


def _finite(run: RunRecords, key: str) -> np.ndarray:
  """The finite values of a metric, float64 [n]."""
  values = run.columns[key].values if key in run.columns else np.zeros(0)
  return values[~np.isnan(values)]


def _last(run: RunRecords, key: str) -> float | None:
  """The value of a metric at the last step; None where it was not logged there, or was not finite."""
  column = run.columns.get(key)
  is_current = column is not None and column.steps[-1] == run.steps[-1] and not np.isnan(column.values[-1])
  return float(column.values[-1]) if column is not None and is_current else None


def _total_seconds(run: RunRecords) -> dict[str, float]:
  return {key: float(_finite(run, key).sum()) for key in TIMES}
