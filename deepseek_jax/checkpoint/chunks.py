"""How a conversion cuts the arrays of a model into chunks by layer, expert and size, so that none is in memory at once."""

import math
from collections.abc import Iterator

from deepseek_jax.checkpoint.hf_names import hf_tensors
from deepseek_jax.checkpoint.hf_tensor import HFTensor
from deepseek_jax.model_config import ModelConfig

MAX_CHUNK_BYTES = 1 << 26  # of float32; a matrix of one of V3's experts is a little less


def tree_path(tensor: HFTensor) -> tuple[str, ...]:
  """Keys from the root of a checkpoint to the array that `tensor` is a slice of."""
  return ("buffers" if tensor.buffer else "params", *tensor.path)


def shapes_and_chunks(config: ModelConfig) -> dict[tuple[str, ...], tuple[tuple[int, ...], tuple[int, ...]]]:
  """{path: (shape, chunk shape)} of all arrays of the model. A chunk is a part of one layer, or of one expert of it."""
  arrays = {}
  for tensor in hf_tensors(config):
    if not tensor.is_copy:
      axis, size, _ = _chunk_axis(tensor)
      chunk = (1,) * len(tensor.index) + (*tensor.param_shape[:axis], size, *tensor.param_shape[axis + 1 :])
      # Tensors come in order: the last one of an array has the highest index.
      arrays[tree_path(tensor)] = (*(i + 1 for i in tensor.index), *tensor.param_shape), chunk
  return arrays


def tensor_chunks(tensor: HFTensor) -> Iterator[tuple[slice, tuple[int | slice, ...], tuple[int, ...]]]:
  """Yields (rows, index, shape) for each chunk of a tensor.

  rows: of the Hugging Face tensor. index: the same elements in the array `tree_path(tensor)`. shape: of the chunk
  there.
  """
  axis, size, rows_per_element = _chunk_axis(tensor)
  for start in range(0, tensor.param_shape[axis], size):
    stop = min(start + size, tensor.param_shape[axis])
    shape = (*tensor.param_shape[:axis], stop - start, *tensor.param_shape[axis + 1 :])
    index: tuple[int | slice, ...] = (*tensor.index, *(slice(None),) * axis, slice(start, stop))
    yield slice(start * rows_per_element, stop * rows_per_element), index, shape


def _chunk_axis(tensor: HFTensor) -> tuple[int, int, int]:
  """(cut axis of the parameter, its first output axis; size of a chunk there; tensor rows per element of it)."""
  axis = 0
  if tensor.transposed:
    inputs = tensor.shape[1]
    axis = max(a for a in range(len(tensor.param_shape)) if math.prod(tensor.param_shape[:a]) == inputs)
  length = tensor.param_shape[axis]
  bytes_per_element = 4 * (math.prod(tensor.param_shape) // length)
  size = max(1, min(length, MAX_CHUNK_BYTES // bytes_per_element))
  return axis, size, tensor.shape[0] // length
