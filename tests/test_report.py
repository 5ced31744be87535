import json
import re
import signal
import subprocess
import sys
import urllib.request

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


def test_it_serves_until_ctrl_c(tmp_path):
  """A real process and a real request."""
  (tmp_path / "config.json").write_text('{"name": "early"}')
  command = [sys.executable, "-m", "deepseek_jax.report", f"--workdir={tmp_path}", "--serve", "--port=0"]
  process = subprocess.Popen(
    command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where the tests run in the background
  )  # fmt: skip
  try:
    url = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())[0]
    with urllib.request.urlopen(url, timeout=60) as response:
      assert "no step was logged" in response.read().decode()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
  finally:
    process.kill()
  assert (process.returncode, out, err) == (0, "\n", "")
  assert not (tmp_path / "report.html").exists()


def test_what_cannot_be_served_is_named(tmp_path):
  with pytest.raises(DataError, match="name the folder of a run"):
    report.main(["report", f"--workdir={tmp_path}", "--serve"])
  with pytest.raises(ConfigError, match="--serve takes a local folder, got gs://bucket/run"):
    report.main(["report", "--workdir=gs://bucket/run", "--serve"])
  with pytest.raises(ConfigError, match="port"):
    report.main(["report", f"--workdir={tmp_path}", "--serve", "--port=70000"])
