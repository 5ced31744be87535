"""Saving, finding and restoring checkpoints: bitwise, onto other meshes, and around damage of every kind."""

import dataclasses
import errno
import fcntl
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding

from deepseek_jax.checkpoint.manager import FORMAT_VERSION, Checkpointer, CheckpointReader
from deepseek_jax.config_sections import CheckpointConfig
from deepseek_jax.errors import CheckpointError

pytestmark = pytest.mark.jax_version

META = {
  "format_version": FORMAT_VERSION, "config": {"name": "run"}, "samples": 160, "tokens": 7000, "data_fingerprint": "ab",
}  # fmt: skip


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
  step: jax.Array
  params: dict
  buffers: dict
  opt_state: optax.OptState


def make_mesh(*sizes):
  return jax.make_mesh(sizes, ("a", "b")[: len(sizes)], axis_types=(AxisType.Explicit,) * len(sizes))


MESH = make_mesh(2, 2)


def make_state(mesh=MESH, seed=0):
  """What a run saves: a dataclass of dicts, bfloat16 among them, and optax's named tuples with empty ones between."""
  rng = np.random.default_rng(seed)

  def put(spec, *shape, dtype=np.float32):
    return jax.device_put(rng.standard_normal(shape).astype(dtype), NamedSharding(mesh, spec))

  with jax.set_mesh(mesh):
    params = {
      "embed": put(jax.P("a", None), 8, 4),
      "layers": {"norm": put(jax.P(None), 4, dtype=jnp.bfloat16), "mlp": put(jax.P(None, mesh.axis_names[-1]), 4, 8)},
    }
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.masked(optax.adamw(1e-3), {"embed": True, "layers": False}))
    return State(jax.device_put(np.int32(seed), NamedSharding(mesh, jax.P())), params, {}, tx.init(params))


def abstract(tree, mesh=MESH):
  """The shapes of `tree` with each array's first dimension spread over all of `mesh`, where it divides."""

  def leaf(x):
    spread = x.ndim and x.shape[0] % mesh.size == 0
    return jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=NamedSharding(mesh, jax.P(mesh.axis_names) if spread else jax.P())
    )

  return jax.tree.map(leaf, tree)


def assert_same(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert x.dtype == y.dtype
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def save(workdir, *steps, keep=9, keep_every=0):
  with Checkpointer(workdir, CheckpointConfig(keep=keep, keep_every=keep_every)) as checkpointer:
    for step in steps:
      checkpointer.save(step, make_state(seed=step), META)


def steps_on_disk(workdir):
  return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def test_round_trip_is_bitwise_and_keeps_the_meta(tmp_path):
  state = make_state(seed=3)
  with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
    assert checkpointer.latest() is None
    checkpointer.save(3, state, META)
    checkpointer.wait()
    assert checkpointer.latest() == 3
    assert checkpointer.meta(3) == META
    assert_same(checkpointer.restore(3, abstract(state)), state)


@pytest.mark.parametrize("sizes", [(1, 4), (4, 1), (4,), (1,)])
def test_restore_onto_another_mesh(tmp_path, sizes):
  save(tmp_path, 3)
  mesh = jax.make_mesh(
    sizes, ("a", "b")[: len(sizes)], axis_types=(AxisType.Explicit,) * len(sizes),
    devices=jax.devices()[: int(np.prod(sizes))],
  )  # fmt: skip
  target = abstract(make_state(), mesh)
  with jax.set_mesh(mesh):
    restored = CheckpointReader(tmp_path).restore(3, target)
    assert_same(restored, make_state(seed=3))
    for array, want in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
      assert array.sharding == want.sharding


def test_params_alone_can_be_restored(tmp_path):
  save(tmp_path, 3)
  params = make_state(seed=3).params
  assert_same(CheckpointReader(tmp_path).restore(3, {"params": abstract(params)}), {"params": params})


def test_what_is_saved_is_the_state_at_the_call(tmp_path):
  @jax.jit
  def make():
    return jnp.arange(1 << 20, dtype=jnp.float32)

  bump = jax.jit(lambda x: x + 1, donate_argnums=0)
  meta = dict(META)
  array = make()
  with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
    checkpointer.save(1, {"x": array}, meta)
    meta["samples"] = -1
    for _ in range(20):
      array = bump(array)
    array.block_until_ready()
    checkpointer.wait()
    assert checkpointer.meta(1) == META
    sharding = NamedSharding(make_mesh(4), jax.P("a"))
    target = {"x": jax.ShapeDtypeStruct((1 << 20,), jnp.float32, sharding=sharding)}
    assert_same(checkpointer.restore(1, target), {"x": make()})


def largest_file(step_dir):
  return max((p for p in step_dir.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_bit(step_dir):
  path = largest_file(step_dir)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 4
  path.write_bytes(content)


def truncate(step_dir):
  with open(largest_file(step_dir), "r+b") as f:
    f.truncate(17)


def empty(step_dir):
  for path in sorted(step_dir.rglob("*"), reverse=True):
    path.rmdir() if path.is_dir() else path.unlink()


DAMAGE = {
  "has checksum": flip_bit,
  "has 17 bytes": truncate,
  "is missing": lambda step_dir: largest_file(step_dir).unlink(),
  "is not in manifest.json": lambda step_dir: (step_dir / "state" / "more").write_text("x"),
  "manifest.json is missing": lambda step_dir: (step_dir / "manifest.json").unlink(),
  "manifest.json is not JSON": lambda step_dir: (step_dir / "manifest.json").write_text("{"),
  "which is not a path inside the step": lambda step_dir: (step_dir / "manifest.json").write_text(
    json.dumps({"format": 1, "files": {"../1/x": {"size": 0, "crc32": "0"}}})
  ),
  "the directory is empty": empty,
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_damage_falls_back_and_the_step_can_be_saved_again(tmp_path, capfd, reason):
  save(tmp_path, 1, 2)
  DAMAGE[reason](tmp_path / "checkpoints" / "2")
  with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
    assert checkpointer.latest() == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert str(tmp_path / "checkpoints" / "2") in line and reason in line and "moved to 2.rejected" in line
    assert (tmp_path / "checkpoints" / "2.rejected").is_dir()
    assert_same(checkpointer.restore(1, abstract(make_state())), make_state(seed=1))
    checkpointer.save(2, make_state(seed=2), META)
    checkpointer.wait()
    assert checkpointer.latest() == 2
    assert_same(checkpointer.restore(2, abstract(make_state())), make_state(seed=2))


def test_second_rejection_of_a_step_overwrites_nothing(tmp_path, capfd):
  save(tmp_path, 1)
  for _ in range(2):
    save(tmp_path, 5)
    flip_bit(tmp_path / "checkpoints" / "5")
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
      assert checkpointer.latest() == 1
  assert {p.name for p in (tmp_path / "checkpoints").glob("[!.]*")} == {"1", "5.rejected", "5.rejected-2"}
  assert capfd.readouterr().err.count("rejected:") == 2


@pytest.mark.parametrize("reader", [CheckpointReader, lambda workdir: Checkpointer(workdir, CheckpointConfig())])
def test_no_run_starts_over_where_no_checkpoint_verifies(tmp_path, capfd, reader):
  save(tmp_path, 1, 2)
  flip_bit(tmp_path / "checkpoints" / "1")
  (tmp_path / "checkpoints" / "2" / "manifest.json").unlink()
  (tmp_path / "checkpoints" / "3.rejected-2").mkdir()
  with pytest.raises(CheckpointError) as error:
    reader(tmp_path).latest()
  message = str(error.value)
  assert (
    f"none of the checkpoints in {tmp_path}/checkpoints can be used: 2: manifest.json is missing; 1: state/" in message
  )
  assert "3.rejected-2: rejected before" in message and "move them out of that folder" in message
  assert "--workdir" in message and "\n" not in message
  assert {p.name for p in (tmp_path / "checkpoints").glob("[!.]*")} == {"1", "2", "3.rejected-2"}
  for name in ("1", "2"):
    (tmp_path / "checkpoints" / name).rename(tmp_path / name)
  with pytest.raises(CheckpointError, match="can be used: 3.rejected-2"):
    CheckpointReader(tmp_path).latest()
  (tmp_path / "checkpoints" / "3.rejected-2").rename(tmp_path / "3")
  assert CheckpointReader(tmp_path).latest() is None
  assert capfd.readouterr().err == ""


def test_a_kill_during_the_first_save_is_a_fresh_start(tmp_path):
  (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
  assert CheckpointReader(tmp_path).latest() is None
  with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
    assert checkpointer.latest() is None


def test_a_workdir_is_free_again_after_close(tmp_path):
  with Checkpointer(tmp_path, CheckpointConfig()):
    with pytest.raises(CheckpointError, match=rf"pid {os.getpid()} "):
      Checkpointer(tmp_path, CheckpointConfig())
    Checkpointer(tmp_path / "other", CheckpointConfig()).close()
  Checkpointer(tmp_path, CheckpointConfig()).close()


def test_a_file_system_without_locks_is_trained_on(tmp_path, monkeypatch):
  def flock(file, operation):
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")

  monkeypatch.setattr(fcntl, "flock", flock)
  save(tmp_path, 1)
  assert steps_on_disk(tmp_path) == [1]


def test_reader_leaves_everything_as_it_is(tmp_path, capfd):
  save(tmp_path, 1, 2)
  flip_bit(tmp_path / "checkpoints" / "2")
  (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir()
  before = sorted(tmp_path.rglob("*"))
  assert CheckpointReader(tmp_path).latest() == 1
  assert "2 rejected: state/" in capfd.readouterr().err
  assert sorted(tmp_path.rglob("*")) == before


def test_latest_of_a_workdir_without_checkpoints(tmp_path):
  assert CheckpointReader(tmp_path / "nothing").latest() is None
  assert not (tmp_path / "nothing").exists()


def test_newest_and_multiples_are_kept(tmp_path):
  save(tmp_path, 1, 2, 3, 4, 5, keep=2, keep_every=2)
  assert steps_on_disk(tmp_path) == [2, 4, 5]
  save(tmp_path, 6, 7, keep=1, keep_every=4)
  assert steps_on_disk(tmp_path) == [4, 7]


def test_leftovers_of_a_killed_save_are_cleaned_up(tmp_path):
  leftover = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
  (leftover / "state").mkdir(parents=True)
  save(tmp_path, 1)
  assert steps_on_disk(tmp_path) == [1] and not leftover.exists()


def test_saving_a_step_twice_is_an_error(tmp_path):
  with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
    checkpointer.save(1, make_state(seed=1), META)
    with pytest.raises(CheckpointError, match="checkpoints/1 exists"):
      checkpointer.save(1, make_state(seed=2), META)
    assert_same(checkpointer.restore(1, abstract(make_state())), make_state(seed=1))


def test_older_step_can_be_saved_after_a_newer_one(tmp_path):
  save(tmp_path, 5, 2)
  assert steps_on_disk(tmp_path) == [2, 5]


def change(params, name, **changes):
  old = params[name]
  params[name] = jax.ShapeDtypeStruct(**{"shape": old.shape, "dtype": old.dtype, "sharding": old.sharding, **changes})


MISFITS = {
  "params/embed: checkpoint float32[8,4], expected bfloat16[8,4]": lambda p: change(p, "embed", dtype=jnp.bfloat16),
  "params/embed: checkpoint float32[8,4], expected float32[16,4]": lambda p: change(p, "embed", shape=(16, 4)),
  "params/head: checkpoint nothing, expected float32[8,4]": lambda p: p.update(head=p["embed"]),
  "params/embed: checkpoint float32[8,4], expected nothing": lambda p: p.pop("embed"),
}


@pytest.mark.parametrize("message", MISFITS)
def test_misfit_is_an_error_that_names_the_array(tmp_path, message):
  save(tmp_path, 3)
  target = {"params": abstract(make_state().params)}
  MISFITS[message](target["params"])
  with pytest.raises(CheckpointError) as error:
    CheckpointReader(tmp_path).restore(3, target)
  assert message in str(error.value)


def test_saved_entry_that_should_be_empty_is_an_error(tmp_path):
  save(tmp_path, 3)
  with pytest.raises(CheckpointError, match="params/embed: checkpoint float32.8,4., expected nothing"):
    CheckpointReader(tmp_path).restore(3, {"params": {}, "step": abstract(make_state().step)})


def test_long_list_of_misfits_is_cut(tmp_path):
  save(tmp_path, 3)
  target = {"other": {str(i): jax.ShapeDtypeStruct((1,), "int32") for i in range(20)}}
  with pytest.raises(CheckpointError, match="and 12 more"):
    CheckpointReader(tmp_path).restore(3, target)


def test_files_lost_after_the_check_are_a_checkpoint_error(tmp_path):
  save(tmp_path, 3)
  for path in (tmp_path / "checkpoints" / "3" / "state").rglob("d/*"):
    path.unlink()
  with pytest.raises(CheckpointError, match="checkpoints/3/state cannot be restored") as error:
    CheckpointReader(tmp_path).restore(3, abstract(make_state()))
  assert len(str(error.value)) < 1000


def test_missing_step(tmp_path):
  save(tmp_path, 3)
  for read in (lambda r: r.meta(4), lambda r: r.restore(4, {})):
    with pytest.raises(CheckpointError, match=r"no checkpoint 4 .* holds \[3\]"):
      read(CheckpointReader(tmp_path))


def test_newer_format_is_refused(tmp_path):
  with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
    checkpointer.save(1, make_state(), {**META, "format_version": FORMAT_VERSION + 1})
    checkpointer.wait()
    with pytest.raises(CheckpointError, match="update deepseek_jax"):
      checkpointer.meta(1)


@pytest.mark.parametrize(
  "content",
  [
    "",
    "[]",
    "{}",
    '{"format_version": "1"}',
    '{"format_version": null}',
    f'{{"format_version": {FORMAT_VERSION}, "config": {{}}}}',
  ],
)
def test_malformed_meta(tmp_path, content):
  save(tmp_path, 1)
  (tmp_path / "checkpoints" / "1" / "meta" / "metadata").write_text(content)
  with pytest.raises(CheckpointError, match="meta/metadata is not the JSON of a checkpoint"):
    CheckpointReader(tmp_path).meta(1)


def test_folder_that_cannot_be_written_is_an_error_at_once(tmp_path):
  (tmp_path / "checkpoints").write_text("a file")
  for workdir in (tmp_path, "/proc/run"):
    with pytest.raises(CheckpointError, match="cannot write to .*checkpoints: .*--workdir"):
      Checkpointer(workdir, CheckpointConfig())


def test_relative_workdir(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  save("run", 1)
  assert steps_on_disk(tmp_path / "run") == [1]


def test_a_save_without_rotation_deletes_nothing_and_the_next_one_does(tmp_path):
  with Checkpointer(tmp_path, CheckpointConfig(keep=2)) as checkpointer:
    for step, rotate in ((1, True), (2, True), (3, False), (4, False)):
      checkpointer.save(step, {"x": jnp.zeros(2)}, META, rotate=rotate)
    checkpointer.wait()
    assert checkpointer.steps() == [1, 2, 3, 4]
    checkpointer.save(5, {"x": jnp.zeros(2)}, META)
  assert CheckpointReader(tmp_path).steps() == [4, 5]


def test_going_back_sets_newer_steps_aside_and_refuses_what_is_missing_or_damaged(tmp_path, capsys):
  save(tmp_path, 1, 2, 3, 4)
  (tmp_path / "checkpoints" / "2" / "manifest.json").write_text("{}")
  with Checkpointer(tmp_path, CheckpointConfig(keep=9)) as checkpointer:
    with pytest.raises(CheckpointError, match=r"no checkpoint 7 in .* to resume from: it holds \[1, 2, 3, 4\]"):
      checkpointer.go_back_to(7)
    with pytest.raises(CheckpointError, match="checkpoints/2 cannot be resumed from: manifest.json is malformed"):
      checkpointer.go_back_to(2)
    assert checkpointer.steps() == [1, 2, 3, 4]
    assert checkpointer.go_back_to(3) == 3
    assert checkpointer.steps() == [1, 2, 3] and "4 is newer; moved to 4.rejected" in capsys.readouterr().err
    checkpointer.save(4, {"x": jnp.zeros(2)}, META)
