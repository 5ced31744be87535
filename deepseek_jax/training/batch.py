"""Batches of windows on the devices of a mesh."""

import dataclasses

import jax
import numpy as np

from deepseek_jax.config_sections import TrainConfig
from deepseek_jax.data.pipeline import ConcatSplit, Data


@dataclasses.dataclass(frozen=True)
class Batch:
  """A global batch. Without a batch ramp all microbatches are used."""

  tokens: jax.Array  # [microbatch, sequence, seq + 1] int32, on the devices
  microbatches: int  # how many are used, the first ones
  target_tokens: int  # targets in the microbatches that are used
  target_bytes: int  # UTF-8 bytes of the text of these targets


def load_windows(split: ConcatSplit, ids: np.ndarray, width: int, sharding: jax.sharding.Sharding) -> jax.Array:
  """Tokens [..., batch, width] int32 of the windows `ids` [..., batch] of `split`, on the devices of `sharding`.

  Each process reads only the windows of its own devices.
  """

  def read(index):
    shard_ids = ids[index[:-1]]
    return split.tokens(shard_ids.reshape(-1)).astype(np.int32).reshape(*shard_ids.shape, width)

  return jax.make_array_from_callback((*ids.shape, width), sharding, read)


def load_batch(data: Data, train: TrainConfig, ids: np.ndarray, sharding: jax.sharding.Sharding) -> Batch:
  """The Batch of the training windows `ids` [sequences], on the devices of `sharding`.

  During a batch ramp there are fewer than `train.global_batch` windows. The microbatches that are missing are then
  copies of the first, which the step does not use.
  """
  microbatch_size = train.microbatch or train.global_batch
  by_microbatch = ids.reshape(-1, microbatch_size)
  microbatches = len(by_microbatch)
  missing = train.global_batch // microbatch_size - microbatches
  padded = np.concatenate([by_microbatch, np.repeat(by_microbatch[:1], missing, 0)])
  tokens = load_windows(data.train, padded, data.seq + 1, sharding)
  return Batch(tokens, microbatches, len(ids) * data.seq, int(data.train.target_bytes(ids).sum()))
