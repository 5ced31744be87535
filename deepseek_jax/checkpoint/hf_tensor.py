"""One tensor of a Hugging Face checkpoint, and which slice of a parameter it is."""

import dataclasses
import math
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class HFTensor:
  """One tensor of a Hugging Face checkpoint.

  Attributes:
    name: in the checkpoint.
    path: keys of the parameter (or buffer) in our tree. index: in its leading dimensions (layer, expert), where the
      tensor belongs.
    shape: of the tensor. param_shape: of its slice of the parameter.
    transposed: the tensor is [out, in], and the parameter has its input dimensions before its output dimensions.
    buffer: `path` is in the buffers.
    is_copy: a second name of a parameter that another tensor has, too; it is written, and not read.
  """

  name: str
  path: tuple[str, ...]
  index: tuple[int, ...]
  shape: tuple[int, ...]
  param_shape: tuple[int, ...]
  transposed: bool = False
  buffer: bool = False
  is_copy: bool = False

  def to_param(self, tensor: np.ndarray) -> np.ndarray:
    """[shape] of the checkpoint -> [param_shape]."""
    return tensor.T.reshape(self.param_shape) if self.transposed else tensor

  def to_hf(self, param: np.ndarray) -> np.ndarray:
    """[param_shape] -> [shape] of the checkpoint."""
    return param.reshape(self.shape[::-1]).T if self.transposed else param


def matrix_tensor(
  name: str,
  path: tuple[str, ...],
  inputs: tuple[int, ...],
  outputs: tuple[int, ...],
  index: tuple[int, ...] = (),
  **kwargs: Any,
) -> HFTensor:
  """A linear map; in the parameter inputs and outputs may have several dimensions: [embed] to [heads, head_dim]."""
  shape = (math.prod(outputs), math.prod(inputs))
  return HFTensor(name + ".weight", (*path, "kernel"), index, shape, (*inputs, *outputs), transposed=True, **kwargs)


def vector_tensor(name: str, path: tuple[str, ...], width: int, index: tuple[int, ...] = (), **kwargs: Any) -> HFTensor:
  """A tensor of one dimension, the same on both sides."""
  return HFTensor(name, path, index, (width,), (width,), **kwargs)
