"""Batches of windows on the devices of a mesh."""

import dataclasses

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Batch:
  """A global batch: `tokens` [microbatch, sequence, seq + 1] on the devices, of which the first `microbatches` count."""

  tokens: jax.Array
  microbatches: int
  target_tokens: int
  target_bytes: int


def place_rows(split, ids, width, sharding):
  """Windows `ids` [..., batch] of `split` as int32 [..., batch, width]; a host reads only the rows of its devices."""

  def read(index):
    part = ids[index[:-1]]
    return split.tokens(part.reshape(-1)).astype(np.int32).reshape(*part.shape, width)

  return jax.make_array_from_callback((*ids.shape, width), sharding, read)
