"""The comparison of schedulers, with a small program in the place of guidellm."""

import json
import sys

import pytest

from benchmarks import serving
from tests.configs import write_texts

# Takes what guidellm takes, asks for the requests one after the other, and writes what guidellm writes.
GUIDELLM = r"""#!{python}
import json, sys, time, urllib.request
options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
field = lambda option, name: dict(part.split("=", 1) for part in options[option].split(","))[name]
started, usage, seconds = time.time(), [], []
for line in open(field("--data", "path")):
  request = json.loads(line)
  body = {{"prompt": request["prompt"], "max_tokens": request["output_tokens_count"], "ignore_eos": True}}
  body |= {{"stream": True, "stream_options": {{"include_usage": True}}}}
  post = urllib.request.Request(field("--backend", "target") + "/v1/completions", json.dumps(body).encode(), {{"Content-Type": "application/json"}})
  begun = time.time()
  events = urllib.request.urlopen(post).read().decode().strip().split("\n\n")
  usage.append(json.loads(events[-2].removeprefix("data: "))["usage"])
  seconds.append(time.time() - begun)
mean = lambda values, unit=1: {{"successful": {{"mean": unit * sum(values) / len(values), "total_sum": sum(values)}}}}
metrics = {{
  "request_totals": {{"successful": len(usage)}}, "request_latency": mean(seconds),
  "prompt_token_count": mean([u["prompt_tokens"] for u in usage]),
  "output_token_count": mean([u["completion_tokens"] for u in usage]),
  "time_to_first_token_ms": mean(seconds, 1e3), "inter_token_latency_ms": mean(seconds, 1e3),
}}
result = {{"metrics": metrics, "duration": time.time() - started, "requests": {{"errored": None}}}}
json.dump({{"benchmarks": [result]}}, open(field("--output", "path"), "w"))
"""


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
  write_texts(tmp_path / "texts", files=4, words=100)
  small = {"model.layers": 1, "model.embed": 32, "model.mlp": 32, "data.sources": (str(tmp_path / "texts"),)}
  small |= {"data.cache": str(tmp_path / "cache"), "data.heldout_fraction": 0.3}
  monkeypatch.setattr(serving, "MODEL", serving.MODEL | small)
  monkeypatch.setattr(serving, "MOST", 20)


def test_counts_are_equal_and_the_table_has_every_round(tmp_path, capsys):
  guidellm = tmp_path / "guidellm"
  guidellm.write_text(GUIDELLM.format(python=sys.executable))
  guidellm.chmod(0o755)
  flags = ["serving", f"--guidellm={guidellm}", f"--out={tmp_path}", "--requests=4", "--rounds=1", "--max_batch=2"]
  assert serving.main(flags) == 0
  rows = json.loads((tmp_path / "results.json").read_text())["rows"]
  assert [row["name"] for row in rows] == ["continuous 0", "static 0"]
  for row in rows:
    for name in ("requests", "prompt tokens", "generated tokens"):
      assert row[name][0] == row[name][1] > 0
    assert 0 < row["occupancy"][1] <= 0.5 and row["errors"] == []
  assert "round 0: continuous batching gives" in capsys.readouterr().out
  assert serving.main(["serving", "--guidellm=none", *flags[2:]]) == 0  # measured already


def test_requests_are_the_same_each_time_and_of_all_lengths(tmp_path):
  for name in ("a", "b"):
    serving.write_requests(tmp_path / name, 200, 0)
  assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()
  requests = [json.loads(line) for line in (tmp_path / "a").read_text().splitlines()]
  lengths = [request["output_tokens_count"] for request in requests]
  assert {min(lengths), max(lengths)} == {16, 20} and {len(r["prompt"]) + 1 for r in requests} == set(range(16, 21))
