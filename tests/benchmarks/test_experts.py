"""The cost of a step by the number of experts, and its verdict."""

import pytest

from benchmarks import experts
from tests.benchmarks.programs import benchmark


def test_experts():
  sizes = (
    "model.embed=32", "model.layers=1", "model.first_dense_layers=0", "model.num_mtp_layers=0", "model.vocab=272",
    "model.moe.mlp=16", "data.seq=32",
  )  # fmt: skip
  arguments = [f"--config.{size}" for size in (*sizes, "train.global_batch=2")]
  out, _ = benchmark("experts", "--steps=1", *arguments, codes=(0, 1))  # no time is to be relied on at this size
  assert [line.split()[0] for line in out.splitlines()] == ["experts", "8", "16", "32", "64"]


@pytest.mark.parametrize(
  ("wall", "cpu", "flops", "code"), [(1.5, 1.5, 1.2, 0), (1.7, 1, 1, 1), (1, 1.7, 1, 1), (1, 1, 1.4, 1)]
)
def test_experts_fails_where_more_of_them_cost_more(monkeypatch, capsys, wall, cpu, flops, code):
  def timed(config, steps):
    many = config.model.moe.num_routed_experts == 32
    times = (wall, cpu, flops) if many else (1, 1, 1)
    return {"wall": [times[0]], "cpu": [times[1]], "cost": {"flops": times[2]}}

  monkeypatch.setattr(experts, "time_steps", timed)
  assert experts.main(["experts", "--config.train.global_batch=4"]) == code
  assert capsys.readouterr().out.count("TOO MUCH") == code
