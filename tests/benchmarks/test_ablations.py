"""Ablations go on where they were."""

from xml.etree import ElementTree

import pytest

from benchmarks import ablations
from deepseek_jax.errors import ConfigError, UserError
from tests.benchmarks.programs import benchmark


def test_ablations_go_on_where_they_were(text, tmp_path):
  sizes = [f"--config.{size}" for size in (
    "model.embed=32", "model.layers=1", "model.first_dense_layers=0", "model.moe.mlp=16", "data.seq=32", "train.global_batch=2",
    f"data.sources={text}", f"data.cache={tmp_path}", "log.tensorboard=false", "sample.max_tokens=0", "eval.final_sequences=2",
  )]  # fmt: skip
  arguments = (
    "--steps=2",
    "--seeds=1",
    "--variants=none",
    f"--workdir={tmp_path}/runs",
    f"--out={tmp_path}/curves.svg",
  )
  for expected in ("held-out loss", "finished already, at step 2"):
    out, _ = benchmark("ablations", *arguments, *sizes)
    assert expected in out and out.splitlines()[-1].startswith("| none | ")
  ElementTree.parse(tmp_path / "curves.svg")
  with pytest.raises(UserError, match=r"train\.steps: 2 there, 1 now.*another --workdir"):
    ablations.main(["ablations", "--steps=1", *arguments[1:], *sizes])


def test_a_variant_that_is_none_is_refused():
  with pytest.raises(ConfigError, match="among mla, gqa"):
    ablations.main(["ablations", "--variants=mlp"])
