"""`report.html`: a run on one page that reads offline, made from the files that the run left in its folder.

Inputs are `config.json`, `metrics.jsonl` and `events.jsonl`; a run that was stopped, killed or never made a step has a
report too. Every text is escaped, and the page's own policy forbids it to load or run anything.
"""

import datetime
import html
import json
import os
import pathlib
import statistics

from deepseek_jax.config import Config
from deepseek_jax.errors import DataError
from deepseek_jax.schema import flatten_config, leaf_paths
from deepseek_jax.training import metrics
from deepseek_jax.training.plot import BINS, Series, compact, line_chart

# title, unit, key in metrics.jsonl, key in eval events or None, scale; a chart whose key was never logged is left out
CHARTS = (
  ("Loss", "nats per token, log scale", "loss", "loss", "log"),
  ("Bits per byte", "log scale", "bits_per_byte", "bits_per_byte", "log"),
  ("Learning rate", "", "learning_rate", None, "from zero"),
  ("Gradient norm", "before clipping, log scale", "grad_norm", None, "log"),
  ("Throughput", "tokens per second", "tokens_per_second", None, "from zero"),
  ("Model FLOP/s", "", "model_flops_per_second", None, "from zero"),
  ("MFU", "share of the chip's peak", "mfu", None, "from zero"),
  ("Device memory", "bytes", "memory_bytes", None, "from zero"),
)
TIMES = {
  "step_seconds": "step",
  "data_seconds": "data wait",
  "eval_seconds": "evaluation",
  "checkpoint_seconds": "checkpoint",
}
# Control characters have no place in HTML, but a byte-level model may write any of them: show them as their pictures.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}


def write(workdir):
  """Writes WORKDIR/report.html (atomically) and returns its path. Raises DataError for an input that cannot be read."""
  path = os.path.join(workdir, "report.html")
  page = _page(_load_config(os.path.join(workdir, "config.json")), *_load_run(workdir))
  with open(path + ".partial", "w", encoding="utf-8", errors="replace") as file:  # lone surrogates become "?"
    file.write(page)
  os.replace(path + ".partial", path)
  return path


def _load_config(path):
  try:
    with open(path, encoding="utf-8") as file:
      tree = json.load(file)
  except OSError as error:
    raise DataError(f"{path}: expected the config of a run, got {error.strerror}; name the folder of a run") from None
  except ValueError as error:
    raise DataError(f"{path}: expected JSON, got {error}; run the training command again to write it anew") from None
  if not isinstance(tree, dict):
    raise DataError(f"{path}: expected a JSON object, got {type(tree).__name__}; run the training command again")
  return tree


def _load_run(workdir):
  return (metrics.read(os.path.join(workdir, name)) for name in (metrics.METRICS, metrics.EVENTS))


def _page(config, lines, events):
  name = str(config.get("name", "run"))
  style = pathlib.Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
  parts = [
    _header(name, lines, events),
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
    f"<title>{_text(name)} · training report</title><style>{style}</style></head>\n<body>"
    + "\n".join(filter(None, parts))
    + "</body></html>\n"
  )


def _header(name, lines, events):
  processes = [e for e in events if e["event"] in metrics.PROCESS_EVENTS]
  ended = bool(processes) and processes[-1]["event"] == "end"
  status = str(processes[-1].get("reason")) if ended else "no end was recorded: running, or killed"
  facts = [f"last event {_time(events[-1].get('time'))}"] if events else []
  start = next((e for e in events if e["event"] == "start"), {})
  if _is_number(start.get("parameters")):
    facts.insert(0, f"{start['parameters']:,} parameters")
  kind = "good" if status == "finished" else "open"
  return (
    f'<header><h1>{_text(name)} <span class="pill {kind}">{_text(status)}</span></h1>'
    f"<p>{_text(' · '.join(facts))}</p></header>"
  )


def _tiles(config, lines, events):
  last, heldout = (lines[-1] if lines else {}), (_of(events, "eval") or [{}])[-1]
  planned = dict(_leaves(config)).get("train.steps")
  rates = [rate for _, rate in _points(lines, "tokens_per_second") if rate is not None]
  evaluated = f"at step {heldout['step']:,}" if heldout else "not evaluated"
  tiles = [
    ("held-out bits/byte", _fixed(heldout.get("bits_per_byte")), evaluated),
    ("held-out loss", _fixed(heldout.get("loss")), "nats per token"),
    ("train loss", _fixed(last.get("loss")), f"at step {last['step']:,}" if last else "no step was logged"),
    ("steps", f"{last.get('step', 0):,}", f"of {planned:,}" if _is_number(planned) else ""),
    ("tokens", compact(last["tokens"]) if _is_number(last.get("tokens")) else "–", "trained on"),
    ("tokens per second", compact(statistics.median(rates)) if rates else "–", "median"),
    ("time", _duration(sum(_seconds(lines).values())), "logged"),
  ]
  if _is_number(last.get("skipped")) and last["skipped"]:
    tiles.append(("skipped updates", f"{last['skipped']:,}", "gradients not finite"))
  cells = [f"<div><b>{_text(v)}</b><span>{_text(k)}</span><small>{_text(note)}</small></div>" for k, v, note in tiles]
  return f'<section class="tiles">{"".join(cells)}</section>'


def _charts(lines, events):
  marks = sorted({e["step"] for e in events if e["event"] == "resume"})
  figures = []
  for title, unit, key, eval_key, scale in CHARTS:
    series = [Series("train" if eval_key else title.lower(), _points(lines, key))]
    if eval_key:
      series.append(Series("held-out", _points(_of(events, "eval"), eval_key), "dots"))
    if key == "loss" and any(line.get("total_loss") != line.get("loss") for line in lines):
      series.append(Series("train, all terms", _points(lines, "total_loss")))
    if not any(s.points for s in series):
      continue
    shown = [(i, s.name) for i, s in enumerate(series) if s.points] if eval_key else []
    legend = "".join(f'<i class="s{i}">{_text(label)}</i>' for i, label in shown)
    caption = f"<figcaption><b>{title}</b> <span>{unit}</span>{legend}</figcaption>"
    figures.append(f"<figure>{caption}{line_chart(series, marks, scale)}</figure>")
  note = (
    f"Over completed updates. Long runs are thinned to the least and greatest value of each of {BINS} bins. Dashed "
    "lines are resume points; red ticks on the lower edge are values that were not finite. Hover for numbers."
  )
  return f'<section class="charts">{"".join(figures)}</section><p class="note">{note}</p>' if figures else ""


def _times(lines):
  seconds = {key: value for key, value in _seconds(lines).items() if value > 0}
  total, bar, legend = sum(seconds.values()), [], []
  for key, value in seconds.items():
    colour, share, label = f"t{list(TIMES).index(key)}", value / total, f"{TIMES[key]} {_duration(value)}"
    bar.append(f'<i class="{colour}" style="width:{share:.3%}" title="{label}"></i>')
    legend.append(f'<li><i class="{colour}"></i><b>{share:.1%}</b> {label}</li>')
  return f'<div class="bar">{"".join(bar)}</div><ul class="legend">{"".join(legend)}</ul>' if total else ""


def _sample(events):
  samples = [e for e in events if e["event"] == "sample"]
  if not samples:
    return ""
  return f"<pre><b>{_text(samples[-1].get('prompt', ''))}</b>{_text(samples[-1].get('text', ''))}</pre>"


def _evaluations(events):
  rows = [
    (f"{e['step']:,}", _fixed(e.get("bits_per_byte")), _fixed(e.get("loss")), e.get("sequences", "–"))
    for e in reversed(_of(events, "eval"))
  ]
  return _table(("step", "bits per byte", "loss", "sequences"), rows) if rows else ""


def _history(events):
  """Every start, resume and end; of the facts of a resume, those that differ from the process before it."""
  rows, before = [], {}
  for e in (e for e in events if e["event"] in metrics.PROCESS_EVENTS):
    details = _facts(e)
    if e["event"] != "end":
      details, before = {k: v for k, v in details.items() if before and before.get(k) != v}, details
    rows.append((_time(e.get("time")), e["event"], f"{e['step']:,}", ", ".join(f"{k} {v}" for k, v in details.items())))
  return _table(("time", "event", "step", "details"), rows) if rows else ""


def _config(config):
  defaults = json.loads(json.dumps(flatten_config(Config())))  # tuples as the lists that JSON makes of them
  docs, groups = leaf_paths(Config), {}
  for path, value in _leaves(config):
    known = path in defaults
    changed = known and defaults[path] != value
    doc = docs[path].metadata["doc"] if known else "no such field in this version"
    was = f"<td>{_value(defaults[path])}</td>" if changed else f"<td>{'' if known else '–'}</td>"
    row = (
      f'<tr{" class=changed" if changed else ""} title="{_text(doc)}">'
      f"<th>{_text(path.rsplit('.', 1)[-1])}</th><td>{_value(value)}</td>{was}</tr>"
    )
    groups.setdefault(path.rpartition(".")[0] or "run", []).append(row)
  tables = [
    f"<table><caption>{_text(group)}</caption><thead><tr><th></th><td>value</td><td>default</td></tr></thead>"
    f"<tbody>{''.join(rows)}</tbody></table>"
    for group, rows in groups.items()
  ]
  note = (
    '<p class="note">Marked rows differ from the default, which stands beside them. Hover for what a field means.</p>'
  )
  return f'{note}<div class="config">{"".join(tables)}</div>'


def _environment(events):
  facts = {}
  for e in events:
    if e["event"] in ("start", "resume"):
      facts.update(_facts(e))
    elif e["event"] == "end" and e.get("state_sha256"):
      facts["state_sha256"] = f"{e['state_sha256']} after step {e['step']:,}"
  return _table((), facts.items()) if facts else ""


def _facts(event):
  values = {k: v for k, v in event.items() if k not in ("event", "step", "time")}
  return {k: ", ".join(f"{a}={b}" for a, b in v.items()) if isinstance(v, dict) else v for k, v in values.items()}


def _table(head, rows):
  head = f"<thead><tr>{''.join(f'<th>{_text(cell)}</th>' for cell in head)}</tr></thead>" if head else ""
  body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
  return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def _section(title, body):
  return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def _of(events, name):
  """Events of one kind by rising step; of two at the same step (before and after a resume) the later one."""
  return [e for _, e in sorted({e["step"]: e for e in events if e["event"] == name}.items())]


def _points(lines, key):
  return [(line["step"], line[key] if _is_number(line[key]) else None) for line in lines if key in line]


def _seconds(lines):
  return {key: sum(line[key] for line in lines if _is_number(line.get(key))) for key in TIMES}


def _leaves(tree, prefix=""):
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from _leaves(value, f"{prefix}{key}.")
    else:
      yield prefix + key, value


def _is_number(value):
  return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _fixed(value):
  return f"{value:.4f}" if _is_number(value) else "–"


def _duration(exact):
  minutes, seconds = divmod(round(exact), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{exact:.3g} s"


def _time(seconds):
  if not _is_number(seconds):
    return "at an unknown time"
  return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _value(value):
  return _text(json.dumps(value, ensure_ascii=False))


def _text(value):
  return html.escape(str(value).translate(_VISIBLE))
