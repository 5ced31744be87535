"""Hosts and clusters that are not there: the stand-ins of tests/launch/fakes.py on PATH."""

import pathlib
import shutil
import subprocess
import sys
import time

import pytest

from tests.launch import fakes

ROOT = pathlib.Path(__file__).parents[2]
# In place of deepseek_jax.train: shows its arguments, writes to `pid`, and waits for SIGTERM.
TRAIN = """
import os, pathlib, signal, sys, time
print("trains", *sys.argv[1:], flush=True)
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(143)))
pathlib.Path("pid").write_text(str(os.getpid()))
while True: time.sleep(0.05)
"""


class Cluster:
  """`state`: the folder of the stand-ins. `run` and `start` run a script of launch/ with them on PATH."""

  def __init__(self, folder):
    self.state = folder / "state"
    self.env = fakes.install(folder / "bin", self.state)

  def start(self, *command, cwd=ROOT, **variables):
    return subprocess.Popen(
      command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=self.env | variables
    )

  def run(self, *command, code=0, **options):
    """What a command prints that ends with `code`."""
    process = self.start(*command, **options)
    out, _ = process.communicate(timeout=100)
    assert process.returncode == code, out
    return out

  def calls(self):
    return fakes.calls(self.state)

  def make_hosts(self, count, folder):
    """Hosts that have what an installation needs: uv. Returns the address of a repository with the scripts."""
    repository = folder / "repository"
    (repository / "deepseek_jax").mkdir(parents=True)
    shutil.copytree(ROOT / "launch", repository / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    (repository / "deepseek_jax" / "train.py").write_text(TRAIN)
    identity = ("-c", "user.name=x", "-c", "user.email=x@example.com")
    for command in (["init", "-q", "-b", "main"], ["add", "."], [*identity, "commit", "-q", "-m", "x"]):
      subprocess.run(["git", *command], cwd=repository, check=True)
    (self.state / "workers").write_text(str(count))
    for host in range(count):
      uv = self.state / "hosts" / str(host) / ".local" / "bin" / "uv"
      uv.parent.mkdir(parents=True)
      uv.write_text(
        f'#!/bin/sh\n[ "$1" = pip ] || {{ mkdir -p .venv/bin && ln -s {sys.executable} .venv/bin/python; }}\n'
      )
      uv.chmod(0o755)
    return str(repository)

  def home(self, host):
    return self.state / "hosts" / str(host) / "deepseek_jax"


@pytest.fixture
def cluster(tmp_path):
  return Cluster(tmp_path)


def wait_for(condition, seconds=60):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.02)
