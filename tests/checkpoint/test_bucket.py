"""Checkpoints in buckets: bitwise, around damage, and around connections that break while they are written or read."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from deepseek_jax.checkpoint.bucket import open_checkpointer, open_reader
from deepseek_jax.checkpoint.manager import CheckpointReader
from deepseek_jax.config_sections import CheckpointConfig
from deepseek_jax.errors import CheckpointError, StorageError
from tests.checkpoint.test_manager import META, abstract, assert_same, make_mesh, make_state
from tests.checkpoint.test_manager import save as save_on_disk

BOTH = pytest.mark.parametrize("url", ["gs://bucket-a/run", "s3://bucket-a/run"])
GS = "gs://bucket-a/run"
KEEP = CheckpointConfig(keep=9)


@pytest.fixture
def objects(buckets):
  return buckets.objects["bucket-a"]


def save(url, *steps, config=KEEP):
  with open_checkpointer(url, config) as checkpointer:
    for step in steps:
      checkpointer.save(step, make_state(seed=step), META)


def newest(url):
  with open_checkpointer(url, KEEP) as checkpointer:
    return checkpointer.latest()


def arrays_file(objects, step):
  """Key of the file with the arrays of a step."""
  folder = f"run/checkpoints/{step}/state/ocdbt.process_0/d/"
  return max((key for key in objects if key.startswith(folder)), key=lambda key: len(objects[key].content))


@BOTH
@pytest.mark.parametrize("sizes", [(2, 2), (4, 1), (1,)])
def test_round_trip_is_bitwise_on_any_mesh(objects, url, sizes):
  save(url, 3)
  mesh = make_mesh(*sizes) if len(sizes) > 1 else jax.make_mesh(sizes, ("a",), devices=jax.devices()[:1])
  reader = open_reader(url)
  assert (reader.latest(), reader.steps(), reader.meta(3)) == (3, [3], META)
  with jax.set_mesh(mesh):
    restored = reader.restore(3, abstract(make_state(), mesh))
  assert_same(restored, make_state(seed=3))
  params = make_state(seed=3).params
  assert_same(reader.restore(3, {"params": abstract(params)}), {"params": params})


def test_what_is_saved_is_the_state_at_the_call(objects, monkeypatch):
  bump = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
  state, bumped = make_state(seed=1), threading.Event()
  with open_checkpointer(GS, KEEP) as checkpointer:
    write = checkpointer._write
    monkeypatch.setattr(checkpointer, "_write", lambda *args: (bumped.wait(), write(*args)))
    checkpointer.save(1, state, META)
    for _ in range(3):
      state = bump(state)
    jax.block_until_ready(state)
    bumped.set()
  assert_same(open_reader(GS).restore(1, abstract(make_state())), make_state(seed=1))


def test_a_copy_of_the_bucket_is_a_workdir_that_orbax_reads(objects, tmp_path):
  save(GS, 1, 2)
  for name, found in objects.items():
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(found.content)
  reader = CheckpointReader(tmp_path / "run")
  assert reader.latest() == 2
  assert_same(reader.restore(2, abstract(make_state())), make_state(seed=2))


def test_a_copy_of_a_workdir_is_one_in_the_bucket(buckets, objects, tmp_path):
  save_on_disk(tmp_path, 5)
  for path in (tmp_path / "checkpoints").rglob("*"):
    if path.is_file():
      buckets.put("bucket-a", f"run/{path.relative_to(tmp_path).as_posix()}", path.read_bytes())
  reader = open_reader(GS)
  assert (reader.latest(), reader.meta(5)) == (5, META)
  assert_same(reader.restore(5, abstract(make_state())), make_state(seed=5))
  save(GS, 6)
  assert newest(GS) == 6


@BOTH
def test_the_manifest_is_written_last_and_lists_everything(buckets, objects, url):
  save(url, 1)
  written = [key for method, key in buckets.log if method in ("PUT", "POST") and key.startswith("run/checkpoints/1/")]
  assert written[-1] == "run/checkpoints/1/manifest.json"
  below = {key.removeprefix("run/checkpoints/1/") for key in objects if key.startswith("run/checkpoints/1/")}
  listed = json.loads(objects["run/checkpoints/1/manifest.json"].content)["files"]
  assert listed.keys() == below - {"manifest.json"}
  assert not [key for key in objects if ".parts/" in key]


def test_a_step_without_a_manifest_is_no_checkpoint_and_can_be_saved(buckets, objects):
  save(GS, 1, 2)
  del objects["run/checkpoints/2/manifest.json"]
  buckets.put("bucket-a", "run/checkpoints/2/state/left", b"behind")
  assert (newest(GS), open_reader(GS).latest(), open_reader(GS).steps()) == (1, 1, [1])
  save(GS, 2)
  assert newest(GS) == 2
  assert "run/checkpoints/2/state/left" not in objects


def test_old_steps_go_as_the_config_says(objects):
  save(GS, *range(1, 8), config=CheckpointConfig(keep=2, keep_every=3))
  assert open_reader(GS).steps() == [3, 6, 7]
  assert {key.split("/")[2] for key in objects} == {"3", "6", "7", "~"}


def test_a_save_may_leave_old_steps_and_a_run_may_go_back_to_one(objects):
  with open_checkpointer(GS, CheckpointConfig(keep=1)) as checkpointer:
    for step in (1, 2, 3):
      checkpointer.save(step, make_state(seed=step), META, rotate=False)
    checkpointer.wait()
    assert checkpointer.steps() == [1, 2, 3]
    with pytest.raises(CheckpointError, match=r"no checkpoint 4 in .* to resume from: it holds \[1, 2, 3\]"):
      checkpointer.go_back_to(4)
    assert checkpointer.go_back_to(2) == 2 and checkpointer.steps() == [1, 2]
    checkpointer.save(3, make_state(seed=3), META)
  assert open_reader(GS).steps() == [3]


def flip_bit(content):
  return content[:9] + bytes([content[9] ^ 4]) + content[10:]


@BOTH
@pytest.mark.parametrize(
  ("damage", "reason"),
  [(flip_bit, "checksum"), (lambda content: content[:-1], "checksum"), (lambda _: None, "is missing")],
)
def test_a_damaged_step_is_set_aside_for_the_one_before(buckets, objects, url, damage, reason, capsys):
  save(url, 1, 2)
  key = arrays_file(objects, 2)
  content = damage(objects.pop(key).content)
  if content is not None:
    buckets.put("bucket-a", key, content)
  before = dict(objects)
  assert open_reader(url).latest() == 1
  assert objects == before, "a reader changes nothing"
  assert newest(url) == 1
  assert f"checkpoint {url}/checkpoints/2 rejected: " in (err := capsys.readouterr().err) and reason in err
  assert "run/checkpoints/2/manifest.json.rejected" in objects
  save(url, 2)
  assert newest(url) == 2


@pytest.mark.parametrize("manifest", [b"", b"[]", b'{"format": 1, "files": {"../x": {"size": 1, "crc32": ""}}}'])
def test_a_damaged_manifest_falls_back(buckets, objects, manifest):
  save(GS, 1, 2)
  buckets.put("bucket-a", "run/checkpoints/2/manifest.json", manifest)
  assert newest(GS) == 1


def test_no_good_checkpoint_is_an_error_and_not_a_fresh_start(buckets, objects):
  save(GS, 1)
  buckets.put("bucket-a", arrays_file(objects, 1), b"x")
  for _ in range(2):
    with pytest.raises(CheckpointError, match="none of the checkpoints in gs://bucket-a/run/checkpoints can be used"):
      newest(GS)


@BOTH
def test_a_save_goes_on_when_connections_are_cut_now_and_then(buckets, objects, url):
  buckets.fail("cut", "(PUT|POST) run/checkpoints/1/.*/d/", times=2)
  buckets.fail(503, "(PUT|POST) run/checkpoints/1/manifest.json", times=2)
  buckets.fail("cut", "GET run/checkpoints/1/", times=2)
  save(url, 1)
  assert newest(url) == 1


@BOTH
@pytest.mark.parametrize("what", ["state/ocdbt.process_0/d/", "state/manifest.ocdbt", "meta/", "manifest.json"])
def test_a_save_that_stays_cut_is_one_error_and_the_step_before_is_whole(buckets, objects, url, what):
  save(url, 1)
  buckets.fail("cut", f"(PUT|POST) run/checkpoints/2/{what}")
  with open_checkpointer(url, KEEP) as checkpointer:
    checkpointer.save(2, make_state(seed=2), META)
    deadline = time.monotonic() + 20
    with pytest.raises(CheckpointError, match=r"checkpoints/2 could not be saved: .*network.*older ones") as caught:
      while time.monotonic() < deadline:  # as a run does after each step
        checkpointer.check()
        time.sleep(0.01)
    assert "\n" not in str(caught.value)
  buckets.heal()
  assert newest(url) == 1
  assert_same(open_reader(url).restore(1, abstract(make_state())), make_state(seed=1))
  save(url, 2)
  assert newest(url) == 2


@BOTH
def test_a_read_that_is_cut_is_tried_again_and_then_an_error_that_rejects_nothing(buckets, objects, url):
  save(url, 1, 2)
  data = "GET run/checkpoints/2/state/.*d/"
  buckets.fail("cut", data, times=2)
  assert newest(url) == 2
  buckets.fail("cut", data, times=2)
  assert_same(open_reader(url).restore(2, abstract(make_state())), make_state(seed=2))
  buckets.fail("cut", data)
  with pytest.raises(StorageError, match="cannot be read.*network"):
    newest(url)
  with pytest.raises(StorageError, match="checkpoints/2/state cannot be read: .*network") as caught:
    open_reader(url).restore(2, abstract(make_state()))
  assert "\n" not in str(caught.value)
  buckets.heal()
  assert newest(url) == 2


@BOTH
def test_a_list_that_is_refused_is_no_fresh_start(buckets, objects, url):
  save(url, 1)
  buckets.put("bucket-a", "run/config.json", b"{}")
  buckets.fail(403, "GET $")
  for find in (newest, lambda url: open_reader(url).latest()):
    with pytest.raises(StorageError, match="allow listing|PERMISSION_DENIED"):
      find(url)


def test_a_step_that_exists_is_not_replaced(buckets, objects, monkeypatch):
  save(GS, 1)
  with open_checkpointer(GS, KEEP) as checkpointer, pytest.raises(CheckpointError, match="checkpoint .*/1 exists"):
    checkpointer.save(1, make_state(), META)
  with open_checkpointer(GS, KEEP) as checkpointer:
    # Another run completes the same step meanwhile.
    monkeypatch.setattr(
      checkpointer, "_merge", lambda *_: buckets.put("bucket-a", "run/checkpoints/2/manifest.json", b"")
    )
    checkpointer.save(2, make_state(seed=2), META)
    with pytest.raises(CheckpointError, match="could not be saved: .*written by another process"):
      checkpointer.wait()
  assert objects["run/checkpoints/2/manifest.json"].content == b""


def test_arrays_that_do_not_fit_are_named(objects):
  save(GS, 1)
  other = {"params": {"embed": jax.ShapeDtypeStruct((8, 5), "float32", sharding=make_state().params["embed"].sharding)}}
  with pytest.raises(CheckpointError, match=r"params/embed: checkpoint float32\[8,4\], expected float32\[8,5\]"):
    open_reader(GS).restore(1, other)


def test_a_step_that_is_not_there(objects):
  with pytest.raises(CheckpointError, match="no meta/metadata of checkpoint 7 in gs://.*none"):
    open_reader(GS).meta(7)


PROCESS = """
import sys, time
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding
from deepseek_jax import distributed
from deepseek_jax.checkpoint.bucket import BucketCheckpointer, open_checkpointer
from deepseek_jax.config_sections import CheckpointConfig
from deepseek_jax.processes import find_initialize_args

def slow_in_process_0(name):
  method = getattr(BucketCheckpointer, name)
  def slow(*arguments):
    if jax.process_index() == 0:
      time.sleep(3)
    return method(*arguments)
  setattr(BucketCheckpointer, name, slow)

with distributed.distributed_session(find_initialize_args(sys.argv[1], 2, int(sys.argv[2]))):
  mesh = jax.make_mesh((2,), ("a",), axis_types=(AxisType.Explicit,))
  value = {"x": np.arange(8192, dtype=np.float32).reshape(4, 2048), "step": np.int32(7)}
  specs = {"x": jax.P(None, "a"), "step": jax.P()}
  with jax.set_mesh(mesh), open_checkpointer("gs://bucket-a/run", CheckpointConfig()) as checkpointer:
    put = lambda v, s: jax.make_array_from_callback(v.shape, NamedSharding(mesh, s), lambda index: v[index])
    state = {name: put(value[name], specs[name]) for name in value}
    save = lambda step: checkpointer.save(step, state, {"format_version": 1})
    exec(sys.argv[3])
"""


def two_processes(body):
  """(exit codes, stderrs) of two processes that run `body`."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  # Who waits in a collective for longer than the others take gets an error.
  flags = {"XLA_FLAGS": "--xla_cpu_collective_timeout_seconds=2", "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
  command = [sys.executable, "-c", PROCESS, address]
  processes = [
    subprocess.Popen([*command, str(i), body], env=os.environ | flags, stderr=subprocess.PIPE, text=True)
    for i in range(2)
  ]
  try:
    errors = [process.communicate(timeout=120)[1] for process in processes]
  finally:
    for process in processes:
      process.kill()
  return [process.returncode for process in processes], errors


def test_two_processes_write_their_parts_of_one_step_that_one_process_reads(buckets, objects):
  codes, errors = two_processes("save(1); save(2); assert checkpointer.latest() == 2")
  assert codes == [0, 0], errors
  parts = {key.split("/")[4] for key in objects if key.startswith("run/checkpoints/2/state/ocdbt")}
  assert parts == {"ocdbt.process_0", "ocdbt.process_1"}
  reader, sharding = open_reader(GS), jax.sharding.SingleDeviceSharding(jax.devices()[0])
  assert reader.latest() == 2
  restored = reader.restore(2, {"x": jax.ShapeDtypeStruct((4, 2048), np.float32, sharding=sharding)})
  np.testing.assert_array_equal(restored["x"], np.arange(8192, dtype=np.float32).reshape(4, 2048))


def test_no_process_waits_in_a_collective_while_the_first_completes_or_verifies_a_step(buckets):
  body = """
slow_in_process_0("_complete")
slow_in_process_0("_verify")
meet = lambda: distributed.gather_to_host(state["x"])  # a collective
meet()
save(1)
checkpointer.wait()
meet()
assert checkpointer.latest() == 1
meet()
"""
  codes, errors = two_processes(body)
  assert codes == [0, 0], errors


@pytest.mark.parametrize("index", [0, 1])
def test_a_process_that_fails_ends_both_at_once_and_leaves_its_save_undone(buckets, objects, index):
  buckets.fail("hang", "POST run/checkpoints/2/")
  body = f"""
save(1)
checkpointer.wait()
save(2)
if jax.process_index() == {index}:
  print("failed at", time.time(), file=sys.stderr)
  raise KeyError("a mistake in the code")
distributed.barrier("a place that one never comes to")
"""
  codes, errors = two_processes(body)
  assert codes == [1, 1], errors
  assert (
    time.time() - float(re.search("failed at (.*)", errors[index])[1]) < 15
  )  # requests that hang are tried for longer
  buckets.heal()
  assert (newest(GS), open_reader(GS).steps()) == (1, [1])
