"""Whole runs whose files live in buckets: the command line, resume, data, and connections that break on the way."""

import json
import sys

import pytest

from deepseek_jax import flags, train
from deepseek_jax.checkpoint.bucket import BucketCheckpointer
from deepseek_jax.errors import CheckpointError, ConfigError, StorageError
from deepseek_jax.generate.__main__ import main as generate_main

BOTH = pytest.mark.parametrize("scheme", ["gs", "s3"])
CONFIG = dict(
  model=dict(vocab=264, embed=16, layers=2, mlp=32, attention=dict(kind="gqa", heads=2, kv_heads=1, head_dim=8)),
  data=dict(sources=["gs://bucket-a/text/*.txt"], seq=32, heldout_fraction=0.3),
  schedule=dict(kind="constant", peak=3e-3),
  train=dict(steps=6, global_batch=8),
  checkpoint=dict(every=2, keep=2),
  eval=dict(every=4, sequences=8, final_sequences=8),
  log=dict(every=1),
  sample=dict(max_tokens=2),
)  # fmt: skip


@pytest.fixture
def config(buckets, tmp_path, monkeypatch):
  """A config file whose text is in a bucket and whose cache is this test's."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  for i in range(12):
    buckets.put("bucket-a", f"text/{i}.txt", f"document {i} says {i * i} and {i + 1}. ".encode() * 20)
  path = tmp_path / "config.json"
  path.write_text(json.dumps(CONFIG))
  return f"--config={path}"


def run(*arguments):
  return train.main(["train", *arguments])


def digests(buckets, prefix):
  lines = buckets.objects["bucket-a"][f"{prefix}/events.jsonl"].content.splitlines()
  return [e["state_sha256"] for e in map(json.loads, lines) if e["event"] == "end" and "state_sha256" in e]


def metric_steps(buckets, prefix):
  return [
    json.loads(line)["step"] for line in buckets.objects["bucket-a"][f"{prefix}/metrics.jsonl"].content.splitlines()
  ]


@BOTH
def test_a_run_in_a_bucket_leaves_its_files_there_and_ends_as_one_on_disk(buckets, config, scheme, tmp_path, capsys):
  assert run(config, f"--workdir={scheme}://bucket-a/run") == 0
  assert f"report   {scheme}://bucket-a/run/report.html" in capsys.readouterr().out
  names = {name.removeprefix("run/") for name in buckets.objects["bucket-a"] if name.startswith("run/")}
  assert {"config.json", "metrics.jsonl", "events.jsonl", "report.html"} <= names
  assert any(name.startswith("tensorboard/") for name in names)
  for step in (4, 6):
    files = {"manifest.json", "meta/metadata", "state/manifest.ocdbt", "state/_METADATA"}
    assert {f"checkpoints/{step}/{file}" for file in files} <= names
  assert not any(name.startswith("checkpoints/2/") for name in names)
  assert metric_steps(buckets, "run") == [1, 2, 3, 4, 5, 6]
  local = tmp_path / "local"
  assert run(config, f"--workdir={local}") == 0
  ends = [json.loads(line) for line in (local / "events.jsonl").read_text().splitlines()]
  assert digests(buckets, "run") == [ends[-1]["state_sha256"]]


@BOTH
def test_the_workdir_alone_resumes_bitwise(buckets, config, scheme):
  url = f"--workdir={scheme}://bucket-a"
  assert run(config, f"{url}/whole") == 0
  assert run(config, f"{url}/run", "--config.train.steps=4") == 0
  assert run(f"{url}/run", "--config.train.steps=6") == 0
  assert digests(buckets, "run")[-1] == digests(buckets, "whole")[-1]
  assert metric_steps(buckets, "run") == [1, 2, 3, 4, 5, 6]
  assert b"resume" in buckets.objects["bucket-a"]["run/events.jsonl"].content


def test_generate_and_init_from_read_a_bucket(buckets, config, capsys):
  assert run(config, "--workdir=gs://bucket-a/run", "--config.train.steps=2") == 0
  assert generate_main(["generate", "--workdir=gs://bucket-a/run", "--prompt=doc", "--max_tokens=3"]) == 0
  assert "checkpoint of step 2 in gs://bucket-a/run" in capsys.readouterr().err
  assert run(config, "--workdir=s3://bucket-a/next", "--config.init_from=gs://bucket-a/run") == 0
  assert "start    from the weights in gs://bucket-a/run" in capsys.readouterr().out


def test_a_save_that_is_cut_is_one_error_and_the_run_resumes_from_the_one_before(buckets, config):
  assert run(config, "--workdir=gs://bucket-a/whole") == 0
  buckets.fail("cut", "POST run/checkpoints/4/")
  with pytest.raises(CheckpointError, match="checkpoints/4 could not be saved: .*network.*older ones are unharmed"):
    run(config, "--workdir=gs://bucket-a/run", "--config.eval.every=100")
  buckets.heal()
  assert "run/checkpoints/2/manifest.json" in buckets.objects["bucket-a"]
  assert "run/checkpoints/4/manifest.json" not in buckets.objects["bucket-a"]
  assert run("--workdir=gs://bucket-a/run", "--config.eval.every=4") == 0
  assert digests(buckets, "run")[-1] == digests(buckets, "whole")[-1]
  assert metric_steps(buckets, "run") == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("how", ["hang", 503])
def test_a_bucket_that_stalls_or_fails_for_a_while_changes_nothing(buckets, config, how):
  assert run(config, "--workdir=gs://bucket-a/whole") == 0
  buckets.fail(how, "(POST|GET) .*run/checkpoints/[24]/", times=2)
  assert run(config, "--workdir=gs://bucket-a/run") == 0
  assert digests(buckets, "run") == digests(buckets, "whole")
  assert metric_steps(buckets, "run") == [1, 2, 3, 4, 5, 6]


def test_a_save_that_failed_ends_the_run_before_the_next_save(buckets, config, monkeypatch):
  checks = iter([None, None, CheckpointError("lost")])

  def check(self):
    if error := next(checks):
      raise error

  monkeypatch.setattr(BucketCheckpointer, "check", check)
  with pytest.raises(CheckpointError, match="lost"):
    run(config, "--workdir=gs://bucket-a/run", "--config.checkpoint.every=100")


def test_errors_of_buckets_exit_2_before_devices_are_touched(buckets, config, monkeypatch, capsys):
  import jax

  monkeypatch.setattr(jax, "devices", None)
  for fault, workdir, message in (
    (None, "gs://bucket-b/run", "NOT_FOUND.*check the name of the bucket"),
    (401, "gs://bucket-a/run", "PERMISSION_DENIED.*check the credentials"),
    ("cut", "s3://bucket-a/run", "check the network"),
  ):
    buckets.heal()
    if fault:
      buckets.fail(fault, " run/")
    with pytest.raises(StorageError, match=message):
      run(config, f"--workdir={workdir}")
    monkeypatch.setattr(sys, "argv", ["train", config, f"--workdir={workdir}"])
    with pytest.raises(SystemExit) as exit:
      flags.run_program(train.main)
    assert exit.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_workdir_without_a_config_asks_for_one(buckets):
  with pytest.raises(ConfigError, match="--config=NAME says what to train"):
    run("--workdir=gs://bucket-a/run")
