"""Checkpoints on Orbax: WORKDIR/checkpoints/<step>/ holds state/ (arrays), meta/ (JSON) and manifest.json.

Orbax writes and reads arrays, and renames a finished step into place. This module adds what Orbax lacks: it restores
damaged arrays and casts dtypes without an error, never falls back to an older step, and reports a failed save only on
request.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp

from deepseek_jax.checkpoint import lock, manifest
from deepseek_jax.checkpoint.compatibility import saved_value
from deepseek_jax.checkpoint.orbax_logging import silence_orbax
from deepseek_jax.checkpoint.tree import TreePath, check_arrays_match, flatten_tree, list_first, unflatten_to_dicts
from deepseek_jax.config_sections import CheckpointConfig
from deepseek_jax.console import current_console
from deepseek_jax.distributed import broadcast_from_process0
from deepseek_jax.errors import CheckpointError
from deepseek_jax.renamed_fields import with_current_names
from deepseek_jax.typing import PyTree

FORMAT_VERSION = 1
SAVE_TIMEOUT_SECONDS = 86_400  # Orbax's 20 minutes are too few to write terabytes and for process 0 to read them back
CHUNK_BYTES = 1 << 26  # the most that is read or written at once for a slice of an array
_REJECTED = re.compile(r"\d+\.rejected(-\d+)?")

silence_orbax()


class CheckpointReader:
  """Finds and reads checkpoints below `workdir`, a folder.

  Changes nothing there; a run may write more at the same time.
  """

  def __init__(self, workdir: str | os.PathLike):
    self._directory: Any = pathlib.Path(os.path.abspath(workdir), "checkpoints")  # of a bucket: the URL

  def latest(self) -> int | None:
    """The newest step whose files match its manifest; None where no step was ever saved.

    Prints newer steps to stderr, with the reason for which they were rejected. Process 0 reads and decides for all
    processes. Raises CheckpointError where there are checkpoints and none verifies: no run may start from scratch then.
    """
    return broadcast_from_process0(self._newest_verified)

  def latest_before(self, step: int) -> int | None:
    """As `latest`, of the checkpoints before `step`; None where there are none."""
    return broadcast_from_process0(lambda: self._newest_verified(step))

  def meta(self, step: int) -> dict[str, Any]:
    """The dict saved with `step`; its config has the current names of fields.

    "tokens", those seen, is samples times data.seq where a version before the count was stored saved it.

    Raises CheckpointError where it is missing, malformed or of a newer format.
    """
    where = f"{self._directory}/{step}"
    try:
      meta = json.loads(self._read(step, "meta/metadata"))
      version = meta["format_version"]
      newer = version > FORMAT_VERSION
      if not newer and "config" in meta and "tokens" not in meta:
        meta["tokens"] = meta["samples"] * saved_value(with_current_names(meta["config"]), "data.seq")
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise CheckpointError(
        f"{where}/meta/metadata is not the JSON of a checkpoint ({error!r}): remove {where}"
      ) from None
    if newer:
      raise CheckpointError(
        f"{where} has format_version {version}, this code reads up to {FORMAT_VERSION}: update deepseek_jax"
      )
    if "config" in meta:
      meta["config"] = with_current_names(meta["config"])
    return meta

  def restore(self, step: int, abstract: PyTree) -> PyTree:
    """Arrays of `step` as a tree like `abstract`: jax.ShapeDtypeStruct leaves with NamedShardings, on any mesh.

    `abstract` may have some of the top-level entries that were saved, such as {"params": ...}; each must match in full.
    Raises CheckpointError listing the arrays whose path, shape or dtype differ, or when a file cannot be read.
    """
    path, expected = self.state_folder(step), flatten_tree(abstract)
    try:
      with ocp.PyTreeCheckpointer() as checkpointer:
        check_arrays_match(path, flatten_tree(checkpointer.metadata(path).item_metadata.tree), abstract)
        item = unflatten_to_dicts(expected)
        args = ocp.args.PyTreeRestore(
          item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
        )
        arrays = flatten_tree(checkpointer.restore(path, args=args))
    except CheckpointError:
      raise
    except Exception as error:
      raise CheckpointError(
        f"{path} cannot be restored: {_first_line(error)}; if it is damaged, move it away"
      ) from error
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in expected])

  def steps(self) -> list[int]:
    """Steps on disk, verified or not, in order."""
    return sorted(int(name) for name in self._names() if name.isdecimal() and str(int(name)) == name)

  def state_folder(self, step: int) -> pathlib.Path:
    """Folder of the arrays of `step`, for `arrays.open_arrays`. Raises CheckpointError where there is none."""
    return self._step_folder(step) / "state"

  def _step_folder(self, step: int) -> pathlib.Path:
    path = self._directory / str(step)
    if not path.is_dir():
      raise CheckpointError(f"no checkpoint {step} in {self._directory}: it holds {self.steps() or 'none'}")
    return path

  def _read(self, step: int, name: str) -> bytes:
    return (self._step_folder(step) / name).read_bytes()

  def _verify(self, step: int) -> str | None:
    """None where every file of `step` matches its manifest, else how it differs."""
    return manifest.verify(self._directory / str(step))

  def _names(self) -> list[str]:
    """Names in the folder of checkpoints: steps, and rejected ones that were renamed."""
    return os.listdir(self._directory) if self._directory.is_dir() else []

  def _newest_verified(self, before: int | None = None) -> int | None:
    """`latest`, or `latest_before`, of this process."""
    reasons: dict[int, str] = {}
    for step in reversed([step for step in self.steps() if before is None or step < before]):
      reason = self._verify(step)
      if reason is None:
        for newer, why in reasons.items():
          rejected = f"checkpoint {self._directory}/{newer} rejected: {why}{self._rename_rejected(newer)}"
          current_console().print(rejected, err=True)
        return step
      reasons[step] = reason
    unusable = [f"{step}: {reason}" for step, reason in reasons.items()]
    if before is None:
      unusable += [f"{name}: rejected before" for name in sorted(self._names()) if _REJECTED.fullmatch(name)]
    if not unusable:
      return None
    raise CheckpointError(
      f"none of the checkpoints in {self._directory} can be used: {list_first(unusable)}; to train from scratch again, move "
      "them out of that folder, or use another --workdir"
    )

  def _go_back_to(self, step: int) -> None:
    """`go_back_to`, of process 0 for all."""

    def check_and_rename() -> None:
      steps = self.steps()
      if step not in steps:
        raise CheckpointError(f"no checkpoint {step} in {self._directory} to resume from: it holds {steps or 'none'}")
      if reason := self._verify(step):
        raise CheckpointError(
          f"checkpoint {self._directory}/{step} cannot be resumed from: {reason}; use one of {steps}"
        )
      for newer in steps[steps.index(step) + 1 :]:
        current_console().print(
          f"checkpoint {self._directory}/{newer} is newer{self._rename_rejected(newer)}", err=True
        )

    broadcast_from_process0(check_and_rename)

  def _rename_rejected(self, step: int) -> str:
    """Renames a rejected step, and returns the end of the message that says so. A reader leaves it where it is."""
    return ""


class Checkpointer(CheckpointReader):
  """Saves checkpoints as well. A context manager: leaving it waits for the pending save and raises its error."""

  def __init__(self, workdir: str | os.PathLike, config: CheckpointConfig, kept: Collection[int] = ()):
    """kept: steps that are never deleted. Raises CheckpointError where `workdir` cannot be written, or another run trains there."""
    super().__init__(workdir)
    try:
      self._directory.mkdir(parents=True, exist_ok=True)
      with tempfile.TemporaryFile(dir=self._directory) as probe:
        probe.write(b"probe")
      # In a run of several processes, process 0 holds the lock for all.
      self._lock = lock.lock_workdir(self._directory) if jax.process_index() == 0 else None
    except OSError as error:
      raise CheckpointError(f"cannot write to {self._directory}: {error.strerror}; use another --workdir") from None
    self._saving_step: int | None = None
    self._rotation = _Rotation(config, kept)
    self._manager = ocp.CheckpointManager(
      self._directory, handler_registry=_handler_registry(), options=_options(self._rotation, self._write_manifest)
    )

  def __enter__(self):
    return self

  def __exit__(self, kind, *exception):
    # After an error in one of several processes `close` would wait for the others, which may not have failed.
    if kind is None or jax.process_count() == 1:
      with close_after(kind):
        self.close()

  def save(self, step: int, state: PyTree, meta: dict[str, Any], rotate: bool = True) -> None:
    """Starts to save `state` (a tree of arrays) and `meta` (a dict for JSON); both may change once this returns.

    rotate: delete the older steps that the config does not keep.

    Waits for the previous save first. Raises CheckpointError where that one or this one fails, or where `step` exists.
    """
    self.wait()
    if step in self.steps():
      raise CheckpointError(f"checkpoint {self._directory / str(step)} exists: restore it, or use another --workdir")
    flat = flatten_tree(state)
    save_args = {path: _save_args(path, array) for path, array in flat.items()}
    items = ocp.args.Composite(
      state=ocp.args.PyTreeSave(unflatten_to_dicts(flat), save_args=unflatten_to_dicts(save_args)),
      meta=ocp.args.JsonSave(json.loads(json.dumps(meta))),
    )
    self._saving_step, self._rotation.paused = step, not rotate
    try:
      self._manager.save(step, args=items, force=True)
    except Exception as error:
      raise self._failed(error) from error

  def wait(self) -> None:
    """Returns once the pending save is on disk with its manifest. Raises CheckpointError where it failed."""
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      raise self._failed(error) from error

  def check(self) -> None:
    """Raises CheckpointError where the pending save is known to have failed; does not wait for it."""
    try:
      self._manager.check_for_errors()
    except Exception as error:
      raise self._failed(error) from error

  def close(self) -> None:
    """Waits for the pending save, raising its error; then ends Orbax's threads and unlocks the workdir."""
    try:
      self.wait()
    finally:
      self._manager.close()
      if self._lock:
        self._lock.close()

  def latest(self) -> int | None:
    """As the reader's; newer steps that do not verify are also renamed, so that they can be saved again."""
    self.wait()
    step = super().latest()
    self._manager.reload()
    return step

  def go_back_to(self, step: int) -> int:
    """Returns `step` once it verifies; newer ones are renamed as rejected, so that the run can save them again.

    All processes have to call this. Raises CheckpointError where there is no such step, or it is damaged.
    """
    self.wait()
    self._go_back_to(step)
    self._manager.reload()
    return step

  def _rename_rejected(self, step: int) -> str:
    path, number = self._directory / f"{step}.rejected", 1
    while path.exists():
      number += 1
      path = self._directory / f"{step}.rejected-{number}"
    (self._directory / str(step)).rename(path)
    return f"; moved to {path.name}"

  def _write_manifest(self) -> None:
    # Orbax calls this when the files are complete and before it renames the step into place: no step is without
    # manifest.
    manifest.write_manifest(self._unfinished_folder())

  def _unfinished_folder(self) -> pathlib.Path:
    return self._directory / f"{self._saving_step}{ocp.path.atomicity.TMP_DIR_SUFFIX}"

  def _failed(self, error: Exception) -> CheckpointError:
    if jax.process_count() == 1:  # the room is needed for the run's last event and report
      shutil.rmtree(self._unfinished_folder(), ignore_errors=True)
    self._manager.reload()
    return CheckpointError(
      f"checkpoint {self._directory / str(self._saving_step)} could not be saved: {_first_line(error)}; older ones are unharmed; "
      "make room, or use another --workdir"
    )


def _handler_registry() -> ocp.handlers.DefaultCheckpointHandlerRegistry:
  # zstd saves 8 % of float noise and costs five sixths of the speed: 57 MiB/s against 342.
  state, meta = ocp.PyTreeCheckpointHandler(use_compression=False), ocp.JsonCheckpointHandler()
  registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
  registry.add("state", ocp.args.PyTreeSave, state)
  registry.add("meta", ocp.args.JsonSave, meta)
  return registry


def _save_args(path: TreePath, array: jax.Array) -> ocp.SaveArgs:
  return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=chunk_axes(path, array))


def chunk_axes(path: TreePath, array: jax.Array) -> tuple[int, ...]:
  """Axes along which a chunk has one element: that of layers, and that of experts.

  A conversion reads one layer or expert at a time, and a chunk cannot be read in part.
  """
  stacked = array.ndim > 2 and any(name.endswith("_layers") for name in path)
  if not stacked:
    return ()
  return (0, 1) if "experts" in path else (0,)


@contextlib.contextmanager
def close_after(kind: type[BaseException] | None) -> Iterator[None]:
  """Closes a checkpointer in the block, after an exception of type `kind`, or None.

  That exception is the one to be raised, not what becomes of a pending save.
  """
  try:
    yield
  except CheckpointError:
    if kind is None:
      raise


class _Rotation:
  """Which steps Orbax keeps: those of the config and `kept`, or all while `paused`."""

  def __init__(self, config: CheckpointConfig, kept: Collection[int]):
    policies = ocp.checkpoint_managers
    preserved = [policies.LatestN(config.keep), policies.CustomSteps(list(kept))]
    if config.keep_every:
      preserved.append(policies.EveryNSteps(config.keep_every))
    self.paused, self._policy = False, policies.AnyPreservationPolicy(preserved)

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
    """Of Orbax's PreservationPolicy."""
    return [self.paused or kept for kept in self._policy.should_preserve(checkpoints, context=context)]


def _options(rotation: _Rotation, write_manifest: Callable[[], None]) -> ocp.CheckpointManagerOptions:
  return ocp.CheckpointManagerOptions(
    preservation_policy=rotation,
    cleanup_tmp_directories=True,
    async_options=ocp.options.AsyncOptions(
      timeout_secs=SAVE_TIMEOUT_SECONDS,
      post_finalization_callback=write_manifest,
      barrier_sync_fn=_barrier if jax.process_count() > 1 else None,
    ),
  )


def _barrier(*, key: str, timeout_ms: int) -> None:
  """Orbax's barrier, except in a process whose save has failed: there it raises the error again.

  Orbax calls it in a `finally`, and would wait SAVE_TIMEOUT_SECONDS for the other processes.
  """
  if failure := sys.exc_info()[1]:
    raise failure
  ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def _first_line(error: Exception) -> str:
  """The first line of an error without TensorStore's annotations. A long line is cut in the middle."""
  first_line = (str(error).strip().splitlines() or [""])[0]
  line = re.split(r" \[\w+='", first_line)[0]
  if len(line) >= 250:
    line = f"{line[:100]} ... {line[-140:]}"
  return f"{type(error).__name__}: {line}"
