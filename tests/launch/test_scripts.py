"""Every script of launch/: what shellcheck says, and that the commands in docs/launch.md are understood."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from tests.launch.conftest import ROOT

SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / "launch" / "slurm.sbatch"]
SHELLCHECK = shutil.which("shellcheck", path=pathlib.Path(sys.executable).parent)


def shellcheck(text):
  """What shellcheck says of a script; nothing of one that is good."""
  done = subprocess.run([SHELLCHECK, "-"], input=text, capture_output=True, text=True, timeout=60)
  return done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_shellcheck_and_the_shell_find_nothing(script):
  assert shellcheck(script.read_text()) == ""
  shell = script.read_text().splitlines()[0].rpartition("/")[2]
  done = subprocess.run([shell, "-n", script], capture_output=True, text=True)
  assert done.returncode == 0 and not done.stderr


def test_shellcheck_finds_a_word_that_splits():
  assert "SC2086" in shellcheck("#!/bin/sh\nrm $1\n")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_help_needs_nothing(script, cluster):
  shell = script.read_text().splitlines()[0].rpartition("/")[2]
  for flag in ("--help", "-h"):
    out = cluster.run(f"/bin/{shell}", str(script), flag, PATH="/usr/bin:/bin")
    assert script.name in out and not cluster.calls()


def commands(page):
  """The commands in the code blocks of a page, each on one line."""
  blocks = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
  return [
    line.strip()
    for language, block in blocks
    if not language
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
  ]


LAUNCH_COMMANDS = [
  command
  for command in commands(ROOT / "docs" / "launch.md")
  if re.match(r"(gcloud|kubectl|sbatch|scancel|squeue|sh launch/)", command)
]


@pytest.mark.parametrize("command", LAUNCH_COMMANDS, ids=lambda command: " ".join(command.split()[:5]))
def test_a_command_of_the_documentation_is_understood(cluster, command, tmp_path):
  if "delete" in command or "status" in command:
    (cluster.state / "states").write_text("ACTIVE")
  (tmp_path / "mount.sh").touch()
  command = command.replace("mount.sh", str(tmp_path / "mount.sh"))
  cluster.run("sh", "-c", command.replace(" run QUEUE ", " run QUEUE --poll=0 "))
  assert cluster.calls(), command


def test_the_documentation_shows_every_launcher():
  programs = {" ".join(command.split()[:2]) for command in LAUNCH_COMMANDS}
  assert {
    "sh launch/tpu_vm.sh",
    "sh launch/queued_resource.sh",
    "kubectl apply",
    "sbatch launch/slurm.sbatch",
  } <= programs
