"""benchmarks/long_context.py at a size that takes seconds: what is trained once, what differs, and that it goes on."""

import json
from xml.etree import ElementTree

import pytest

from benchmarks import long_context
from deepseek_jax.errors import ConfigError

CONFIG = """
from ml_collections import ConfigDict

def get_config():
  def stage(seq, until, **fields):
    return dict(name=str(seq), until_tokens=until, data=dict(seq=seq), train=dict(global_batch=256 // seq), **fields)

  return ConfigDict(dict(
    model=dict(embed=16, layers=1, mlp=24, compute_dtype="float32", attention=dict(heads=2, kv_heads=1, head_dim=8)),
    data=dict(sources=({source!r},), seq=16, heldout_fraction=0.3, cache={cache!r}),
    train=dict(steps=0, global_batch=16), eval=dict(final_sequences=8), log=dict(every=1, tensorboard=False),
    stages=(stage(16, 512), stage(32, 1024, model=dict(attention=dict(yarn=dict(factor=2, original_seq=16))))),
  ))
"""


def test_arms_share_pretraining_and_are_evaluated_at_each_length(text, tmp_path, capsys, monkeypatch):
  (tmp_path / "config.py").write_text(CONFIG.format(source=str(text), cache=str(tmp_path)))
  flags = [
    f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/w", f"--out={tmp_path}/a.svg", "--sequences=4", "--retrieval=8",
  ]  # fmt: skip
  assert long_context.main(["long_context", *flags]) == 0
  out = capsys.readouterr().out

  metrics = {
    arm: [json.loads(line) for line in (tmp_path / "w" / arm / "metrics.jsonl").read_text().splitlines()]
    for arm in ("yarn", "no-yarn")
  }
  assert [[line["tokens"] for line in lines] for lines in metrics.values()] == [[256, 512, 768, 1024]] * 2
  losses = [[line["loss"] for line in lines] for lines in metrics.values()]
  assert losses[0][:2] == losses[1][:2] and losses[0][2:] != losses[1][2:]

  rows = {row["name"]: row for row in json.loads((tmp_path / "w" / "results.json").read_text())["rows"]}
  assert len(rows) == 4
  for arm in long_context.ARMS:
    before, after = (rows[f"{arm}, {time} the extension to 32"] for time in long_context.TIMES)
    assert (before["step"], after["step"]) == (2, 4)
    assert list(before["by_position"]) == ["0 to 15", "16 to 23", "24 to 31"] and before["retrieval"]
    assert before["by_position"] != after["by_position"]
  # The weights before the first extension are those of both arms, and YaRN changes what they give.
  first = [rows[f"{arm}, before the extension to 32"] for arm in long_context.ARMS]
  assert first[0]["by_position"] != first[1]["by_position"]
  assert out.count("| loss by position, 32 ") == out.count("| accuracy by distance, 32 ") == 1
  assert "loss at 32" in (tmp_path / "a.svg").read_text()
  ElementTree.parse(tmp_path / "a.svg")

  monkeypatch.setattr(long_context, "evaluate", None)  # nothing is measured again
  assert long_context.main(["long_context", *flags]) == 0
  assert capsys.readouterr().out.count("finished already") == 2


def test_a_config_without_extensions_is_refused(tmp_path):
  with pytest.raises(ConfigError, match="--config=tiny has 0 stages: give one with pre-training and extensions"):
    long_context.main(["long_context", "--config=tiny", f"--workdir={tmp_path}"])
