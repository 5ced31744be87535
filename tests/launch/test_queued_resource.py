"""launch/queued_resource.sh, with a gcloud whose queued resources go through the states of the documentation."""

import pytest

SCRIPT = ("sh", "launch/queued_resource.sh")
RUN = ("run", "q", "--zone=z", "--type=v5p-1024", "--poll=0", "--repository=url")
TRAIN = ("--", "--config=67b", "--workdir=gs://b/67b")


def verbs(cluster):
  """The commands of gcloud that were called, shortest form, without descriptions."""
  return [" ".join(call[3:5]).removeprefix("queued-resources ") for call in cluster.calls() if "describe" not in call]


def test_one_command_creates_waits_installs_and_starts(cluster):
  out = cluster.run(*SCRIPT, *RUN, "--spot", "--service_account=a@b", "--max_restarts=9", *TRAIN)
  assert out.splitlines() == ["q: PROVISIONING", "q: ACTIVE"]
  assert verbs(cluster) == ["create", "ssh", "ssh"]
  create, install, start = (call for call in cluster.calls() if "describe" not in call)
  assert create[5:] == [
    "q", "--node-id=q", "--accelerator-type=v5p-1024", "--runtime-version=v2-alpha-tpuv5", "--service-account=a@b",
    "--spot", "--zone=z",
  ]  # fmt: skip
  assert {"--node=all", "--worker=all", "--zone=z"} <= set(install) & set(start)
  assert any("git clone -q 'url'" in word for word in install)
  assert any(word.endswith("start '9' 'yes' '--config=67b' '--workdir=gs://b/67b'") for word in start)


def test_one_that_is_there_is_used_and_several_slices_are_one_resource(cluster):
  (cluster.state / "states").write_text("ACTIVE")
  cluster.run(*SCRIPT, *RUN, *TRAIN)
  assert verbs(cluster) == ["ssh", "ssh"]
  options = ("--slices=2", "--reserved", "--project=p", "--startup_script=launch/gpu.sh")
  cluster.run(*SCRIPT, "create", "two", "--type=v5p-256", *options)
  expected = {"--node-count=2", "--node-prefix=two", "--reserved", "--metadata-from-file=startup-script=launch/gpu.sh"}
  assert expected < set(cluster.calls()[-1])


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDING\nSUSPENDED"])
def test_one_whose_slices_were_taken_away_is_created_anew(cluster, state):
  (cluster.state / "states").write_text(state)
  out = cluster.run(*SCRIPT, *RUN, *TRAIN)
  assert "so it is created anew" in out and verbs(cluster) == ["delete", "create", "ssh", "ssh"]


def test_waiting_ends_where_it_would_never(cluster):
  assert "there is no queued resource q in z: create it first" in cluster.run(*SCRIPT, "wait", "q", "--zone=z", code=2)
  (cluster.state / "states").write_text("PROVISIONING\nFAILED")
  out = cluster.run(*SCRIPT, "wait", "q", "--poll=0", code=2)
  assert out.splitlines() == [
    "q: PROVISIONING", "q: FAILED", "error: q is FAILED and will not be ACTIVE: `run` creates it anew",
  ]  # fmt: skip


def test_deleting_takes_the_slices_along(cluster):
  (cluster.state / "states").write_text("ACTIVE")
  cluster.run(*SCRIPT, "delete", "q", "--zone=z")
  assert not (cluster.state / "states").exists()


def test_status_and_the_like_are_those_of_tpu_vm(cluster):
  cluster.run(*SCRIPT, "log", "q", "--worker=3")
  assert {"--node=0", "--worker=3"} < set(cluster.calls()[0])
  cluster.run(*SCRIPT, "stop", "q")
  assert cluster.calls()[1][-1].endswith("on-host stop")


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    ([], "say what to do"),
    (["begin", "q"], "begin is none of run"),
    (["create"], "name the queued resource"),
    (["create", "q"], "--type=TYPE says which slices"),
    (["create", "q", "--type=v5p-8", "--startup_script=mount.sh"], "--startup_script=mount.sh is no file"),
    (["create", "q", "--type=v5p-8", "--cheap"], "--cheap is no option here"),
    (["create", "q", "--type", "v5p-8"], "write --type=VALUE, with ="),
    (["run", "q", "--type=v5p-8", *TRAIN], "--repository=URL says where"),
    ([*RUN, "--"], "say what to train"),
  ],
)
def test_what_is_missing_or_wrong_is_named_before_anything_is_rented(cluster, arguments, says):
  out = cluster.run(*SCRIPT, *arguments, code=2)
  assert out.startswith("error: ") and says in out and not cluster.calls()


def test_an_error_of_gcloud_is_no_missing_resource(cluster, tmp_path):
  broken = tmp_path / "broken"
  broken.mkdir()
  (broken / "gcloud").write_text("#!/bin/sh\necho 'ERROR: PERMISSION_DENIED' >&2\nexit 1\n")
  (broken / "gcloud").chmod(0o755)
  out = cluster.run(*SCRIPT, *RUN, *TRAIN, code=2, PATH=f"{broken}:/usr/bin:/bin")
  assert "gcloud cannot describe q: ERROR: PERMISSION_DENIED" in out and not cluster.calls()
