"""The comparison of optimizers goes on where it was."""

import pytest

from benchmarks import optimizers
from deepseek_jax.errors import ConfigError
from tests.benchmarks.programs import benchmark


def test_the_comparison_goes_on_where_it_was(text, tmp_path):
  sizes = (
    "model.embed=32", "model.layers=1", "model.first_dense_layers=1", "model.num_mtp_layers=0", "data.seq=32", "train.global_batch=2",
    f"data.sources={text}", f"data.cache={tmp_path}", "log.tensorboard=false", "sample.max_tokens=0", "eval.final_sequences=2",
  )  # fmt: skip
  arguments = ("--seeds=1", "--optimizers=muon", "--rates=1e-3", f"--workdir={tmp_path}/runs")
  for expected in ("held-out loss", "finished already, at step 2"):
    out, _ = benchmark("optimizers", "--steps=2", *arguments, *(f"--config.{size}" for size in sizes))
    assert expected in out and out.splitlines()[-1].startswith("| muon | 1e-3 | ")


def test_an_optimizer_that_is_none_is_refused():
  with pytest.raises(ConfigError, match="among adamw, muon"):
    optimizers.main(["optimizers", "--optimizers=sgd"])
