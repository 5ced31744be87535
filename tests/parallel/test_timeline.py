"""The drawn timeline is what the schedule says, also in the docs, and fits the terminal."""

import pathlib

import numpy as np
import pytest

from deepseek_jax.errors import ConfigError
from deepseek_jax.parallel.schedule import Schedule
from deepseek_jax.parallel.timeline import format_timeline, work_items
from deepseek_jax.plan.__main__ import main

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "explanation" / "pipeline.md"
ARGUMENTS = [
  "--timeline", "--config=tiny_dense", "--config.mesh.stage=2", "--config.parallel.virtual_stages=2",
  "--config.train.global_batch=8", "--config.train.microbatch=2",
]  # fmt: skip


def test_the_page_shows_what_the_program_prints(capsys, monkeypatch):
  monkeypatch.setenv("COLUMNS", "120")
  assert main(["plan", *ARGUMENTS]) == 0
  text = capsys.readouterr().out
  assert text == format_timeline(Schedule(2, 2, 4)) + "\n"
  assert f"```text\n{text}```" in PAGE.read_text(encoding="utf-8")


def test_cells_are_the_items():
  schedule = Schedule(3, 2, 5)
  lines = format_timeline(schedule).splitlines()
  start, width = len("stage 0 backward"), 4
  rows = {line[:start].strip(): line[start:] for line in lines[3:]}
  cells = {name: [text[i : i + width].strip() for i in range(0, len(text), width)] for name, text in rows.items()}
  assert cells["tick"] == [str(tick) for tick in range(schedule.ticks)]
  for name, items in zip(("forward", "backward"), work_items(schedule), strict=True):
    for stage in range(3):
      row = cells[f"stage {stage} {name}"]
      for tick in np.flatnonzero(items.exists[stage]):
        assert row[tick] == f"{items.microbatch[stage, tick]}.{items.virtual_stage[stage, tick]}"
      assert sum("." in cell and cell != "." for cell in row) == items.exists[stage].sum() == 10
      assert row.count(".") == schedule.pass_ticks - 10
  assert rows["loss"].split() == ["0-2", "3-4"]


def test_a_wide_timeline_is_cut_in_the_middle():
  schedule = Schedule(4, 2, 240)
  *rows, note = format_timeline(schedule, 100).splitlines()
  assert all(len(row) <= 100 for row in rows[2:])
  ticks = rows[3].split("tick")[1].split()
  gap = ticks.index("...")
  assert ticks[:2] == ["0", "1"] and ticks[-1] == str(schedule.ticks - 1)
  assert note.startswith(f"...: ticks {gap} to {int(ticks[gap + 1]) - 1}; all are ")
  columns = int(note.split()[-3])
  whole = format_timeline(schedule, columns)
  assert "..." not in whole and max(map(len, whole.splitlines())) == columns
  assert "..." in format_timeline(schedule, columns - 1)


@pytest.mark.parametrize("stages", [1, -1])
def test_without_a_pipeline_there_is_none(stages):
  with pytest.raises(ConfigError, match=f"mesh.stage={stages}: set the number of stages"):
    main(["plan", "--timeline", "--config=tiny_dense", f"--config.mesh.stage={stages}", "--config.mesh.data=1"])
