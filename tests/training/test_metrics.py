import contextlib
import glob
import json
import math
import resource

import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.errors import DataError, WriteError
from deepseek_jax.training import metrics


def _steps(path):
  return [line["step"] for line in metrics.read_jsonl(path)]


def _write(path, steps):
  writer = metrics.JsonlWriter(path, resume_step=steps[0] - 1)
  for step in steps:
    writer.write(step, {"loss": 1.0 / step}, {})
  writer.close()


def test_floats_keep_every_bit(tmp_path):
  values = {
    "python": 0.1 + 0.2,
    "numpy": np.float64(1 / 3),
    "single": np.float32(0.1),
    "jax": jnp.float32(2 / 3),
    "n": 7,
  }
  writer = metrics.JsonlWriter(tmp_path, resume_step=0)
  writer.write(1, values, {})
  (line,) = metrics.read_jsonl(tmp_path / "metrics.jsonl")  # before close: each line is flushed
  writer.close()
  assert line == {"step": 1} | {name: float(value) for name, value in values.items()}
  assert type(line["n"]) is int


def test_values_that_are_not_finite_are_null(tmp_path):
  writer = metrics.JsonlWriter(tmp_path, resume_step=0)
  writer.write(1, {"loss": math.nan, "grad_norm": jnp.inf, "tokens": 5}, {})
  writer.event("eval", 1, loss=np.float32("-inf"), nested={"values": [1.0, math.nan]})
  writer.close()
  (line,) = metrics.read_jsonl(tmp_path / "metrics.jsonl")
  assert line == {"step": 1, "loss": None, "grad_norm": None, "tokens": 5}
  (event,) = metrics.read_jsonl(tmp_path / "events.jsonl")
  assert (event["loss"], event["nested"]) == (None, {"values": [1.0, None]})


def test_lines_past_the_restored_step_are_cut(tmp_path):
  _write(tmp_path, range(1, 8))
  kept = (tmp_path / "metrics.jsonl").read_bytes().splitlines()[:4]
  metrics.JsonlWriter(tmp_path, resume_step=4).close()
  assert (tmp_path / "metrics.jsonl").read_bytes().splitlines() == kept
  _write(tmp_path, range(5, 7))
  assert _steps(tmp_path / "metrics.jsonl") == [1, 2, 3, 4, 5, 6]
  assert not list(tmp_path.glob("*.partial"))


def test_a_torn_last_line_is_cut_even_if_it_parses(tmp_path):
  _write(tmp_path, range(1, 4))
  path = tmp_path / "metrics.jsonl"
  for torn in (b'{"step": 3, "lo', b'{"step": 2, "loss": 1}'):
    with open(path, "ab") as file:
      file.write(torn)
    assert _steps(path) == [1, 2, 3]
    metrics.JsonlWriter(tmp_path, resume_step=3).close()
    assert path.read_bytes().endswith(b"}\n") and _steps(path) == [1, 2, 3]


def test_of_events_past_the_restored_step_only_those_of_the_process_stay(tmp_path):
  writer = metrics.JsonlWriter(tmp_path, resume_step=0)
  for name, step in (("start", 0), ("eval", 5), ("eval", 10), ("sample", 10), ("end", 10)):
    writer.event(name, step, loss=1.0)
  writer.close()
  metrics.JsonlWriter(tmp_path, resume_step=5).close()
  events = metrics.read_jsonl(tmp_path / "events.jsonl")
  assert [(e["event"], e["step"]) for e in events] == [("start", 0), ("eval", 5), ("end", 10)]


@pytest.mark.parametrize("bad", [b"\0\0\0\n", b"[1]\n", b'{"loss": 1}\n', b'{"step": "1"}\n', b'{"step": true}\n'])
def test_a_line_that_is_no_record_names_file_and_line(tmp_path, bad):
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(b'{"step": 1}\n' + bad + b'{"step": 2}\n')
  with pytest.raises(DataError, match=r"metrics\.jsonl, line 2: expected"):
    metrics.read_jsonl(path)
  with pytest.raises(DataError, match="line 2"):
    metrics.JsonlWriter(tmp_path, resume_step=9)
  assert path.read_bytes().count(b"\n") == 3  # the file is left as it was


def test_a_missing_file_reads_as_empty(tmp_path):
  assert metrics.read_jsonl(tmp_path / "metrics.jsonl") == []


def test_tensorboard_has_the_finite_numbers_and_hides_what_is_run_again(tmp_path):
  from tensorboardX.proto.event_pb2 import Event

  for start in (0, 2):
    writer = metrics.TensorboardWriter(tmp_path, resume_step=start)
    writer.write(start + 1, {"loss": 0.5, "grad_norm": math.nan}, histograms={"load": np.array([0.25, 0.0, 0.75])})
    writer.event("eval", start + 1, bits_per_byte=1.25)
    writer.event("end", start + 1, parameters=3)
    writer.close()
  tags, purged, bars = set(), [], []
  for path in glob.glob(str(tmp_path / "tensorboard" / "*")):
    data = open(path, "rb").read()
    while data:  # TFRecord: length, its checksum, the event, its checksum
      size = int.from_bytes(data[:8], "little")
      event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
      for value in event.summary.value:
        if value.HasField("histo"):
          bars.append((value.tag, event.step, list(value.histo.bucket_limit), list(value.histo.bucket)))
        else:
          tags.add((value.tag, event.step, value.simple_value))
      purged += [event.step] if event.HasField("session_log") else []
  assert tags == {(tag, step, v) for step in (1, 3) for tag, v in (("loss", 0.5), ("eval/bits_per_byte", 1.25))}
  assert sorted(purged) == [1, 3]
  assert sorted(bars) == [("load", step, [1, 2, 3], [0.25, 0.0, 0.75]) for step in (1, 3)]  # a bar for each expert


@contextlib.contextmanager
def full_disk(size):
  """Forbids this process to write files past `size` bytes during the block, as on a full disk; not longer, since the tests' output may be one."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_line_without_room_is_an_error_that_leaves_whole_lines(tmp_path):
  writer = metrics.JsonlWriter(tmp_path, resume_step=0)
  with full_disk(100), pytest.raises(WriteError, match=r"metrics\.jsonl cannot be written: File too large"):
    for step in range(1, 9):
      writer.write(step, {"loss": 1 / 3}, {})
  content = (tmp_path / "metrics.jsonl").read_bytes()
  assert content.endswith(b"}\n") and 50 < len(content) <= 100
  writer.write(8, {"loss": 1.0}, {})  # there is room again
  writer.close()
  assert _steps(tmp_path / "metrics.jsonl")[-1] == 8


def test_tensorboard_without_room_warns_once_and_leaves_whole_records(tmp_path, caplog):
  writer = metrics.TensorboardWriter(tmp_path, resume_step=0)
  (path,) = (tmp_path / "tensorboard").iterdir()
  with full_disk(path.stat().st_size + 60):
    for step in range(1, 6):
      writer.write(step, {"loss": 0.5, "grad_norm": 1.0}, {"load": np.array([0.5, 0.5])} if step < 3 else {})
    writer.close()
  assert len(caplog.records) == 1 and "TensorBoard lacks what is logged from step 1" in caplog.text
  data, sizes = path.read_bytes(), []
  while data:
    sizes.append(int.from_bytes(data[:8], "little"))
    assert len(data) >= 16 + sizes[-1]
    data = data[16 + sizes[-1] :]
  assert len(sizes) == 3  # the two of the start, and one of the small ones


def test_an_end_is_written_to_a_run_without_writers_once(tmp_path):
  _write(tmp_path, [1, 2])
  metrics.end_unopened(tmp_path, "SIGTERM")
  metrics.end_unopened(tmp_path, "SIGINT")
  events = metrics.read_jsonl(tmp_path / "events.jsonl")
  assert [(e["event"], e["step"], e["reason"]) for e in events] == [("end", 0, "SIGTERM")]
  assert _steps(tmp_path / "metrics.jsonl") == [1, 2]


def test_jsonl_makes_two_files(tmp_path):
  _write(tmp_path, [1])
  assert sorted(p.name for p in tmp_path.iterdir()) == ["events.jsonl", "metrics.jsonl"]
  assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 1.0}
