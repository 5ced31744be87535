"""Arrays of a checkpoint, written and read slice by slice: for weights that do not fit in memory.

`ArrayWriter` writes what Orbax calls a PyTree checkpoint without OCDBT: a Zarr array per leaf, named by its path with
dots, and `_METADATA`, which lists the leaves. It takes the chunks in any order and holds few of them at a time.
"""

import collections
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tensorstore as ts

from deepseek_jax.checkpoint.tree import TreePath
from deepseek_jax.errors import CheckpointError

_MAX_PENDING_BYTES = 1 << 27  # given to TensorStore and not yet on disk
_DICT_KEY = 2  # Orbax's number for a level of the tree that is a dict


class ArrayWriter:
  """Writes float32 arrays below `folder`, which must not exist; a context manager that waits for pending writes.

  shapes: {path: (shape, chunk shape)}. Raises CheckpointError where the disk refuses.
  """

  def __init__(self, folder: pathlib.Path, shapes: Mapping[TreePath, tuple[tuple[int, ...], tuple[int, ...]]]):
    self._folder = folder
    self._pending: collections.deque[tuple[Any, int]] = collections.deque()  # (future, bytes)
    self._pending_bytes = 0
    try:
      folder.mkdir(parents=True)
      self._arrays = {path: _create_array(folder, path, shape, chunk) for path, (shape, chunk) in shapes.items()}
      (folder / "_METADATA").write_text(json.dumps(tree_metadata(shapes, ocdbt=False)), encoding="utf-8")
    except (OSError, ValueError, RuntimeError) as error:
      raise self._failed(error) from error

  def __enter__(self):
    return self

  def __exit__(self, kind, *exception):
    failed = None
    while self._pending:  # also after an error: the folder may be removed next, and no write must race with that
      try:
        self._wait()
      except CheckpointError as error:
        failed = failed or error
    if failed and kind is None:
      raise failed

  def write(self, path: TreePath, index: tuple[int | slice, ...], value: np.ndarray) -> None:
    """Starts to write `value` at `index` (complete chunks) of the array `path`; `value` must not change afterwards."""
    self._pending.append((self._arrays[path][index].write(value), value.nbytes))
    self._pending_bytes += value.nbytes
    while self._pending_bytes > _MAX_PENDING_BYTES:
      self._wait()

  def _wait(self) -> None:
    """Waits for the oldest pending write."""
    future, size = self._pending.popleft()
    try:
      future.result()
    except (ValueError, RuntimeError) as error:
      raise self._failed(error) from error
    self._pending_bytes -= size

  def _failed(self, error: Exception) -> CheckpointError:
    return CheckpointError(
      f"cannot write to {self._folder}: {str(error).splitlines()[0]:.300}; make room, or choose another"
    )


def open_arrays(folder: pathlib.Path) -> dict[TreePath, ts.TensorStore]:
  """The arrays of a step's `folder`, by path. Each has shape, dtype, and [index].read().result().

  Raises CheckpointError where the folder does not hold the arrays of a checkpoint.
  """
  try:
    return open_arrays_in(_file_kvstore(folder), (folder / "_METADATA").read_bytes())
  except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
    raise CheckpointError(f"{folder} does not hold the arrays of a checkpoint: {error!s:.300}") from None


def open_arrays_in(
  kvstore: dict[str, Any], metadata: bytes, context: ts.Context | None = None
) -> dict[TreePath, ts.TensorStore]:
  """As `open_arrays`, of any key-value store. Raises the errors of JSON and TensorStore.

  Args: `kvstore`: TensorStore's spec. `metadata`: content of `_METADATA` there.
  """
  leaves = json.loads(metadata)
  paths = [tuple(key["key"] for key in leaf["key_metadata"]) for leaf in leaves["tree_metadata"].values()]
  specs = [array_spec(kvstore, path, leaves["use_ocdbt"]) for path in paths]
  futures = [ts.open(spec, open=True, read=True, context=context) for spec in specs]
  return {path: future.result() for path, future in zip(paths, futures, strict=True)}


def _create_array(
  folder: pathlib.Path, path: TreePath, shape: tuple[int, ...], chunk: tuple[int, ...]
) -> ts.TensorStore:
  metadata = {
    "shape": shape,
    "chunks": chunk,
    "dtype": np.dtype(np.float32).str,
    "compressor": None,
    "fill_value": None,
  }
  spec = array_spec(_file_kvstore(folder), path, ocdbt=False)
  spec |= {"metadata": metadata, "store_data_equal_to_fill_value": True}
  return ts.open(spec, create=True).result()


def _file_kvstore(folder: pathlib.Path) -> dict[str, Any]:
  return {"driver": "file", "path": f"{folder.absolute()}/"}


def array_spec(base: dict[str, Any], path: TreePath, ocdbt: bool) -> dict[str, Any]:
  """TensorStore's spec of the array `path` below `base`, the spec of a key-value store."""
  name = ".".join(path)
  if ocdbt:
    return {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}
  return {"driver": "zarr", "kvstore": base | {"path": f"{base['path']}{name}/"}}


def tree_metadata(paths: Iterable[TreePath], ocdbt: bool) -> dict[str, Any]:
  """The content of `_METADATA` for arrays at `paths`."""
  leaves = {
    str(path): {
      "key_metadata": [{"key": name, "key_type": _DICT_KEY} for name in path],
      "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False},
    }
    for path in paths
  }
  return {"tree_metadata": leaves, "use_ocdbt": ocdbt, "use_zarr3": False}
