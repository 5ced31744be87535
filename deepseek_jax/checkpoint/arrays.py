"""Arrays of a checkpoint, written and read slice by slice: what moves weights too big to be held in memory.

What `ArrayWriter` writes is what Orbax calls a PyTree checkpoint without OCDBT: a Zarr array per leaf, named by its path
with dots, and `_METADATA`, which lists the leaves. It takes the chunks in any order and holds few of them at a time.
"""

import collections
import json

import numpy as np
import tensorstore as ts

from deepseek_jax.errors import CheckpointError

_IN_FLIGHT = 1 << 27  # bytes given to TensorStore that are not yet on disk
_DICT_KEY = 2  # Orbax's number for a level of the tree that is a dict


class ArrayWriter:
  """Writes {path: float32 array} below `folder`, which must not exist; a context manager that waits for what is pending.

  `layout` maps each path, a tuple of names, to (shape, chunk shape). Raises CheckpointError where the disk refuses.
  """

  def __init__(self, folder, layout):
    self._folder, self._pending, self._bytes = folder, collections.deque(), 0
    try:
      folder.mkdir(parents=True)
      self._arrays = {path: _create(folder, path, *sizes) for path, sizes in layout.items()}
      (folder / "_METADATA").write_text(json.dumps(tree_metadata(layout, ocdbt=False)), encoding="utf-8")
    except (OSError, ValueError, RuntimeError) as error:
      raise self._failed(error) from error

  def __enter__(self):
    return self

  def __exit__(self, kind, *exception):
    failed = None
    while self._pending:  # after an error too: who removes the folder must not race with writes into it
      try:
        self._wait()
      except CheckpointError as error:
        failed = failed or error
    if failed and kind is None:
      raise failed

  def write(self, path, index, value):
    """Starts to write `value` at `index`, whole chunks, of the array `path`; `value` must not change afterwards."""
    self._pending.append((self._arrays[path][index].write(value), value.nbytes))
    self._bytes += value.nbytes
    while self._bytes > _IN_FLIGHT:
      self._wait()

  def _wait(self):
    future, size = self._pending.popleft()
    try:
      future.result()
    except (ValueError, RuntimeError) as error:
      raise self._failed(error) from error
    self._bytes -= size

  def _failed(self, error):
    return CheckpointError(
      f"cannot write to {self._folder}: {str(error).splitlines()[0]:.300}; make room, or choose another"
    )


def open_arrays(folder):
  """{path: tensorstore.TensorStore} of the arrays of a step's `folder`: shape, dtype, and [index].read().result()."""
  try:
    return open_below(_files(folder), (folder / "_METADATA").read_bytes())
  except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
    raise CheckpointError(f"{folder} does not hold the arrays of a checkpoint: {error!s:.300}") from None


def open_below(base, metadata, context=None):
  """As `open_arrays`, for `base`, the spec of a kvstore, and the content of its `_METADATA`. Raises what they raise."""
  metadata = json.loads(metadata)
  paths = [tuple(key["key"] for key in leaf["key_metadata"]) for leaf in metadata["tree_metadata"].values()]
  specs = [array_spec(base, path, metadata["use_ocdbt"]) for path in paths]
  opened = [ts.open(spec, open=True, read=True, context=context) for spec in specs]
  return {path: array.result() for path, array in zip(paths, opened, strict=True)}


def _create(folder, path, shape, chunk):
  metadata = {
    "shape": shape,
    "chunks": chunk,
    "dtype": np.dtype(np.float32).str,
    "compressor": None,
    "fill_value": None,
  }
  spec = array_spec(_files(folder), path, ocdbt=False) | {"metadata": metadata, "store_data_equal_to_fill_value": True}
  return ts.open(spec, create=True).result()


def _files(folder):
  return {"driver": "file", "path": f"{folder.absolute()}/"}


def array_spec(base, path, ocdbt):
  """TensorStore's spec of the array `path` below `base`, the spec of a kvstore."""
  name = ".".join(path)
  if ocdbt:
    return {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}
  return {"driver": "zarr", "kvstore": base | {"path": f"{base['path']}{name}/"}}


def tree_metadata(paths, ocdbt):
  """The content of `_METADATA` for arrays at `paths`."""
  leaves = {
    str(path): {
      "key_metadata": [{"key": name, "key_type": _DICT_KEY} for name in path],
      "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False},
    }
    for path in paths
  }
  return {"tree_metadata": leaves, "use_ocdbt": ocdbt, "use_zarr3": False}
