"""The check for silent corruption in runs of the command line, and what it says of devices."""

import contextlib
import io
import json
import types

import numpy as np
import pytest

from deepseek_jax import train
from deepseek_jax.config import Config
from deepseek_jax.config_sections import MeshConfig, TrainConfig
from deepseek_jax.errors import ConfigError
from deepseek_jax.model_config import ModelConfig
from deepseek_jax.training.checked_pass import jit_checked_pass
from deepseek_jax.training.corruption import compare_repeated, compare_rotated, describe_device, format_device
from tests.configs import write_texts
from tests.device_faults import FAULTY, Fault

CONFIG = """
from ml_collections import ConfigDict

def get_config():
  return ConfigDict(dict(
    model=dict(vocab=264, embed=16, layers=1, mlp=32, compute_dtype="float32",
               attention=dict(heads=2, kv_heads=2, head_dim=8)),
    data=dict(sources=({source!r},), cache={cache!r}, seq=32, heldout_fraction=0.2),
    mesh=dict(data=2, fsdp=2),
    train=dict(steps=6, global_batch=8, microbatch=4),
    checkpoint=dict(every=1, keep=9),
    eval=dict(every=100, final_sequences=4),
    log=dict(every=1, tensorboard=False),
    sample=dict(max_tokens=0),
  ))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder with a config and its text."""
  folder = tmp_path_factory.mktemp("corruption")
  write_texts(folder / "text", files=20, words=60)
  (folder / "config.py").write_text(CONFIG.format(source=str(folder / "text"), cache=str(folder / "cache")))
  return folder


def run(folder, workdir, *arguments):
  """(exit code, what is printed) of a run."""
  out = io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
    code = train.main(["train", f"--config={folder}/config.py", f"--workdir={folder / workdir}", *arguments])
  return code, out.getvalue()


def events(folder, workdir):
  return [json.loads(line) for line in (folder / workdir / "events.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def state_sha256(folder):
  """The hash of the state at the end of a run without checks."""
  assert run(folder, "plain")[0] == 0
  return events(folder, "plain")[-1]["state_sha256"]


@pytest.mark.jax_version
def test_a_run_with_checks_is_the_run_without(folder, state_sha256):
  assert run(folder, "checked", "--config.train.sdc_every=2", "--config.train.sdc_rotate")[0] == 0
  assert events(folder, "checked")[-1]["state_sha256"] == state_sha256
  assert "corruption" not in {e["event"] for e in events(folder, "checked")}


def test_a_device_that_computes_wrong_is_named_and_the_run_goes_back_to_before_it(folder, state_sha256, monkeypatch):
  """Before steps 0, 2 and 4 a pass is executed twice: the sixth execution is wrong."""
  fault = Fault(monkeypatch, on_after=5)
  jit_checked_pass.cache_clear()
  code, out = run(folder, "faulty", "--config.train.sdc_every=2")
  assert code == 43
  assert (
    "step 4: silent data corruption" in out
    and f"device {FAULTY} (cpu, host " in out
    and "process 0, number in process 2)" in out
  )
  assert "--resume_from=2, the newest checkpoint from before the last check that found nothing, at step 2" in out
  *_, found, end = events(folder, "faulty")
  assert found["event"] == "corruption" and [device["id"] for device in found["devices"]] == [FAULTY]
  assert (found["step"], found["last_passed"]) == (4, 2) and (end["reason"], end["step"]) == ("corrupted", 4)
  assert "A device computed wrong" in (folder / "faulty" / "report.html").read_text()
  # What is in memory may be wrong: it is not saved.
  assert max(int(path.name) for path in (folder / "faulty" / "checkpoints").iterdir() if path.name.isdecimal()) == 4
  fault.on_after = fault.where = None
  assert run(folder, "faulty", "--config.train.sdc_every=2", "--resume_from=2")[0] == 0
  jit_checked_pass.cache_clear()
  kept = events(folder, "faulty")
  assert "corruption" in {e["event"] for e in kept} and kept[-1]["state_sha256"] == state_sha256


def checksums(**changed):
  """Those of four devices, with the row of a device changed: {name: device}."""
  made = {name: np.arange(12, dtype=np.uint32).reshape(4, 3) for name in ("forward", "backward", "sums")}
  for name, device in changed.items():
    made[name][device] += 1
  return made


def test_own_values_tell_a_device_from_those_that_received_its_result():
  assert compare_repeated(checksums(), checksums()) is None
  devices, what = compare_repeated(checksums(), checksums(backward=1, sums=slice(None)))
  assert devices == [1] and "backward pass" in what
  devices, what = compare_repeated(checksums(), checksums(sums=slice(2)))
  assert devices == [0, 1] and "other sums of 3 of them" in what


def test_rotated_passes_name_the_device_that_is_in_two_differences():
  rotated = {name: np.roll(rows, 1, 0) for name, rows in checksums().items()}
  assert compare_rotated(checksums(), rotated) is None
  assert compare_rotated(checksums(forward=3), rotated)[0] == [0, 3]  # once: it, or the next one
  rotated["forward"][3] += 1  # the same fault on the sequences of device 2
  assert compare_rotated(checksums(forward=3), rotated)[0] == [3]


def test_a_device_is_described_by_where_it_is():
  def chip(number):
    place = dict(coords=(0, 2, number), core_on_chip=0, slice_index=3)
    return types.SimpleNamespace(id=number, process_index=number // 2, device_kind="TPU v5p", **place)

  chips = [chip(number) for number in range(4)]
  described = describe_device(chips[3], types.SimpleNamespace(devices=np.array(chips)), ["host-a", "host-b"])
  line = "3 (TPU v5p, host host-b, process 1, number in process 1, coordinates [0, 2, 3], core 0, slice 3)"
  assert described["host"] == "host-b" and format_device(described) == line


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(train=TrainConfig(sdc_every=1, sdc_rotate=True), mesh=MeshConfig(tensor=2)), "mesh.tensor=2"),
    (dict(train=TrainConfig(sdc_every=1, sdc_rotate=True), model=ModelConfig(dropout=0.1)), "dropout"),
    (dict(train=dict(sdc_rotate=True)), "set both"),
  ],
)
def test_rotation_that_could_not_be_compared_is_refused(fields, message):
  with pytest.raises(ConfigError, match=message):
    Config(**{name: TrainConfig(**value) if isinstance(value, dict) else value for name, value in fields.items()})
