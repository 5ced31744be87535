"""Checkpoints on Orbax: WORKDIR/checkpoints/<step>/ holds state/ (arrays), meta/ (JSON) and manifest.json.

Orbax writes and reads arrays and renames a finished step into place. What it does not do is here: it restores flipped
bits, casts dtypes in silence, never falls back to an older step, and tells of a failed save only those who ask.
"""

import json
import os
import pathlib
import re
import sys
import tempfile

import jax
import orbax.checkpoint as ocp

from deepseek_jax.checkpoint import lock, manifest
from deepseek_jax.checkpoint.quiet import silence_orbax
from deepseek_jax.checkpoint.tree import check_fits, flatten, listing, nest
from deepseek_jax.distributed import broadcast_from_process0
from deepseek_jax.errors import CheckpointError
from deepseek_jax.renamed_fields import with_current_names

FORMAT_VERSION = 1
SAVE_SECONDS = 86_400  # Orbax's 20 minutes are too few to write terabytes and for process 0 to read them back
CHUNK_BYTES = 1 << 26  # at most this much is read or written for a part of an array
_REJECTED = re.compile(r"\d+\.rejected(-\d+)?")

silence_orbax()


class CheckpointReader:
  """Finds and reads checkpoints below `workdir`, a folder, without changing anything there, also while a run is writing more."""

  def __init__(self, workdir):
    self._directory = pathlib.Path(os.path.abspath(workdir), "checkpoints")

  def latest(self):
    """The newest step whose files are as its manifest says; None where none was ever saved.

    Newer ones are named on stderr with the reason. Process 0 reads and decides for all processes. Raises CheckpointError
    where there are checkpoints and none verifies: they stay as they are, and no run starts over on top of them.
    """
    return broadcast_from_process0(self._newest_verified)

  def meta(self, step):
    """The dict saved with `step`, its config with today's names of fields. Raises CheckpointError where it is missing, malformed or of a newer format."""
    where = f"{self._directory}/{step}"
    try:
      meta = json.loads(self._read(step, "meta/metadata"))
      version = meta["format_version"]
      newer = version > FORMAT_VERSION
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

  def restore(self, step, abstract):
    """Arrays of `step` as a tree like `abstract`: jax.ShapeDtypeStruct leaves with NamedShardings, on any mesh.

    `abstract` may hold part of what was saved, such as {"params": ...}; each entry that it has must match in full.
    Raises CheckpointError listing the arrays whose path, shape or dtype differ, or when a file cannot be read.
    """
    path, wanted = self.state(step), flatten(abstract)
    try:
      with ocp.PyTreeCheckpointer() as checkpointer:
        check_fits(path, flatten(checkpointer.metadata(path).item_metadata.tree), abstract)
        item = nest(wanted)
        args = ocp.args.PyTreeRestore(
          item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
        )
        arrays = flatten(checkpointer.restore(path, args=args))
    except CheckpointError:
      raise
    except Exception as error:
      raise CheckpointError(f"{path} cannot be restored: {_brief(error)}; if it is damaged, move it away") from error
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in wanted])

  def steps(self):
    """Steps on disk, whole or damaged, in order."""
    return sorted(int(name) for name in self._names() if name.isdecimal() and str(int(name)) == name)

  def state(self, step):
    """Folder of the arrays of `step`, for `arrays.open_arrays`."""
    return self._existing(step) / "state"

  def _existing(self, step):
    path = self._directory / str(step)
    if not path.is_dir():
      raise CheckpointError(f"no checkpoint {step} in {self._directory}: it holds {self.steps() or 'none'}")
    return path

  def _read(self, step, name):
    return (self._existing(step) / name).read_bytes()

  def _verify(self, step):
    """None where every file of `step` is as its manifest says, else why not."""
    return manifest.verify(self._directory / str(step))

  def _names(self):
    """Names in the folder of checkpoints: steps, and those set aside."""
    return os.listdir(self._directory) if self._directory.is_dir() else []

  def _newest_verified(self):
    """`latest`, of this process."""
    reasons = {}
    for step in reversed(self.steps()):
      reason = self._verify(step)
      if reason is None:
        for newer, why in reasons.items():
          print(f"checkpoint {self._directory}/{newer} rejected: {why}{self._set_aside(newer)}", file=sys.stderr)
        return step
      reasons[step] = reason
    unusable = [f"{step}: {reason}" for step, reason in reasons.items()]
    unusable += [f"{name}: set aside before" for name in sorted(self._names()) if _REJECTED.fullmatch(name)]
    if not unusable:
      return None
    raise CheckpointError(
      f"none of the checkpoints in {self._directory} can be used: {listing(unusable)}; to train from scratch again, move "
      "them out of that folder, or use another --workdir"
    )

  def _set_aside(self, step):
    """What has become of a rejected step, for the message: a reader leaves it where it is."""
    return ""


class Checkpointer(CheckpointReader):
  """Saves checkpoints as well. A context manager: leaving it waits for the pending save and raises its error."""

  def __init__(self, workdir, config):
    """`config`: a CheckpointConfig. Raises CheckpointError where `workdir` cannot be written or another run has it."""
    super().__init__(workdir)
    try:
      self._directory.mkdir(parents=True, exist_ok=True)
      with tempfile.TemporaryFile(dir=self._directory) as probe:
        probe.write(b"probe")
      # Of a run on several hosts one process stands for all.
      self._lock = lock.hold(self._directory) if jax.process_index() == 0 else None
    except OSError as error:
      raise CheckpointError(f"cannot write to {self._directory}: {error.strerror}; use another --workdir") from None
    self._saving = None
    self._manager = ocp.CheckpointManager(
      self._directory, handler_registry=_handlers(), options=_options(config, self._write_manifest)
    )

  def __enter__(self):
    return self

  def __exit__(self, kind, *exception):
    # Of several processes the others would be waited for, which need not have failed: this one is to end.
    if kind is None or jax.process_count() == 1:
      self.close()

  def save(self, step, state, meta):
    """Starts to save `state` (a tree of arrays) and `meta` (a dict for JSON); both may change once this returns.

    Waits for the save before it first. Raises CheckpointError where that one or this one fails, or where `step` exists.
    """
    self.wait()
    if step in self.steps():
      raise CheckpointError(f"checkpoint {self._directory / str(step)} exists: restore it, or use another --workdir")
    flat = flatten(state)
    items = ocp.args.Composite(
      state=ocp.args.PyTreeSave(nest(flat), save_args=nest({path: _chunks(path, a) for path, a in flat.items()})),
      meta=ocp.args.JsonSave(json.loads(json.dumps(meta))),
    )
    self._saving = step
    try:
      self._manager.save(step, args=items, force=True)
    except Exception as error:
      raise self._failed(error) from error

  def wait(self):
    """Returns once the pending save is on disk with its manifest. Raises CheckpointError where it failed."""
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      raise self._failed(error) from error

  def check(self):
    """Raises CheckpointError where the pending save is known to have failed; does not wait for it."""
    try:
      self._manager.check_for_errors()
    except Exception as error:
      raise self._failed(error) from error

  def close(self):
    """Waits for the pending save, raising its error, and lets go of Orbax's threads and of the workdir."""
    try:
      self.wait()
    finally:
      self._manager.close()
      if self._lock:
        self._lock.close()

  def latest(self):
    """As the reader's; newer steps that do not verify are also renamed, so that they can be saved again."""
    self.wait()
    step = super().latest()
    self._manager.reload()
    return step

  def _set_aside(self, step):
    path, number = self._directory / f"{step}.rejected", 1
    while path.exists():
      number += 1
      path = self._directory / f"{step}.rejected-{number}"
    (self._directory / str(step)).rename(path)
    return f"; moved to {path.name}"

  def _write_manifest(self):
    # Orbax calls this once the files are complete, before it renames the step into place: none is ever without it.
    manifest.write(self._directory / f"{self._saving}{ocp.path.atomicity.TMP_DIR_SUFFIX}")

  def _failed(self, error):
    self._manager.reload()
    return CheckpointError(
      f"checkpoint {self._directory / str(self._saving)} could not be saved: {_brief(error)}; older ones are unharmed; "
      "make room, or use another --workdir"
    )


def _handlers():
  # zstd saves 8 % of float noise and costs five sixths of the speed: 57 MiB/s against 342.
  state, meta = ocp.PyTreeCheckpointHandler(use_compression=False), ocp.JsonCheckpointHandler()
  registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
  registry.add("state", ocp.args.PyTreeSave, state)
  registry.add("meta", ocp.args.JsonSave, meta)
  return registry


def _chunks(path, array):
  return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=shard_axes(path, array))


def shard_axes(path, array):
  """Axes along which chunks have one element, so that each is of one layer, or one expert of it: a conversion reads
  these, and a chunk is only ever read whole."""
  stacked = array.ndim > 2 and any(name.endswith("_layers") for name in path)
  return (0, 1) if stacked and "experts" in path else (0,) if stacked else ()


def _options(config, write_manifest):
  policies = ocp.checkpoint_managers
  preserved = [policies.LatestN(config.keep)]
  if config.keep_every:
    preserved.append(policies.EveryNSteps(config.keep_every))
  return ocp.CheckpointManagerOptions(
    preservation_policy=policies.AnyPreservationPolicy(preserved),
    cleanup_tmp_directories=True,
    async_options=ocp.options.AsyncOptions(
      timeout_secs=SAVE_SECONDS,
      post_finalization_callback=write_manifest,
      barrier_sync_fn=_barrier if jax.process_count() > 1 else None,
    ),
  )


def _barrier(*, key, timeout_ms):
  """Orbax's own, but in a process whose save has failed: in a `finally`, Orbax would wait SAVE_SECONDS for the others."""
  if failure := sys.exc_info()[1]:
    raise failure
  ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def _brief(error):
  """The first line of an error without TensorStore's annotations; of a long one its ends: what failed, and why."""
  line = re.split(r" \[\w+='", (str(error).strip().splitlines() or [""])[0])[0]
  return f"{type(error).__name__}: {line if len(line) < 250 else line[:100] + ' ... ' + line[-140:]}"
