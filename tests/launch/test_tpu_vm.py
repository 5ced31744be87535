"""launch/tpu_vm.sh, with a gcloud that runs the commands of the hosts here."""

import os
import signal
import subprocess

import pytest

from tests.launch.conftest import wait_for

SCRIPT = ("sh", "launch/tpu_vm.sh")


def test_a_run_is_installed_started_watched_and_stopped_on_every_host(cluster, tmp_path):
  url = cluster.make_hosts(2, tmp_path)
  try:
    for _ in range(2):  # the second one updates
      out = cluster.run(*SCRIPT, "install", "pod", "--zone=z", "--project=p", f"--repository={url}")
      assert out.count("installed ") == 2
    arguments = ["--config=67b", "--workdir=gs://b/it's here", "--config.data.sources=gs://b/*.zst"]
    assert cluster.run(*SCRIPT, "start", "pod", "--zone=z", "--", *arguments).count("started, pid") == 2
    pids = [pid_of(cluster, host) for host in range(2)]
    assert cluster.run(*SCRIPT, "start", "pod", "--", *arguments).count("runs already") == 2
    assert cluster.run(*SCRIPT, "install", "pod", f"--repository={url}").count("runs, so its code stays") == 2
    out = cluster.run(*SCRIPT, "status", "pod")
    assert out.count(": runs, pid") == 2 and out.count("trains " + " ".join(arguments)) == 2

    log = cluster.start(*SCRIPT, "log", "pod", "--worker=1")
    assert "trains --config=67b" in log.stdout.readline()
    log.kill()

    os.kill(pids[0], signal.SIGKILL)  # the first host's process dies, and comes back
    wait_for(lambda: "restart 1 of 20 in 10 s" in (cluster.home(0) / "train.log").read_text())
    assert cluster.run(*SCRIPT, "stop", "pod").count("told to save and stop") == 2
    wait_for(lambda: cluster.run(*SCRIPT, "status", "pod").count("does not run") == 2)
    assert (cluster.home(1) / "train.log").read_text().endswith("saved\n")
    assert cluster.run(*SCRIPT, "stop", "pod").count("does not run") == 2
    assert cluster.run(*SCRIPT, "start", "pod", "--if_new", "--", *arguments).count("has ended: `start` starts") == 2
  finally:
    for host in range(2):
      subprocess.run(["sh", "launch/tpu_vm.sh", "on-host", "stop"], cwd=cluster.home(host), capture_output=True)
  assert {tuple(call[:5]) for call in cluster.calls()} == {("gcloud", "compute", "tpus", "tpu-vm", "ssh")}
  assert {"--zone=z", "--project=p", "--worker=all"} <= set(cluster.calls()[0])


def pid_of(cluster, host):
  path = cluster.home(host) / "pid"
  wait_for(lambda: path.exists() and path.read_text())
  return int(path.read_text())


def test_the_budget_reaches_the_supervisor(cluster):
  cluster.run(*SCRIPT, "start", "pod", "--max_restarts=7", "--queued", "--", "--config=67b")
  (call,) = cluster.calls()
  assert call[:6] == ["gcloud", "compute", "tpus", "queued-resources", "ssh", "pod"] and "--node=all" in call
  assert call[-1] == "--command=cd deepseek_jax && sh launch/tpu_vm.sh on-host start '7' '' '--config=67b'"


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    ([], "say what to do"),
    (["begin", "pod"], "begin is none of install"),
    (["start"], "name the TPU"),
    (["start", "--zone=z"], "name the TPU"),
    (["start", "pod"], "say what to train"),
    (["start", "pod", "--config=67b"], "--config=67b is no option here; arguments of deepseek_jax.train come after --"),
    (["install", "pod", "--zone", "z"], "write --zone=VALUE, with ="),
    (["install", "pod"], "--repository=URL says where"),
  ],
)
def test_what_is_missing_or_wrong_is_named(cluster, arguments, says):
  out = cluster.run(*SCRIPT, *arguments, code=2)
  assert out.startswith("error: ") and says in out and not cluster.calls()


def test_a_machine_without_gcloud_is_told(cluster, tmp_path):
  out = cluster.run("/bin/sh", SCRIPT[1], "status", "pod", code=2, PATH=str(tmp_path))
  assert "gcloud is not on PATH: install" in out


def test_a_gcloud_that_fails_ends_the_script(cluster):
  (cluster.state / "workers").write_text("1")
  (cluster.state / "hosts" / "0").mkdir(parents=True)
  cluster.run(*SCRIPT, "status", "pod", code=2)  # nothing is installed there
