import dataclasses
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from deepseek_jax.config import Config
from deepseek_jax.errors import DataError
from deepseek_jax.schema import from_dict, leaf_paths
from deepseek_jax.training import report
from deepseek_jax.training.expert_loads import ExpertLoadWriter
from deepseek_jax.training.metrics import JsonlWriter

VOID = {"meta", "img"}


class Page(HTMLParser):
  """The page's elements and text; fails on tags that do not nest."""

  def __init__(self, text):
    super().__init__()
    self.open, self.elements, self.source, self.text = [], [], text, ""
    self.feed(text)
    assert not self.open, f"never closed: {self.open}"

  def handle_starttag(self, tag, attributes):
    self.elements.append((tag, dict(attributes)))
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attributes):
    self.elements.append((tag, dict(attributes)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open and self.open[-1] != "style":
      self.text += data + " "


def make_run(path, steps=40, config=None, losses=None, evals=(20, 40), resumes=(), sample="x = 1\n", end="finished"):
  path.mkdir(exist_ok=True)
  config = dataclasses.asdict(config or Config())
  (path / "config.json").write_text(json.dumps(config))
  writer = JsonlWriter(path, resume_step=0)
  writer.event("start", 0, devices="1 x cpu", jax="1.2.3", python="3.99", parameters=123_456)
  for step in range(1, steps + 1):
    if step - 1 in resumes:
      writer.event("resume", step - 1, devices="1 x cpu", jax="1.2.4", mesh={"data": 1, "fsdp": 2})
    loss = (losses or {}).get(step, 5 / step)
    values = {"loss": loss, "total_loss": loss, "bits_per_byte": loss / math.log(2), "grad_norm": 1.0, "skipped": 0}
    times = {"step_seconds": 0.6, "data_seconds": 0.2, "eval_seconds": 0.1, "checkpoint_seconds": 0.1}
    speed = {"learning_rate": 1e-3, "tokens": step * 4096, "samples": step * 16, "tokens_per_second": 4096.0}
    writer.write(step, values | times | speed, {})
    if step in evals:
      writer.event("eval", step, loss=5 / step + 0.5, bits_per_byte=7.25 / step, sequences=64)
  if end:
    writer.event("sample", steps, prompt="def ", text=sample)
    writer.event("end", steps, reason=end, state_sha256="ab" * 32)
  writer.close()


def make_page(path):
  assert report.write_report(path) == str(path / "report.html")
  return Page((path / "report.html").read_text(encoding="utf-8"))


def test_a_finished_run_is_told_in_full(tmp_path):
  make_run(tmp_path, resumes=(10, 30))
  page = make_page(tmp_path)
  for fact in (
    "finished",
    "123,456",
    "1 x cpu",
    "1.2.4",
    "3.99",
    "ab" * 32,
    "data=1, fsdp=2",
    "def ",
    "x = 1",
    "0.1812",
  ):  # 7.25 / 40
    assert fact in page.text, fact
  for chart in ("Loss", "Bits per byte", "Learning rate", "Gradient norm", "Throughput"):
    assert re.search(f"<b>{chart}</b>", page.source), chart
  assert page.source.count("<svg") == 5
  assert page.source.count("resumed from step 10") == page.source.count("resumed from step 30") == 5
  assert [s for s in ("60.0%", "20.0%", "10.0%") if s in page.text] == ["60.0%", "20.0%", "10.0%"]


def test_the_goodput_of_all_starts_is_a_table(tmp_path):
  make_run(tmp_path)
  assert "Goodput" not in make_page(tmp_path).text
  records = [
    {"event": "start", "time": 100.0, "step": 0},
    {"event": "spent", "time": 160.0, "step": 5, "seconds": {"step": 20.0, "device": 30.0, "data": 10.0}},
    {"event": "start", "time": 200.0, "step": 5},
    {"event": "spent", "time": 300.0, "step": 9, "seconds": {"device": 25.0, "compile": 75.0}},
  ]
  (tmp_path / "goodput.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
  text = " ".join(make_page(tmp_path).text.split())
  assert "37.5% of 3 min 20 s of wall time went into steps that count, in 2 starts." in text
  for row in ("compilation 1 min 15 s 37.5%", "down 40 s 20.0%", "data wait 10 s 5.0%"):
    assert row in text, row
  assert "sample 0" not in text


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
  make_run(tmp_path)
  page = make_page(tmp_path)
  assert not {tag for tag, _ in page.elements} & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
  assert not [a for _, attributes in page.elements for a in attributes if a in ("src", "href") or a.startswith("on")]
  assert '<meta http-equiv="refresh"' not in page.source  # that is for the page that is served
  assert not re.search(r"https?:|url\(|@import", page.source)
  assert "default-src 'none'" in page.source and "prefers-color-scheme: dark" in page.source


def test_the_config_shows_every_leaf_once_and_marks_what_differs(tmp_path):
  config = from_dict(Config, {"seed": 7, "model": {"layers": 9}, "data": {"sources": ("a.txt", "b.txt")}})
  make_run(tmp_path, config=config)
  source = make_page(tmp_path).source
  section = source[source.index("<h2>Config</h2>") : source.index("<h2>Environment</h2>")]
  rows = re.findall(r"<tr( class=changed)? title=[^>]*><th>(\w+)</th><td>(.*?)</td><td>(.*?)</td></tr>", section)
  assert [name for _, name, _, _ in rows] == [path.rsplit(".", 1)[-1] for path in leaf_paths(Config)]
  changed = [row[1:] for row in rows if row[0]]
  listed = ("sources", "[&quot;a.txt&quot;, &quot;b.txt&quot;]", "[&quot;python-stdlib&quot;]")
  assert changed == [("seed", "7", "0"), ("layers", "9", "4"), listed]


def test_text_of_the_run_is_escaped(tmp_path):
  evil = '</pre><script>alert("1")</script>&amp;\0\x1b\ud800'
  make_run(tmp_path, sample=evil, end=evil)
  config = json.loads((tmp_path / "config.json").read_text()) | {"name": evil}
  (tmp_path / "config.json").write_text(json.dumps(config))
  with open(tmp_path / "events.jsonl", "a") as file:
    file.write(json.dumps({"event": "start", "step": 40, "time": "<i>", evil: evil, "parameters": "<i>"}) + "\n")
  page = make_page(tmp_path)
  assert "script" not in {tag for tag, _ in page.elements} and "<i>" not in page.source
  assert page.text.count('<script>alert("1")</script>&amp;\u2400\u241b') >= 4
  assert "\0" not in page.source


@pytest.mark.parametrize(
  ("run", "says"),
  [
    ({"steps": 1, "evals": (), "end": None}, "not evaluated"),
    ({"steps": 0, "evals": (), "end": None}, "no step was logged"),
    ({"end": None}, "no end was recorded"),
    ({"end": "SIGTERM"}, "SIGTERM"),
    ({"evals": (), "losses": dict.fromkeys(range(1, 41), math.nan)}, "no finite value was logged"),
    ({"losses": {7: math.inf, 8: math.nan}}, "not finite at step 7"),
    ({"losses": {7: 1e308, 8: -1e308}}, "not finite at step 7"),
  ],
)
def test_an_unlucky_run_has_a_report_too(tmp_path, run, says):
  make_run(tmp_path, **run)
  assert says in make_page(tmp_path).source


def test_a_run_that_left_only_its_config_has_a_report(tmp_path):
  (tmp_path / "config.json").write_text('{"name": "early", "retired": {"field": 1}}')
  page = make_page(tmp_path)
  assert "early" in page.text and "no such field in this version" in page.source


def test_total_loss_is_drawn_where_it_differs(tmp_path):
  make_run(tmp_path)
  assert "all terms" not in make_page(tmp_path).source
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  text = "".join(json.dumps(line | {"total_loss": line["loss"] + 0.1, "mfu": 0.4}) + "\n" for line in lines)
  (tmp_path / "metrics.jsonl").write_text(text)
  page = make_page(tmp_path)
  assert "all terms" in page.source and "<b>MFU</b>" in page.source


def add_to_lines(path, **values):
  """Adds to each line of metrics the keys `values`, functions of the step; "/" is "__" in their names."""
  lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
  for line in lines:
    line |= {name.replace("__", "/"): value(line["step"]) for name, value in values.items()}
  (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def charts(page):
  """{title: (legend, source of the chart)}."""
  figures = re.findall(r"<figure><figcaption><b>(.*?)</b>(.*?)</figcaption>(.*?)</figure>", page.source, re.DOTALL)
  return {title: (re.findall(r"<i class=\"s\d\">(.*?)</i>", caption), chart) for title, caption, chart in figures}


def test_layers_are_compared_at_the_start_the_middle_and_the_end(tmp_path):
  make_run(tmp_path)
  add_to_lines(
    tmp_path, router__layer_3__max_vio=lambda step: 1 / step, router__mtp_1__max_vio=lambda step: float(step),
    router__layer_3__entropy=lambda step: 0.5, router__mtp_1__entropy=lambda step: None,
    router__layer_3__mine=lambda step: 7,
  )  # fmt: skip
  found = charts(make_page(tmp_path))
  legend, chart = found["Max violation by layer"]
  assert legend == ["steps 1 to 4", "steps 19 to 22", "steps 37 to 40"]
  assert re.findall(r'<text class="x"[^>]*>(.*?)</text>', chart) == ["3", "mtp 1"]
  assert "steps 37 to 40: 38.5 in layer mtp 1" in chart and "steps 1 to 4: 0.520833 in layer 3" in chart
  assert "in layer mtp 1" not in found["Entropy of loads by layer"][1]
  assert "mine by layer" in found


def test_depths_losses_and_metrics_of_variants_have_charts(tmp_path):
  make_run(tmp_path)
  constants = {"mtp_loss_1": 2.0, "mtp_loss_2": 3.0, "overflow": 0.0, "balance_loss": 0.1, "indexer_loss": 0.25}
  add_to_lines(tmp_path, **{name: lambda step, value=value: value for name, value in constants.items()})
  found = charts(make_page(tmp_path))
  assert found["Loss of multi-token prediction"][0] == ["depth 1", "depth 2"]
  assert "Balance loss" in found and "indexer_loss: 0.25 at step 40" in found["indexer_loss"][1]
  assert not found.keys() & {"Overflow", "Skipped updates", "step", "samples", "step_seconds"}  # counts that are 0
  add_to_lines(tmp_path, overflow=lambda step: float(step == 7), skipped=lambda step: int(step >= 7))
  assert charts(make_page(tmp_path)).keys() >= {"Overflow", "Skipped updates"}


def test_spikes_are_ringed_and_the_gradient_norm_has_its_running_median(tmp_path):
  make_run(tmp_path, steps=200, losses={150: 9.0})
  found = charts(make_page(tmp_path))
  assert found["Loss"][1].count('class="ring"') == 1 and "spikes: 9 at step 150" in found["Loss"][1]
  assert found["Gradient norm"][0] == ["gradient norm", "running median"]


def test_the_health_section_names_what_it_sees(tmp_path):
  make_run(tmp_path, steps=200)
  assert "Nothing to note." in make_page(tmp_path).text
  make_run(tmp_path / "spike", steps=200, losses={150: 9.0, 151: math.nan})
  page = make_page(tmp_path / "spike")
  assert "Nothing to note." not in page.text and "Loss spikes" in page.text and "loss at step 151" in page.text
  assert page.source.index("<h2>Health</h2>") < page.source.index("<svg")


def test_experts_have_heat_maps_in_the_page_itself(tmp_path):
  make_run(tmp_path)
  assert "Expert loads" not in make_page(tmp_path).text
  writer = ExpertLoadWriter(tmp_path, 0)
  for step in range(1, 41):
    writer.write(step, {}, {f"router/{layer}/load": np.full(8, 1 / 8) for layer in ("layer_3", "<mtp>")})
  writer.close()
  page = make_page(tmp_path)
  images = [attributes for tag, attributes in page.elements if tag == "img"]
  assert all(i["src"].startswith("data:image/png;base64,") and i["alt"] for i in images) and len(images) == 4
  assert "layer 3" in page.text and "<mtp>" in page.text and "img-src data:" in page.source


def test_the_history_tells_what_changed_at_a_resume(tmp_path):
  make_run(tmp_path, resumes=(10, 30))
  rows = re.findall(r"<td>(start|resume|end)</td><td>(\d+)</td><td>(.*?)</td>", make_page(tmp_path).source)
  changed = "jax 1.2.4, mesh data=1, fsdp=2"
  end = "reason finished, state_sha256 " + "ab" * 32
  assert rows == [("start", "0", ""), ("resume", "10", changed), ("resume", "30", ""), ("end", "40", end)]


def test_of_two_evaluations_at_a_step_the_later_counts(tmp_path):
  make_run(tmp_path, evals=(), end=None)
  writer = JsonlWriter(tmp_path, resume_step=40)
  for bits in (3.5, 2.25):
    writer.event("eval", 40, loss=1.0, bits_per_byte=bits, sequences=64)
  writer.close()
  page = make_page(tmp_path)
  assert "2.2500" in page.text and "3.5000" not in page.text


def test_long_runs_make_small_reports(tmp_path):
  make_run(tmp_path, steps=20_000, evals=())
  assert len(make_page(tmp_path).source) < 250_000


@pytest.mark.parametrize("content", [None, b"{", b"[1]", b"\xff"])
def test_a_config_that_cannot_be_read_is_named(tmp_path, content):
  if content is not None:
    (tmp_path / "config.json").write_bytes(content)
  with pytest.raises(DataError, match=r"config\.json: expected"):
    report.write_report(tmp_path)
  assert not (tmp_path / "report.html").exists()
