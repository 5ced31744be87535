import errno
import logging
import pathlib

import numpy as np
import pytest

from deepseek_jax.errors import DataError
from deepseek_jax.storage import RunFolder
from deepseek_jax.training import expert_loads
from deepseek_jax.training.expert_loads import MAX_RECORDS, ExpertLoadWriter, decode, encode, read_expert_loads
from deepseek_jax.training.metrics import EXPERT_LOADS, RESUME_FILES, AppendFile

LAYERS = {"layer_1": 8, "mtp_1": 4}


def loads_of(step):
  """The histograms of a step, which no other step has."""
  rng = np.random.default_rng(step)
  bars = {f"router/{layer}/load": rng.dirichlet(np.ones(experts)) for layer, experts in LAYERS.items()}
  return bars | {"other/layer_1/load": np.ones(3)}


def write(folder, steps, resume_step=0):
  writer = ExpertLoadWriter(folder, resume_step)
  for step in steps:
    writer.write(step, {"loss": 1.0}, loads_of(step))
    writer.event("eval", step, loss=1.0)
  writer.close()


def content(folder):
  return (folder / EXPERT_LOADS).read_bytes()


def test_codes_keep_a_load_to_two_percent_and_a_dead_expert():
  fractions = np.array([0.0, 1e-9, 0.5, 0.25, 0.125, 0.0625, 0.0625, 0.0])
  ratios = decode(encode(fractions))
  np.testing.assert_allclose(ratios[2:-1], 8 * fractions[2:-1], rtol=0.018)  # half a code: 2^(1/40)
  assert ratios[0] == ratios[-1] == 0 < ratios[1] < 0.02


def test_what_was_written_is_read(tmp_path):
  write(tmp_path, (10, 20, 25))
  loads = read_expert_loads(tmp_path)
  assert (loads.stride, loads.steps.tolist()) == (1, [10, 20, 25]) and list(loads.codes) == list(LAYERS)
  for layer in LAYERS:
    np.testing.assert_array_equal(loads.codes[layer][1], encode(loads_of(20)[f"router/{layer}/load"]))


def test_a_model_without_experts_has_no_file(tmp_path):
  writer = ExpertLoadWriter(tmp_path, 0)
  writer.write(1, {"loss": 1.0}, {})
  writer.close()
  assert read_expert_loads(tmp_path) is None and not list(tmp_path.iterdir())


def test_a_long_run_keeps_few_records_spread_evenly(tmp_path):
  write(tmp_path, range(10, 20_010, 10))
  loads = read_expert_loads(tmp_path)
  assert MAX_RECORDS / 2 - 1 <= len(loads.steps) <= MAX_RECORDS and loads.stride == 128
  assert (loads.steps[0], np.diff(loads.steps // 128).tolist()) == (10, [1] * (len(loads.steps) - 1))
  expected = encode(loads_of(int(loads.steps[-1]))["router/mtp_1/load"])
  np.testing.assert_array_equal(loads.codes["mtp_1"][-1], expected)


@pytest.mark.parametrize("stop", [97, 255, 256, 257, 300, 511, 600])
def test_a_run_that_resumes_records_what_it_would_have_without_the_stop(tmp_path, stop):
  whole, resumed = tmp_path / "whole", tmp_path / "resumed"
  for folder in (whole, resumed):
    folder.mkdir()
  write(whole, range(1, 701))
  write(resumed, range(1, stop + 1))
  with open(resumed / EXPERT_LOADS, "ab") as file:
    file.write(b"torn")
  write(resumed, range(stop - 50, 701), resume_step=stop - 51)
  assert content(resumed) == content(whole) and not list(tmp_path.rglob("*.partial"))


def test_a_run_in_a_bucket_resumes_its_record(buckets, tmp_path):
  for start, steps in ((0, range(1, 6)), (3, range(4, 8))):
    folder = RunFolder("gs://bucket-a/run")
    folder.download(RESUME_FILES)
    write(pathlib.Path(folder.path), steps, start)
    folder.upload()
  write(tmp_path, range(1, 8))
  assert buckets.objects["bucket-a"][f"run/{EXPERT_LOADS}"].content == content(tmp_path)


def test_a_torn_record_is_ignored(tmp_path):
  write(tmp_path, (1, 2, 3))
  (tmp_path / EXPERT_LOADS).write_bytes(content(tmp_path)[:-1])
  assert read_expert_loads(tmp_path).steps.tolist() == [1, 2]


def test_other_layers_start_a_new_record(tmp_path):
  write(tmp_path, (1, 2))
  writer = ExpertLoadWriter(tmp_path, 2)
  writer.write(3, {}, {"router/layer_1/load": np.ones(2) / 2})
  writer.close()
  loads = read_expert_loads(tmp_path)
  assert loads.steps.tolist() == [3] and {k: c.shape for k, c in loads.codes.items()} == {"layer_1": (1, 2)}


@pytest.mark.parametrize(
  "bad",
  [
    b"",
    b"\0\0",
    b"[]\n",
    b"{}\n",
    b'{"stride": 0, "experts": {"a": 1}}\n',
    b'{"stride": 1, "experts": {}}\n',
    b'{"stride": 1, "experts": {"a": 1e400}}\n',
  ],
)
def test_another_kind_of_file_is_named_and_a_run_does_without_it(tmp_path, bad, caplog):
  (tmp_path / EXPERT_LOADS).write_bytes(bad)
  with pytest.raises(DataError, match=r"expert_loads\.bin: expected a record of expert loads.*move it away"):
    read_expert_loads(tmp_path)
  write(tmp_path, [1, 2])
  assert "expert_loads.bin.damaged now, and a new one begins" in caplog.text
  assert (tmp_path / f"{EXPERT_LOADS}.damaged").read_bytes() == bad
  assert read_expert_loads(tmp_path).steps.tolist() == [1, 2]


@pytest.mark.parametrize("at", [3, MAX_RECORDS + 1])
def test_a_full_disk_is_one_warning_and_keeps_what_was_written(tmp_path, monkeypatch, caplog, at):
  """At a record, and where the file is thinned."""
  write(tmp_path, range(1, at))

  def full(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")

  writer = ExpertLoadWriter(tmp_path, at - 1)
  if at == 3:
    monkeypatch.setattr(AppendFile, "append", full)
  else:
    monkeypatch.setattr(expert_loads.os, "replace", full)
  with caplog.at_level(logging.WARNING):
    for step in (at, at + 1):
      writer.write(step, {}, loads_of(step))
  writer.close()
  assert [r.getMessage() for r in caplog.records if EXPERT_LOADS in r.getMessage()] == [
    f"{tmp_path / EXPERT_LOADS} cannot be written: No space left on device; the report's heat map of experts ends before "
    f"step {at}"
  ]
  assert read_expert_loads(tmp_path).steps.tolist()[: at - 1] == list(range(1, at))
  assert not list(tmp_path.glob("*.partial"))
