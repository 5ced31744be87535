"""How the arrays of a model are cut, so that none has to be in memory whole: by layer, by expert, and by size."""

import math

from deepseek_jax.checkpoint.hf_names import Entry, entries
from deepseek_jax.model_config import ModelConfig

PART_BYTES = 1 << 26  # of float32; a matrix of one of V3's experts is a little less


def tree_path(entry: Entry):
  """Names from the root of a checkpoint to the array of `entry`."""
  return ("buffers" if entry.buffer else "params", *entry.path)


def layout(config: ModelConfig):
  """{path: (shape, chunk shape)} of all arrays of the model; a chunk is a part of one layer or of one expert of it."""
  found = {}
  for entry in entries(config):
    if not entry.copy:
      axis, size, _ = _cut(entry)
      chunk = (1,) * len(entry.index) + (*entry.ours[:axis], size, *entry.ours[axis + 1 :])
      # Entries come in order: the last has the highest index.
      found[tree_path(entry)] = (*(i + 1 for i in entry.index), *entry.ours), chunk
  return found


def parts(entry: Entry):
  """Yields (rows, index, shape) for each part of an entry: rows of the tensor in a Hugging Face checkpoint, which are
  `index` of the array `tree_path(entry)`; `shape` of that part with us."""
  axis, size, unit = _cut(entry)
  for start in range(0, entry.ours[axis], size):
    stop = min(start + size, entry.ours[axis])
    shape = (*entry.ours[:axis], stop - start, *entry.ours[axis + 1 :])
    yield slice(start * unit, stop * unit), (*entry.index, *(slice(None),) * axis, slice(start, stop)), shape


def _cut(entry: Entry):
  """(axis of ours that is cut, size of a part there, rows of the tensor in one step of it): its first output axis."""
  axis = 0
  if entry.transposed:
    inputs = entry.shape[1]
    axis = max(a for a in range(len(entry.ours)) if math.prod(entry.ours[:a]) == inputs)
  length = entry.ours[axis]
  size = max(1, min(length, PART_BYTES // (4 * (math.prod(entry.ours) // length))))
  return axis, size, entry.shape[0] // length
