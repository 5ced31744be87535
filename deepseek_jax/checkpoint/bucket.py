"""Checkpoints below gs:// and s3://, laid out as on disk: WORKDIR/checkpoints/<step>/ with state/, meta/ and manifest.json.

A folder that is copied to a bucket, or back, is a workdir there. Arrays are OCDBT as Orbax writes it, and each process
writes and reads only what its devices hold, straight from and to the bucket; `storage` says why not through Orbax.
Buckets have no rename: a step is one from when it has a manifest, which is written last and removed first.
A save holds up to two copies of what the process writes in host memory, and reads it back for the checksums.
"""

import concurrent.futures
import json
import math
import time
import zlib

import jax
import numpy as np
import tensorstore as ts

from deepseek_jax.checkpoint import manifest
from deepseek_jax.checkpoint.arrays import array_spec, open_below, tree_metadata
from deepseek_jax.checkpoint.manager import CHUNK_BYTES, Checkpointer, CheckpointReader, shard_axes
from deepseek_jax.checkpoint.tree import check_fits, flatten
from deepseek_jax.distributed import barrier, broadcast_from_process0
from deepseek_jax.errors import CheckpointError, StorageError
from deepseek_jax.storage import ObjectStore, describe_error, is_url, map_parallel

_REJECTED = f"{manifest.NAME}.rejected"
_END = "~"  # an object that every list of the checkpoints of a run ends with, for a list may be cut short in silence
_FILE_BYTES = 1 << 27  # of a file of arrays: what is read at once to be checked
_POLL_SECONDS = 0.2
# Inline values, node size and compression as Orbax has them; files that fit in memory when they are checked.
_OCDBT = {
  "config": {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": 100_000_000, "compression": {"id": "zstd"}},
  "target_data_file_size": _FILE_BYTES,
}


def open_reader(workdir):
  """A CheckpointReader of `workdir`, a folder or a URL."""
  return BucketReader(workdir) if is_url(workdir) else CheckpointReader(workdir)


def open_checkpointer(workdir, config):
  """A Checkpointer of `workdir`, a folder or a URL; `config`: a CheckpointConfig."""
  return BucketCheckpointer(workdir, config) if is_url(workdir) else Checkpointer(workdir, config)


class BucketReader(CheckpointReader):
  """As CheckpointReader, of a URL. A bucket that cannot be reached is a StorageError, never a reason to reject a step."""

  def __init__(self, workdir):
    self._run = ObjectStore(workdir)
    self._store = ObjectStore(f"{self._run.url}/checkpoints")
    self._directory = self._store.url

  def restore(self, step, abstract):
    """As CheckpointReader's; each process reads only what its devices hold, one array after another."""
    where, wanted = f"{self._directory}/{step}/state", flatten(abstract)
    base, context = self._store.kvstore(f"{step}/state")
    try:
      arrays = open_below(base, self._read(step, "state/_METADATA"), context)
      stored = {path: jax.ShapeDtypeStruct(a.shape, a.dtype.numpy_dtype) for path, a in arrays.items()}
      check_fits(where, stored, abstract)
      leaves = [_load(arrays[path], leaf) for path, leaf in wanted.items()]
    except (KeyError, TypeError) as error:
      raise CheckpointError(f"{where} does not hold the arrays of a checkpoint: {error!s:.300}") from None
    except (ValueError, RuntimeError) as error:
      raise StorageError(f"{where} cannot be read: {describe_error(error)}") from None
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)

  def state(self, step):
    raise CheckpointError(f"{self._directory}/{step}/state is in a bucket: copy the workdir to a local folder first")

  def _read(self, step, name):
    content = self._store.read(f"{step}/{name}")
    if content is None:
      raise CheckpointError(f"no {name} of checkpoint {step} in {self._directory}: it holds {self.steps() or 'none'}")
    return content

  def _names(self):
    endings = {f"/{manifest.NAME}": "", f"/{_REJECTED}": ".rejected"}
    return [f.removesuffix(e) + mark for f in self._objects() for e, mark in endings.items() if f.endswith(e)]

  def _objects(self):
    names = self._store.list_names()
    if not names and self._run.read("config.json") is not None:
      raise self._unlisted()
    return names

  def _unlisted(self):
    return StorageError(f"{self._directory} has objects but lists none, or not all: allow listing of the bucket")

  def _verify(self, step):
    content = self._store.read(f"{step}/{manifest.NAME}")
    wanted, reason = manifest.loads(content or b"")
    if reason:
      return reason
    below = (name.removeprefix(f"{step}/") for name in self._objects() if name.startswith(f"{step}/"))
    if reason := manifest.compare_names(wanted, set(below) - manifest.UNLISTED - {_REJECTED}):
      return reason
    for name, found in self._checksums(step, wanted).items():
      if found != wanted[name]:
        return f"{name} has (size, checksum) {found}, {manifest.NAME} says {wanted[name]}"
    return None

  def _checksums(self, step, names):
    """{name: (size, crc32)} of objects of a step, read in full."""

    def read(name):
      content = self._store.read(f"{step}/{name}") or b""
      return len(content), f"{zlib.crc32(content):08x}"

    return map_parallel(read, list(names))


class BucketCheckpointer(BucketReader):
  """As Checkpointer, of a URL: a thread writes while training goes on. No lock keeps two runs apart, but a step that
  another run has saved is never replaced."""

  def __init__(self, workdir, config):
    super().__init__(workdir)
    self._config, self._saving, self._pending = config, None, None
    self._thread = concurrent.futures.ThreadPoolExecutor(1)
    broadcast_from_process0(lambda: self._store.write(_END, b""))

  def __enter__(self):
    return self

  def __exit__(self, kind, *exception):
    # As Checkpointer's: alone it keeps the work that is saved already; of several it is to end, and its save stays undone.
    if kind is None or jax.process_count() == 1:
      self.close()

  def save(self, step, state, meta):
    """As Checkpointer's. All processes call it, and process 0 completes the step when all have written their part."""
    self.wait()
    broadcast_from_process0(lambda: self._make_room(step))
    flat = flatten(state)
    for array in flat.values():
      array.copy_to_host_async()
    pieces = {path: _pieces(array) for path, array in flat.items()}
    layouts = {path: (a.shape, a.dtype, _chunk(path, a)) for path, a in flat.items()}
    self._saving = step
    self._pending = self._thread.submit(self._write, step, layouts, pieces, json.dumps(meta).encode())

  def wait(self):
    """Returns once the pending save is complete, on all processes. Raises CheckpointError where it failed."""
    pending, self._pending = self._pending, None
    try:
      if pending:
        pending.result()
    except jax.errors.JaxRuntimeError:
      raise  # another process is gone: it has said why
    except (StorageError, ValueError, RuntimeError) as error:
      where = f"{self._directory}/{self._saving}"
      reason = error if isinstance(error, StorageError) else describe_error(error)
      raise CheckpointError(f"checkpoint {where} could not be saved: {reason}; older ones are unharmed") from None

  def check(self):
    """Raises CheckpointError where the pending save has failed; does not wait for it."""
    if self._pending and self._pending.done():
      self.wait()

  def close(self):
    """Waits for the pending save, raising its error."""
    try:
      self.wait()
    finally:
      self._thread.shutdown()

  def latest(self):
    """As the reader's; newer steps that do not verify also lose their manifest, so that they can be saved again."""
    self.wait()
    return super().latest()

  def _objects(self):
    names = self._store.list_names()
    if _END not in names:
      raise self._unlisted()
    return names

  def _set_aside(self, step):
    self._store.write(f"{step}/{_REJECTED}", self._read(step, manifest.NAME))
    self._store.delete(f"{step}/{manifest.NAME}")
    return f"; its manifest is now {_REJECTED}"

  def _make_room(self, step):
    """Removes what an unfinished save of `step` has left."""
    if self._store.read(f"{step}/{manifest.NAME}") is not None:
      raise CheckpointError(f"checkpoint {self._directory}/{step} exists: restore it, or use another --workdir")
    self._store.delete_prefix(f"{step}/")
    self._store.delete_prefix(f"{step}.parts/")

  def _write(self, step, layouts, pieces, meta):
    """In the thread: no collectives here, for the main thread has its own under way."""
    process = jax.process_index()
    mine = f"state/ocdbt.process_{process}"
    base, context = self._store.kvstore(f"{step}/{mine}")
    _write_arrays(base, context, layouts, pieces)
    files = self._checksums(step, self._below(step, f"{mine}/", f"{mine}/manifest.ocdbt"))
    if process:
      self._store.write(f"{step}.parts/{process}", json.dumps(files).encode())
    else:
      self._complete(step, layouts, files, meta)
    barrier(f"checkpoint {step}")  # here, lest the main thread wait for process 0 in a collective, which times out

  def _complete(self, step, layouts, files, meta):
    """Process 0: makes a step of what all have written; `files` are its own, {name: (size, crc32)}."""
    count = jax.process_count()
    for other in range(1, count):  # where one of them dies, jax.distributed ends this one too
      while (part := self._store.read(f"{step}.parts/{other}")) is None:
        time.sleep(_POLL_SECONDS)
      files |= json.loads(part)
    self._merge(step, count)
    self._store.write(f"{step}/meta/metadata", meta)
    self._store.write(f"{step}/state/_METADATA", json.dumps(tree_metadata(layouts, ocdbt=True)).encode())
    last = f"state/ocdbt.process_{max(map(str, range(count)))}/manifest.ocdbt"  # of all names
    rest = [name for name in self._below(step, "", last) if name not in files]
    files = {name: tuple(entry) for name, entry in files.items()} | self._checksums(step, rest)
    self._store.write_if_absent(f"{step}/{manifest.NAME}", manifest.dumps(files).encode())
    self._store.delete_prefix(f"{step}.parts/")
    self._drop_old()

  def _below(self, step, prefix, expected):
    """Names below `step` that start with `prefix`. `expected` is one that was written: a list without it is cut short."""
    names = [name.removeprefix(f"{step}/") for name in self._store.list_names(f"{step}/{prefix}")]
    if expected not in names:
      raise self._unlisted()
    return names

  def _merge(self, step, count):
    """One database from those of the processes, whose files it refers to."""
    base, context = self._store.kvstore(f"{step}/state")
    parts = [base | {"path": f"{base['path']}ocdbt.process_{process}/"} for process in range(count)]
    opened = [ts.KvStore.open({"driver": "ocdbt", "base": part}, context=context).result() for part in parts]
    merged = ts.KvStore.open({"driver": "ocdbt", "base": base, **_OCDBT}, context=context).result()
    transaction = ts.Transaction(atomic=True)
    for part in opened:
      part.experimental_copy_range_to(merged.with_transaction(transaction)).result()
    transaction.commit_async().result()

  def _drop_old(self):
    every = self._config.keep_every
    for step in self.steps()[: -self._config.keep]:
      if not every or step % every:
        self._store.delete(f"{step}/{manifest.NAME}")
        self._store.delete_prefix(f"{step}/")


def _pieces(array):
  """[(index, value on the host)] of the parts of `array` that this process writes: of replicas, the first.

  On CPU a value is a view of the buffer, and jax does not donate a buffer to the next update while it has a view.
  """
  shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
  return [(shard.index, np.asarray(shard.data)) for shard in shards]


def _chunk(path, array):
  """Shape of a chunk: within one shard, for two processes must not write one chunk; of one layer and one expert."""
  chunk = list(array.sharding.shard_shape(array.shape))
  for axis in shard_axes(path, array):
    chunk[axis] = 1
  for axis, size in enumerate(chunk):
    room = max(1, CHUNK_BYTES * size // max(1, math.prod(chunk) * array.dtype.itemsize))
    chunk[axis] = max((d for d in range(1, min(size, room) + 1) if size % d == 0), default=1)
  return chunk


def _write_arrays(base, context, layouts, pieces):
  """In one transaction: GCS takes one new manifest of a database a second, and each commit writes one."""
  transaction, opened = ts.Transaction(atomic=True), {}
  for path, (shape, dtype, chunk) in layouts.items():
    spec = array_spec(base, path, ocdbt=True)
    spec["kvstore"] |= _OCDBT
    spec |= {"metadata": {"chunks": chunk, "compressor": None}, "store_data_equal_to_fill_value": True}
    opened[path] = ts.open(
      spec, dtype=ts.dtype(dtype), shape=shape, create=True, open=True, context=context, transaction=transaction
    )
  for path, array in opened.items():
    for index, piece in pieces[path]:
      array.result()[index].write(piece, can_reference_source_data_indefinitely=True).result()
  transaction.commit_async().result()


def _load(array, wanted):
  """`array`, of TensorStore, as a jax.Array with the sharding of `wanted`; a part is read once, for all its replicas."""
  indices = wanted.sharding.addressable_devices_indices_map(wanted.shape)
  reads = {str(index): array[index].read() for index in {str(i): i for i in indices.values()}.values()}
  return jax.make_array_from_callback(wanted.shape, wanted.sharding, lambda index: reads[str(index)].result())
