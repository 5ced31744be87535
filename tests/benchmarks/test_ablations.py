"""Ablations go on where they were."""

from xml.etree import ElementTree

from tests.benchmarks.programs import benchmark


def test_ablations_go_on_where_they_were(text, tmp_path):
  sizes = (
    "model.embed=32", "model.layers=1", "model.first_dense_layers=0", "model.moe.mlp=16", "data.seq=32", "train.global_batch=2",
    f"data.sources={text}", f"data.cache={tmp_path}", "log.tensorboard=false", "sample.max_tokens=2",
  )  # fmt: skip
  arguments = (
    "--steps=2",
    "--seeds=1",
    "--variants=none",
    f"--workdir={tmp_path}/runs",
    f"--out={tmp_path}/curves.svg",
  )
  for expected in ("held-out loss", "finished already, at step 2"):
    out, _ = benchmark("ablations", *arguments, *(f"--config.{size}" for size in sizes))
    assert expected in out and out.splitlines()[-1].startswith("| none | ")
  ElementTree.parse(tmp_path / "curves.svg")
  _, err = benchmark("ablations", "--steps=1", *arguments[1:], *(f"--config.{size}" for size in sizes), codes=(2,))
  assert "train.steps: 2 there, 1 now" in err and "another --workdir" in err
  _, err = benchmark("ablations", "--variants=mlp", codes=(2,))
  assert "among mla, gqa" in err
