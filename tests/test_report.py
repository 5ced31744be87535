import json

import pytest

from deepseek_jax import report
from deepseek_jax.errors import ConfigError, DataError


def test_a_run_that_goes_on_has_a_report_at_any_time(tmp_path, capsys):
  (tmp_path / "config.json").write_text('{"name": "early"}')
  (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 3, "loss": 2.5}) + "\n" + '{"step": 4, "lo')
  assert report.main(["report", f"--workdir={tmp_path}"]) == 0
  path = tmp_path / "report.html"
  assert capsys.readouterr().out == f"{path}\n" and "2.5 at step 3" in path.read_text()


def test_a_folder_without_a_run_is_named(tmp_path):
  with pytest.raises(DataError, match="name the folder of a run"):
    report.main(["report", f"--workdir={tmp_path}"])
  with pytest.raises(ConfigError, match="--workdir=DIR says of which run"):
    report.main(["report"])
  (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3"}')
  with pytest.raises(DataError, match="that of a Hugging Face folder; name the folder of a run"):
    report.main(["report", f"--workdir={tmp_path}"])
  assert not (tmp_path / "report.html").exists()
