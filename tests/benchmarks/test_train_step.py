"""The timing of a training step, at a size that takes seconds."""

from tests.benchmarks.programs import benchmark


def test_train_step():
  sizes = ("model.embed=32", "model.layers=1", "model.num_mtp_layers=0", "model.mlp=48", "data.seq=32")
  out, _ = benchmark("train_step", "--steps=1", *(f"--config.{size}" for size in (*sizes, "train.global_batch=2")))
  for words in (
    "config            tiny on 1 x cpu", "wall time/step", "CPU time/step", "tokens/s", "model FLOP/s", "matmul roof", "compile  ",
    "peak memory",
  ):  # fmt: skip
    assert words in out, words
