import pathlib
import subprocess

from deepseek_jax.training import run_log
from deepseek_jax.training.run_log import code_commit


def test_the_commit_of_a_checkout_is_known_and_nothing_without_one(tmp_path, monkeypatch):
  file = tmp_path / "deepseek_jax" / "training" / "run_log.py"
  file.parent.mkdir(parents=True)
  file.touch()
  monkeypatch.setattr(run_log, "__file__", str(file))
  assert code_commit() == {}

  def git(*arguments):
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    command = ["git", "-C", str(tmp_path), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

  git("init", "-q")
  git("add", ".")
  git("commit", "-q", "-m", "first")
  git("tag", "a-tag")
  assert code_commit() == {"commit": git("rev-parse", "HEAD")}
  file.write_text("changed")
  assert code_commit() == {"commit": git("rev-parse", "HEAD") + "-dirty"}
  monkeypatch.setenv("PATH", str(pathlib.Path(tmp_path, "nothing")))  # no git here
  assert code_commit() == {}
