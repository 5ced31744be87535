"""Checkpoints below gs:// and s3://.

Their files are those of a local one: WORKDIR/checkpoints/<step>/{state/,meta/,manifest.json}.

- A workdir can be copied to a bucket, and back.
- Arrays are OCDBT as Orbax writes it. Each process writes and reads only what its devices hold, directly to and from
  the bucket; `storage` says why not through Orbax.
- Buckets have no rename: a step exists while it has a manifest, which is written last and deleted first.
- A save holds up to two copies of what the process writes in host memory, and reads it back for the checksums.
"""

import concurrent.futures
import json
import math
import os
import time
import zlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
import tensorstore as ts

from deepseek_jax.checkpoint import manifest
from deepseek_jax.checkpoint.arrays import array_spec, open_arrays_in, tree_metadata
from deepseek_jax.checkpoint.manager import CHUNK_BYTES, Checkpointer, CheckpointReader, chunk_axes, close_after
from deepseek_jax.checkpoint.tree import TreePath, check_arrays_match, flatten_tree
from deepseek_jax.config_sections import CheckpointConfig
from deepseek_jax.distributed import barrier, broadcast_from_process0
from deepseek_jax.errors import CheckpointError, StorageError
from deepseek_jax.storage import ObjectStore, describe_error, is_url, map_parallel
from deepseek_jax.typing import PyTree

_REJECTED = f"{manifest.NAME}.rejected"
_LIST_END = "~"  # sorts after all checkpoints of a run: a list without it is truncated, for which there is no error
_FILE_BYTES = 1 << 27  # size of a file of arrays: a check reads one into memory
_POLL_SECONDS = 0.2
# Inline values, node size and compression as Orbax has them; files that fit in memory when they are checked.
_OCDBT = {
  "config": {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": 100_000_000, "compression": {"id": "zstd"}},
  "target_data_file_size": _FILE_BYTES,
}


ArrayShapes = Mapping[TreePath, tuple[tuple[int, ...], np.dtype, list[int]]]  # (shape, dtype, chunk shape)
HostShards = Mapping[TreePath, list[tuple[tuple[slice, ...], np.ndarray]]]  # [(index in the array, value)]


def open_reader(workdir: str | os.PathLike) -> CheckpointReader:
  """A CheckpointReader of `workdir`, a folder or a URL."""
  return BucketReader(workdir) if is_url(workdir) else CheckpointReader(workdir)


def open_checkpointer(
  workdir: str | os.PathLike, config: CheckpointConfig, kept: Collection[int] = ()
) -> "Checkpointer | BucketCheckpointer":
  """A Checkpointer of `workdir`, a folder or a URL. kept: steps that are never deleted."""
  return BucketCheckpointer(workdir, config, kept) if is_url(workdir) else Checkpointer(workdir, config, kept)


class BucketReader(CheckpointReader):
  """As CheckpointReader, of a URL.

  A bucket that cannot be reached is a StorageError, never a reason to reject a step.
  """

  def __init__(self, workdir: str | os.PathLike):
    self._workdir_store = ObjectStore(workdir)
    self._store = ObjectStore(f"{self._workdir_store.url}/checkpoints")
    self._directory = self._store.url

  def restore(self, step: int, abstract: PyTree) -> PyTree:
    """As CheckpointReader's; each process reads only what its devices hold, one array after another."""
    where, expected = f"{self._directory}/{step}/state", flatten_tree(abstract)
    kvstore, context = self._store.kvstore(f"{step}/state")
    try:
      arrays = open_arrays_in(kvstore, self._read(step, "state/_METADATA"), context)
      stored = {path: jax.ShapeDtypeStruct(a.shape, a.dtype.numpy_dtype) for path, a in arrays.items()}
      check_arrays_match(where, stored, abstract)
      leaves = [_read_sharded(arrays[path], leaf) for path, leaf in expected.items()]
    except (KeyError, TypeError) as error:
      raise CheckpointError(f"{where} does not hold the arrays of a checkpoint: {error!s:.300}") from None
    except (ValueError, RuntimeError) as error:
      raise StorageError(f"{where} cannot be read: {describe_error(error)}") from None
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)

  def state_folder(self, step: int) -> NoReturn:
    """Raises CheckpointError: the state is not in a folder."""
    raise CheckpointError(f"{self._directory}/{step}/state is in a bucket: copy the workdir to a local folder first")

  def _read(self, step: int, name: str) -> bytes:
    content = self._store.read(f"{step}/{name}")
    if content is None:
      raise CheckpointError(f"no {name} of checkpoint {step} in {self._directory}: it holds {self.steps() or 'none'}")
    return content

  def _names(self) -> list[str]:
    names = []
    for name in self._list_objects():
      if name.endswith(f"/{manifest.NAME}"):
        names.append(name.removesuffix(f"/{manifest.NAME}"))
      elif name.endswith(f"/{_REJECTED}"):
        names.append(name.removesuffix(f"/{_REJECTED}") + ".rejected")
    return names

  def _list_objects(self) -> list[str]:
    """Names of all objects of all checkpoints. Raises StorageError where the list is known to be incomplete."""
    names = self._store.list_names()
    if not names and self._workdir_store.read("config.json") is not None:
      raise self._truncated_list()
    return names

  def _truncated_list(self) -> StorageError:
    return StorageError(f"{self._directory} has objects but lists none, or not all: allow listing of the bucket")

  def _verify(self, step: int) -> str | None:
    content = self._store.read(f"{step}/{manifest.NAME}")
    listed, reason = manifest.from_json_bytes(content or b"")
    if listed is None:
      return reason
    names = {name.removeprefix(f"{step}/") for name in self._list_objects() if name.startswith(f"{step}/")}
    if reason := manifest.compare_names(listed, names - manifest.UNLISTED - {_REJECTED}):
      return reason
    for name, actual in self._checksums(step, listed).items():
      if actual != listed[name]:
        return f"{name} has (size, checksum) {actual}, {manifest.NAME} says {listed[name]}"
    return None

  def _checksums(self, step: int, names: Iterable[str]) -> dict[str, tuple[int, str]]:
    """{name: (size, crc32)} of objects of a step, read in full."""

    def read(name: str) -> tuple[int, str]:
      content = self._store.read(f"{step}/{name}") or b""
      return len(content), f"{zlib.crc32(content):08x}"

    return map_parallel(read, list(names))


class BucketCheckpointer(BucketReader):
  """As Checkpointer, of a URL: a thread writes while training goes on. No lock keeps two runs apart, but a step that
  another run has saved is never replaced."""

  def __init__(self, workdir: str | os.PathLike, config: CheckpointConfig, kept: Collection[int] = ()):
    super().__init__(workdir)
    self._config, self._kept = config, kept
    self._saving_step: int | None = None
    self._pending: concurrent.futures.Future[None] | None = None
    self._thread = concurrent.futures.ThreadPoolExecutor(1)
    broadcast_from_process0(lambda: self._store.write(_LIST_END, b""))

  def __enter__(self):
    return self

  def __exit__(self, kind, *exception):
    # As Checkpointer's: after an error a single process still completes its save; one of several must not wait for
    # others.
    if kind is None or jax.process_count() == 1:
      with close_after(kind):
        self.close()

  def save(self, step: int, state: PyTree, meta: dict[str, Any], rotate: bool = True) -> None:
    """As Checkpointer's. All processes call it, and process 0 completes the step when all have written their shards."""
    self.wait()
    broadcast_from_process0(lambda: self._delete_unfinished(step))
    flat = flatten_tree(state)
    for array in flat.values():
      array.copy_to_host_async()
    host_shards = {path: _host_shards(array) for path, array in flat.items()}
    shapes = {path: (array.shape, array.dtype, _chunk_shape(path, array)) for path, array in flat.items()}
    self._saving_step = step
    self._pending = self._thread.submit(self._write, step, shapes, host_shards, json.dumps(meta).encode(), rotate)

  def wait(self) -> None:
    """Returns once the pending save is complete, on all processes. Raises CheckpointError where it failed."""
    pending, self._pending = self._pending, None
    try:
      if pending:
        pending.result()
    except jax.errors.JaxRuntimeError:
      raise  # another process has ended, and printed its reason
    except (StorageError, ValueError, RuntimeError) as error:
      where = f"{self._directory}/{self._saving_step}"
      reason = error if isinstance(error, StorageError) else describe_error(error)
      raise CheckpointError(f"checkpoint {where} could not be saved: {reason}; older ones are unharmed") from None

  def check(self) -> None:
    """Raises CheckpointError where the pending save has failed; does not wait for it."""
    if self._pending and self._pending.done():
      self.wait()

  def close(self) -> None:
    """Waits for the pending save, raising its error."""
    try:
      self.wait()
    finally:
      self._thread.shutdown()

  def latest(self) -> int | None:
    """As the reader's; newer steps that do not verify also lose their manifest, so that they can be saved again."""
    self.wait()
    return super().latest()

  def go_back_to(self, step: int) -> int:
    """As Checkpointer's."""
    self.wait()
    self._go_back_to(step)
    return step

  def _list_objects(self) -> list[str]:
    names = self._store.list_names()
    if _LIST_END not in names:
      raise self._truncated_list()
    return names

  def _rename_rejected(self, step: int) -> str:
    self._store.write(f"{step}/{_REJECTED}", self._read(step, manifest.NAME))
    self._store.delete(f"{step}/{manifest.NAME}")
    return f"; its manifest is now {_REJECTED}"

  def _delete_unfinished(self, step: int) -> None:
    """Deletes the objects of an unfinished save of `step`. Raises CheckpointError where that step is complete."""
    if self._store.read(f"{step}/{manifest.NAME}") is not None:
      raise CheckpointError(f"checkpoint {self._directory}/{step} exists: restore it, or use another --workdir")
    self._store.delete_prefix(f"{step}/")
    self._store.delete_prefix(f"{step}.parts/")

  def _write(self, step: int, shapes: ArrayShapes, host_shards: HostShards, meta: bytes, rotate: bool) -> None:
    """Runs in the thread: no collectives here, because the main thread runs its own at the same time."""
    process = jax.process_index()
    folder = f"state/ocdbt.process_{process}"
    kvstore, context = self._store.kvstore(f"{step}/{folder}")
    _write_arrays(kvstore, context, shapes, host_shards)
    files = self._checksums(step, self._list_step(step, f"{folder}/", f"{folder}/manifest.ocdbt"))
    if process:
      self._store.write(f"{step}.parts/{process}", json.dumps(files).encode())
    else:
      self._complete(step, shapes, files, meta, rotate)
    barrier(f"checkpoint {step}")  # in this thread: the main thread would wait in a collective, which times out

  def _complete(
    self, step: int, shapes: ArrayShapes, files: dict[str, tuple[int, str]], meta: bytes, rotate: bool
  ) -> None:
    """Process 0: completes a step when all have written their shards; `files` are its own, {name: (size, crc32)}."""
    count = jax.process_count()
    for other in range(1, count):  # where one of them dies, jax.distributed ends this one too
      while (their_files := self._store.read(f"{step}.parts/{other}")) is None:
        time.sleep(_POLL_SECONDS)
      files |= json.loads(their_files)
    self._merge(step, count)
    self._store.write(f"{step}/meta/metadata", meta)
    self._store.write(f"{step}/state/_METADATA", json.dumps(tree_metadata(shapes, ocdbt=True)).encode())
    last_name = f"state/ocdbt.process_{max(map(str, range(count)))}/manifest.ocdbt"
    others = [name for name in self._list_step(step, "", last_name) if name not in files]
    checksums = {name: (size, crc) for name, (size, crc) in files.items()} | self._checksums(step, others)
    self._store.write_if_absent(f"{step}/{manifest.NAME}", manifest.to_json_text(checksums).encode())
    self._store.delete_prefix(f"{step}.parts/")
    if rotate:
      self._delete_old()

  def _list_step(self, step: int, prefix: str, expected: str) -> list[str]:
    """Names below `step` that start with `prefix`. `expected` was written: a list without it is truncated."""
    names = [name.removeprefix(f"{step}/") for name in self._store.list_names(f"{step}/{prefix}")]
    if expected not in names:
      raise self._truncated_list()
    return names

  def _merge(self, step: int, count: int) -> None:
    """One OCDBT database from those of the processes, whose files it refers to."""
    base, context = self._store.kvstore(f"{step}/state")
    merged = ts.KvStore.open({"driver": "ocdbt", "base": base, **_OCDBT}, context=context).result()
    transaction = ts.Transaction(atomic=True)
    for process in range(count):
      of_process = base | {"path": f"{base['path']}ocdbt.process_{process}/"}
      database = ts.KvStore.open({"driver": "ocdbt", "base": of_process}, context=context).result()
      database.experimental_copy_range_to(merged.with_transaction(transaction)).result()
    transaction.commit_async().result()

  def _delete_old(self) -> None:
    """Deletes the steps that are not to be kept."""
    every = self._config.keep_every
    for step in self.steps()[: -self._config.keep]:
      if (not every or step % every) and step not in self._kept:
        self._store.delete(f"{step}/{manifest.NAME}")
        self._store.delete_prefix(f"{step}/")


def _host_shards(array: jax.Array) -> list[tuple[tuple[slice, ...], np.ndarray]]:
  """[(index, value on the host)] of the shards of `array` that this process writes: the first of its replicas.

  On CPU a value is a view of the buffer, and jax does not donate a buffer to the next update while it has a view.
  """
  shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
  return [(shard.index, np.asarray(shard.data)) for shard in shards]


def _chunk_shape(path: TreePath, array: jax.Array) -> list[int]:
  """Shape of a chunk: inside one shard, because two processes must not write one chunk; of one layer and one expert."""
  chunk = list(array.sharding.shard_shape(array.shape))
  for axis in chunk_axes(path, array):
    chunk[axis] = 1
  for axis, size in enumerate(chunk):
    max_size = max(1, CHUNK_BYTES * size // max(1, math.prod(chunk) * array.dtype.itemsize))
    chunk[axis] = max((d for d in range(1, min(size, max_size) + 1) if size % d == 0), default=1)
  return chunk


def _write_arrays(base: dict[str, Any], context: ts.Context, shapes: ArrayShapes, host_shards: HostShards) -> None:
  """Writes in one transaction: each commit writes a manifest of the database, and GCS allows one a second."""
  transaction, futures = ts.Transaction(atomic=True), {}
  for path, (shape, dtype, chunk) in shapes.items():
    spec = array_spec(base, path, ocdbt=True)
    spec["kvstore"] |= _OCDBT
    spec |= {"metadata": {"chunks": chunk, "compressor": None}, "store_data_equal_to_fill_value": True}
    futures[path] = ts.open(
      spec, dtype=ts.dtype(dtype), shape=shape, create=True, open=True, context=context, transaction=transaction
    )
  for path, future in futures.items():
    array = future.result()
    for index, value in host_shards[path]:
      array[index].write(value, can_reference_source_data_indefinitely=True).result()
  transaction.commit_async().result()


def _read_sharded(array: ts.TensorStore, abstract: jax.ShapeDtypeStruct) -> jax.Array:
  """`array` with the sharding of `abstract`. A shard is read once, for all its replicas in this process."""
  assert abstract.sharding is not None
  indices = abstract.sharding.addressable_devices_indices_map(abstract.shape)
  reads = {str(index): array[index].read() for index in {str(i): i for i in indices.values()}.values()}
  return jax.make_array_from_callback(abstract.shape, abstract.sharding, lambda index: reads[str(index)].result())
