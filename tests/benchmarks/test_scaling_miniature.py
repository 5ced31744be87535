import json

import numpy as np
import pytest

from benchmarks.scaling_miniature import PLANS, config_flags, summary, write_text
from deepseek_jax.errors import ConfigError
from deepseek_jax.scaling import commands
from deepseek_jax.scaling.sweep_plan import load_plan
from tests.scaling import tables


def test_the_text_has_every_file_and_as_much_noise_as_it_says(tmp_path):
  for package in ("torch", "transformers"):
    folder = tmp_path / "env" / "lib" / "python3.11" / "site-packages" / package / "sub"
    folder.mkdir(parents=True)
    (folder / "a.py").write_text("x = 'é'\n" * 500)
    (folder / "b.txt").write_text("no")
  record = write_text(tmp_path / "env", tmp_path / "w")
  assert record["files"] == 2 and record["bytes"] == 2 * 500 * 8
  clean, noise = (
    [json.loads(line)["text"] for line in (tmp_path / "w" / f"{name}.jsonl").read_text().splitlines()]
    for name in ("clean", "noise")
  )
  pairs = [(a, b) for x, y in zip(clean, noise, strict=True) for a, b in zip(x, y, strict=True)]
  assert np.mean([a != b for a, b in pairs]) == pytest.approx(0.3 * 94 / 95, abs=0.02)
  assert write_text(tmp_path / "none", tmp_path / "w") == record  # it is there already
  with pytest.raises(ConfigError, match="make parity builds one"):
    write_text(tmp_path / "none", tmp_path / "other")


@pytest.mark.parametrize("sweep", PLANS)
def test_every_sweep_can_be_planned(tmp_path, sweep, capsys):
  out = tmp_path / "plan.json"
  flags = config_flags(sweep, tmp_path)
  commands.plan(["plan", *flags, "--budgets=1e12,1e13", *PLANS[sweep], f"--out={out}"])
  plan = load_plan(out)
  assert {run.budget for run in plan.runs} == {1e12, 1e13}
  assert all((run.experts > 0) == (sweep == "moe") for run in plan.runs)
  assert sum(run.seed > 0 for run in plan.runs) == (4 if sweep == "clean" else 0)
  assert plan.config(plan.runs[0]).data.sources[0].endswith("noise.jsonl" if sweep == "noise" else "clean.jsonl")


def test_the_summary_has_exponents_and_sweeps_beside_each_other(tmp_path):
  made = {}
  for sweep, factor in (("clean", 1.0), ("moe", 0.98)):
    columns = tables.isoflop_runs(np.array([1e12, 3e12, 1e13]), noise=0.001)
    columns |= {
      "val_bpb": columns.pop("val_loss") * factor,
      "budget": columns["flops"],
      "seconds": columns["tokens"] / 1e4,
    }
    made[sweep] = tables.made_table(tmp_path / f"{sweep}.csv", columns)
  text = summary(made)
  assert "| clean | 2 | 21 | 0." in text and "| moe | 3 | 21 | 0." in text
  assert text.count("| 1e+13 |") == 2
