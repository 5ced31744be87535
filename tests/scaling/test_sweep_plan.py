import dataclasses
import json
import time

import numpy as np
import pytest

from deepseek_jax.errors import ConfigError
from deepseek_jax.flags import load_config
from deepseek_jax.scaling.laws import hyperparam_law
from deepseek_jax.scaling.shapes import MoEVariant
from deepseek_jax.scaling.sweep_plan import SweepOptions, load_plan, plan_sweep

BUDGETS = tuple(np.geomspace(1e17, 3e20, 8).tolist())


def test_deepseek_s_eighty_runs_in_under_five_seconds():
  start = time.process_time()
  plan = plan_sweep(load_config("7b"), hyperparam_law("deepseek"), SweepOptions(BUDGETS))
  assert time.process_time() - start < 5
  assert len(plan.runs) == 80 and not plan.left_out
  for run in plan.runs:
    assert abs(run.flops / run.budget - 1) <= 0.01 and run.steps >= 300
    assert run.tokens == run.steps * run.batch_tokens and run.flops == pytest.approx(run.M * run.tokens, rel=1e-12)
    assert run.batch_tokens == pytest.approx(0.2920 * run.budget**0.3271, rel=0.05)
    assert run.lr == pytest.approx(0.3118 * run.budget**-0.125, rel=1e-4)
    config = plan.config(run)
    assert config.train.steps == config.schedule.steps == run.steps and config.schedule.tokens == 0
    assert config.train.global_batch * config.data.seq == run.batch_tokens
    assert config.schedule.warmup_steps <= run.steps // 10 and config.name == run.run_id
  for budget in BUDGETS:
    scales = sorted(run.M for run in plan.runs if run.budget == budget)
    grid = 0.1715 * budget**0.5243 * np.geomspace(1 / 4, 4, 10)
    assert np.abs(np.array(scales) / grid - 1).max() <= 0.2


def test_seeds_grids_and_scales_of_a_small_sweep():
  base = load_config("small_dense", {"data.seq": 128})
  options = SweepOptions((3e11, 1e12), 5, seeds=3, grid_budget=1e12, lr_scale=0.5, batch_multiple=2)
  plan = plan_sweep(base, hyperparam_law("deepseek"), options)
  center = [run for run in plan.runs if run.budget == 1e12 and "lr" not in run.run_id]
  assert sum(run.seed > 0 for run in plan.runs) == 4 and len({run.M for run in center}) == 5
  grid = [run for run in plan.runs if "lr" in run.run_id]
  assert len(grid) == 8 and len({run.M for run in grid}) == 1
  assert len({(run.lr, run.batch_tokens) for run in grid}) == 8
  assert all(run.batch_tokens % (2 * 128) == 0 for run in plan.runs)
  assert all(run.lr == pytest.approx(0.5 * 0.3118 * 1e12**-0.125, rel=1e-4) for run in center)
  merged = plan_sweep(base, hyperparam_law("deepseek"), SweepOptions((3e11,), 20, span=2.0))
  assert len(merged.runs) + len(merged.left_out) == 20
  assert any("the nearest shape is that of 3e11" in line for line in merged.left_out)
  short = plan_sweep(base, hyperparam_law("deepseek"), SweepOptions((1e8,), 3))
  assert not short.runs and len(short.left_out) == 3


def test_what_is_counted_in_tokens_goes_with_the_length():
  one_device = dict.fromkeys(("mesh.expert", "mesh.stage", "mesh.fsdp", "mesh.tensor", "mesh.context"), 1)
  base = load_config("v3", one_device | {"train.microbatch": 32, "train.global_batch": 15_360})
  run = plan_sweep(base, hyperparam_law("steplaw"), SweepOptions((1e19,), 1)).runs[0]
  config = plan_sweep(base, hyperparam_law("steplaw"), SweepOptions((1e19,), 1)).config(run)
  fraction = run.tokens / base.schedule.tokens
  assert config.mtp.tokens[0] == pytest.approx(base.mtp.tokens[0] * fraction, rel=0.01)
  assert config.balance.bias_update_tokens == pytest.approx(base.balance.bias_update_tokens * fraction, rel=0.01)
  assert config.train.batch_ramp_from == 0
  assert config.train.global_batch == 2 * config.train.microbatch <= 64


def test_a_ladder_of_experts_has_the_same_budgets():
  variants = (MoEVariant(8, 2), MoEVariant(16, 4))
  plan = plan_sweep(load_config("small"), hyperparam_law("deepseek"), SweepOptions((3e12,), 3, variants=variants))
  assert {(run.experts, run.granularity) for run in plan.runs} == {(8, 2), (16, 4)}
  assert all(run.params > run.params_active > run.params_nonembedding for run in plan.runs)


def test_a_plan_is_read_as_it_was_written(tmp_path):
  plan = plan_sweep(load_config("small_dense"), hyperparam_law("deepseek"), SweepOptions((1e12,), 2))
  path = tmp_path / "plan.json"
  plan.save(path)
  read = load_plan(path)
  assert [read.config(run) for run in read.runs] == [plan.config(run) for run in plan.runs]
  assert [dataclasses.replace(run, overrides={}) for run in read.runs] == [
    dataclasses.replace(run, overrides={}) for run in plan.runs
  ]
  read.save(path)
  assert load_plan(path) == read


@pytest.mark.parametrize(
  ("damage", "expected"),
  [
    (lambda tree: tree.update(version=9), "no plan of version 1"),
    (lambda tree: tree.pop("law"), "damaged"),
    (lambda tree: tree["runs"][0].pop("M"), "damaged"),
    (lambda tree: tree["runs"][0].update(run_id="../x"), "no name of a folder"),
    (lambda tree: tree["runs"].append(tree["runs"][0]), "there twice"),
    (lambda tree: tree["runs"][0]["overrides"].update({"train.stepz": 3}), "train.stepz"),
  ],
)
def test_damaged_plans_are_refused(tmp_path, damage, expected):
  path = tmp_path / "plan.json"
  plan_sweep(load_config("small_dense"), hyperparam_law("deepseek"), SweepOptions((1e12,), 2)).save(path)
  tree = json.loads(path.read_text())
  damage(tree)
  path.write_text(json.dumps(tree))
  with pytest.raises(ConfigError, match=expected):
    load_plan(path)


def test_options_are_checked():
  with pytest.raises(ConfigError, match="--budgets must be positive"):
    SweepOptions((1e17, -1.0))
  with pytest.raises(ConfigError, match="--grid_budget=2e"):
    SweepOptions((1e17,), grid_budget=2e17)
