"""The command line's plan, and what it says of wrong flags; run and table are in test_sweep_runs.py."""

import json
import subprocess
import sys

import numpy as np
import pytest

from deepseek_jax.errors import ConfigError
from deepseek_jax.scaling.__main__ import COMMANDS, main
from deepseek_jax.scaling.commands import parse_budgets, plan
from deepseek_jax.scaling.sweep_plan import load_plan
from tests.scaling import tables


def test_budgets_are_a_log_grid_or_a_list():
  assert parse_budgets("1e17:3e20:8") == pytest.approx(np.geomspace(1e17, 3e20, 8), rel=1e-3)
  assert parse_budgets("3e12,1e12") == (1e12, 3e12)
  for text in ("1e17:3e20", "3e20:1e17:8", "many", "1e17:3e20:0", ""):
    with pytest.raises(ConfigError, match="--budgets="):
      parse_budgets(text)


def test_a_plan_is_shown_and_written_for_programs(tmp_path, capsys):
  out = tmp_path / "sweep.json"
  assert plan(["plan", "--budgets=1e17:3e20:8", "--per_budget=10", "--seq=4096", "--law=deepseek", f"--out={out}"]) == 0
  shown = capsys.readouterr().out
  assert "80 runs, 4.402e+21 FLOPs; learning rates and batches by deepseek" in shown and f"wrote    {out}" in shown
  assert len(load_plan(out).runs) == 80
  assert plan(["plan", "--config=small_dense", "--budgets=1e12", "--per_budget=2", "--span=2", "--json=-"]) == 0
  tree = json.loads(capsys.readouterr().out)
  assert (
    len(tree["runs"]) == 2 and tree["cost"]["flops"] == pytest.approx(2e12, rel=0.01) and tree["cost"]["hours"] is None
  )


def test_the_size_for_a_number_of_tokens(capsys):
  assert plan(["plan", "--tokens=2e12", "--json=-"]) == 0
  advice = json.loads(capsys.readouterr().out)
  assert advice["flops"] == pytest.approx((2e12 / 5.8316) ** (1 / 0.4757), rel=0.01)
  assert advice["scale_interval"] is None
  assert plan(["plan", "--tokens=2e12", "--json=-", f"--table={tables.S3}", f"--columns={tables.S3_COLUMNS}"]) == 0
  refitted = json.loads(capsys.readouterr().out)
  low, high = refitted["scale_interval"]
  assert low < refitted["scale"] < high and refitted["scale"] == pytest.approx(advice["scale"], rel=0.1)


def test_the_size_and_the_cost_in_hours_of_a_topology(capsys):
  assert plan(["plan", "--hours=24", "--topology=v5p:4x4x4", "--json=-"]) == 0
  advice = json.loads(capsys.readouterr().out)
  rate = advice["flops"] / (24 * 3600)
  assert 0.1 < rate / (64 * 459e12) < 0.9
  assert plan(["plan", "--budgets=1e20", "--per_budget=1", "--topology=v5p:2x2x1", "--json=-"]) == 0
  cost = json.loads(capsys.readouterr().out)["cost"]
  assert cost["hours"] == pytest.approx(1e20 / cost["flops_per_second"] / 3600, rel=0.01)


@pytest.mark.parametrize(
  ("flags", "expected"),
  [
    ([], "--budgets is required"),
    (["--budgets=1e18", "--law=kaplan"], "expected one of deepseek, steplaw, or a file"),
    (["--budgets=1e3"], "no run is possible"),
    (["--tokens=1e9", "--hours=3"], "exclude each other"),
    (["--hours=3"], "needs --topology"),
    (["--tokens=-5"], "--tokens=-5.0: expected a positive number"),
    (["--hours=nan", "--topology=v5p:2x2x1"], "expected a positive number"),
    (["--budgets=1e18", "--config.stages=[{'name': 'a', 'until_tokens': 9}]"], "has stages of training"),
    (["--budgets=1e18", "--experts=2.5"], "--experts=2.5: expected whole numbers"),
    (["--budgets=1e18", "--experts=8"], "need a base config"),
    (["--budgets=1e18", "--per_budgets=3"], "did you mean --per_budget"),
    (["--preregister=runs.csv"], "needs --plan=FILE"),
    (["--budgets=1e18", "--grid_lr=a"], "--grid_lr=a: expected numbers"),
    (["--budgets=1e18", "--out=/nowhere/plan.json"], "--out=/nowhere/plan.json cannot be written"),
  ],
)
def test_wrong_flags_say_what_to_do(flags, expected):
  with pytest.raises(ConfigError, match=expected):
    plan(["plan", *flags])


def test_every_command_has_help_with_an_example(capsys):
  for command in COMMANDS:
    with pytest.raises(SystemExit) as exit:
      main(["scaling", command, "--help"])
    assert exit.value.code == 0
    assert f"python -m deepseek_jax.scaling {command}" in capsys.readouterr().out
  assert main(["scaling", "--help"]) == 0
  for argv, got in ((["scaling"], "got none"), (["scaling", "fti"], "got 'fti'")):
    with pytest.raises(ConfigError, match=f"a command is needed: plan, run, table, fit, hparams, report; {got}"):
      main(argv)


def test_a_user_error_is_one_line_and_exit_code_2():
  command = [sys.executable, "-m", "deepseek_jax.scaling", "fit", "--table=none.csv"]
  result = subprocess.run(command, capture_output=True, text=True, check=False)
  assert result.returncode == 2 and result.stdout == ""
  assert result.stderr == "error: --table=none.csv cannot be read: No such file or directory\n"
