"""Real processes: kill -9 at random moments of saving, a full disk, and what reaches the terminal."""

import pathlib
import random
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

import deepseek_jax
from deepseek_jax.checkpoint.manager import Checkpointer, CheckpointReader
from deepseek_jax.config_sections import CheckpointConfig
from deepseek_jax.errors import CheckpointError

PRELUDE = """
import sys
import numpy as np, jax
from deepseek_jax.checkpoint.manager import Checkpointer
from deepseek_jax.config_sections import CheckpointConfig
from deepseek_jax.errors import CheckpointError
SIZE = 1 << 18
def state(step, copies=4):
  return {"params": {str(i): jax.numpy.full(SIZE, step + i, "int32") for i in range(copies)}}
def meta(step):
  return {"format_version": 1, "samples": step}
checkpointer = Checkpointer(sys.argv[1], CheckpointConfig(keep=2))
"""
ROOT = pathlib.Path(deepseek_jax.__file__).parents[1]
SIZE = 1 << 18
TARGET = {
  str(i): jax.ShapeDtypeStruct((SIZE,), "int32", sharding=SingleDeviceSharding(jax.devices()[0])) for i in range(4)
}


def run(workdir, body):
  return subprocess.Popen(
    [sys.executable, "-c", PRELUDE + body, str(workdir)],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
  )  # fmt: skip


def assert_holds(reader, step):
  """`step` restores to what was saved under it: every array and the meta."""
  assert reader.meta(step)["samples"] == step
  params = reader.restore(step, {"params": TARGET})["params"]
  for i in range(4):
    assert (np.asarray(params[str(i)]) == step + i).all()


def test_kill_during_saves_never_costs_a_finished_step(tmp_path, capfd):
  body = """
step = checkpointer.latest() or 0
while True:
  step += 1
  checkpointer.save(step, state(step), meta(step))
  print(step, flush=True)  # the step before this one is on disk: save() has waited for it
"""
  finished = 0
  for _ in range(3):
    process = run(tmp_path, body)
    for _ in range(2):
      finished = int(process.stdout.readline()) - 1
    time.sleep(random.uniform(0, 0.4))
    process.kill()
    printed, errors = process.stdout.read(), process.stderr.read()
    process.wait()
    assert errors == ""
    finished = int(printed.split()[-1]) - 1 if printed else finished
    # A reader rejects nothing: what carries a step's name is whole, whenever the kill came.
    latest = CheckpointReader(tmp_path).latest()
    assert latest >= finished
    assert capfd.readouterr().err == ""
    assert_holds(CheckpointReader(tmp_path), latest)
  with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
    checkpointer.save(latest + 1, {"x": np.zeros(3)}, {})
  assert not list((tmp_path / "checkpoints").glob("*tmp*"))


@pytest.mark.chaos
def test_two_processes_save_one_checkpoint_and_agree_on_the_newest(tmp_path):
  body = """
import jax, numpy as np
jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", 2, int(sys.argv[3]), shutdown_timeout_seconds=5)
from deepseek_jax.checkpoint.manager import Checkpointer
from deepseek_jax.config_sections import CheckpointConfig
from deepseek_jax.errors import CheckpointError
mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,), devices=[
  next(d for d in jax.devices() if d.process_index == i) for i in range(2)])
sharding = jax.NamedSharding(mesh, jax.P("d"))
def state(step):
  return {"x": jax.make_array_from_process_local_data(sharding, np.full(4, 10 * step + jax.process_index(), "float32"))}
with Checkpointer(sys.argv[1], CheckpointConfig()) as checkpointer:
  try:
    latest = checkpointer.latest()
  except CheckpointError:
    latest = "refused"
  if latest == "refused":
    print(latest)
  elif latest is None:
    for step in (1, 2):
      checkpointer.save(step, state(step), {})
  else:
    shapes = {"x": jax.ShapeDtypeStruct((8,), "float32", sharding=sharding)}
    print(latest, np.asarray(checkpointer.restore(latest, shapes)["x"].addressable_shards[0].data).tolist())
"""

  def run_both():
    with socket.socket() as s:
      s.bind(("127.0.0.1", 0))
      port = s.getsockname()[1]
    command = [sys.executable, "-c", "import sys\n" + body, str(tmp_path), str(port)]
    pair = [subprocess.Popen([*command, i], stdout=subprocess.PIPE, text=True, cwd=ROOT) for i in "01"]
    try:
      printed = [process.communicate(timeout=100)[0] for process in pair]
    finally:
      for process in pair:
        process.kill()
    assert [process.returncode for process in pair] == [0, 0]
    return [text.splitlines()[-1] for text in printed if text]

  run_both()
  (tmp_path / "checkpoints" / "2" / "meta" / "metadata").write_text("damaged")
  assert run_both()[-2:] == ["1 [10.0, 10.0, 10.0, 10.0]", "1 [11.0, 11.0, 11.0, 11.0]"]
  assert sorted(path.name for path in (tmp_path / "checkpoints").glob("[!.]*")) == ["1", "2.rejected"]
  (tmp_path / "checkpoints" / "1" / "meta" / "metadata").write_text("damaged")
  assert run_both()[-2:] == ["refused", "refused"]
  assert sorted(path.name for path in (tmp_path / "checkpoints").glob("[!.]*")) == ["1", "2.rejected"]


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
  body = """
checkpointer.save(1, state(1), meta(1))
checkpointer.wait()
print("saved", flush=True)
sys.stdin.read()
"""
  process = run(tmp_path, body)
  assert process.stdout.readline() == "saved\n"
  with pytest.raises(
    CheckpointError, match=rf"another process trains in {tmp_path} \(pid {process.pid} on .*--workdir"
  ):
    Checkpointer(tmp_path, CheckpointConfig())
  assert CheckpointReader(tmp_path).latest() == 1
  process.kill()
  process.communicate()
  with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
    assert checkpointer.latest() == 1


def test_full_disk_is_raised_by_wait_and_older_steps_stay(tmp_path):
  body = """
import pathlib, resource
for step in (1, 2):
  checkpointer.save(step, state(step), meta(step))
checkpointer.wait()
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
try:
  checkpointer.save(3, state(3), meta(3))
  checkpointer.wait()
except CheckpointError as error:
  print(error)
names = [path.name for path in pathlib.Path(sys.argv[1], "checkpoints").iterdir()]
assert sorted(name for name in names if not name.startswith(".")) == ["1", "2"]
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
checkpointer.save(3, state(3), meta(3))
checkpointer.close()
"""
  process = run(tmp_path, body)
  printed, errors = process.communicate()
  assert (process.returncode, errors) == (0, "")
  (line,) = printed.splitlines()
  assert "checkpoints/3 could not be saved" in line and "File too large" in line
  assert {path.name for path in (tmp_path / "checkpoints").glob("[!.]*")} == {"2", "3"}
  reader = CheckpointReader(tmp_path)
  assert reader.latest() == 3
  assert_holds(reader, 2)
  assert_holds(reader, 3)


def test_leaving_the_context_raises_the_error_of_the_pending_save(tmp_path):
  body = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
try:
  with checkpointer:
    checkpointer.save(2, state(2), meta(2))
except CheckpointError as error:
  print(error)
"""
  process = run(tmp_path, body)
  printed, errors = process.communicate()
  assert (process.returncode, errors) == (0, "")
  assert "checkpoints/2 could not be saved" in printed
  assert CheckpointReader(tmp_path).latest() is None
