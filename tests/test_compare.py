import importlib
import json
import subprocess
import sys

import pytest

from deepseek_jax.errors import ConfigError
from tests.compare.records import write_run, write_seeds

program = importlib.import_module("deepseek_jax.compare.__main__")


def test_the_program_writes_text_a_page_and_json(tmp_path, capsys):
  write_seeds(tmp_path, "a", {0: 4.0, 1: 4.1})
  write_seeds(tmp_path, "b", {0: 5.0, 1: 5.1}, {"schedule.peak": 0.5})
  (tmp_path / "torn").mkdir()
  (tmp_path / "torn" / "config.json").write_text("{")
  page, file = tmp_path / "compare.html", tmp_path / "compare.json"
  assert program.main(["compare", str(tmp_path), "--x=tokens", f"--out={page}", f"--json={file}"]) == 0
  out, err = capsys.readouterr()
  assert "4 runs in 2 groups of seeds" in out and f"wrote    {page}" in out
  assert err.startswith(f"passed over {tmp_path}/torn: ") and err.count("\n") == 1
  assert page.read_text().startswith("<!doctype html>") and not list(tmp_path.glob("*.partial"))
  assert json.loads(file.read_text())["x"] == "tokens"


def test_json_to_stdout_is_alone(tmp_path, capsys):
  write_run(tmp_path / "a")
  assert program.main(["compare", f"{tmp_path}/a", "--json=-", f"--out={tmp_path}/page.html"]) == 0
  assert json.loads(capsys.readouterr().out)["groups"][0]["runs"][0]["name"] == "a"


def test_a_verdict_takes_two_places_after_its_flag(tmp_path, capsys):
  write_seeds(tmp_path, "a", {0: 4.0, 1: 4.1, 2: 4.0})
  write_seeds(tmp_path, "b", {0: 5.0, 1: 5.1, 2: 5.0}, {"schedule.peak": 0.5})
  assert program.main(["compare", "--verdict", f"{tmp_path}/b-*", f"{tmp_path}/a-*"]) == 0
  assert "B is better: peak=0.02" in capsys.readouterr().out


def test_arguments_are_checked(tmp_path):
  write_run(tmp_path / "a")
  with pytest.raises(ConfigError, match="name the folders of runs"):
    program.main(["compare"])
  with pytest.raises(ConfigError, match="did you mean --metric"):
    program.main(["compare", str(tmp_path), "--metrics=loss"])
  with pytest.raises(ConfigError, match="cannot be written"):
    program.main(["compare", str(tmp_path), f"--out={tmp_path}/none/page.html"])
  with pytest.raises(ConfigError, match="--out=page.txt must end in .html"):
    program.main(["compare", str(tmp_path), "--out=page.txt"])


def test_neither_help_nor_a_comparison_imports_jax(tmp_path):
  write_run(tmp_path / "a")
  code = (
    "import importlib, sys; main = importlib.import_module('deepseek_jax.compare.__main__').main\n"
    f"main(['compare', {str(tmp_path)!r}]); sys.exit('jax' in sys.modules)"
  )
  subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
