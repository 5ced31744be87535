"""What a block knows of its tokens beside their stream."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
  """Facts of the tokens that one device works on; `seq` is its part of the sequence inside blocks, `stream` between them.

  rotation: (cos, sin), each [batch or 1, seq, 1, rope_dim / 2].
  segment_ids: [batch, seq] int; attention stays within a segment. None: one segment.
  counted: [batch or 1, seq] bool, False for what only fills the sequence, which routers pass over. None: all count.
  exempt: [batch] bool, where dispatch=capacity drops nothing. None: everywhere.
  rows: [batch] int, places: [stream] int; which sequences of the microbatch, and which of their positions, these are.
  """

  rotation: tuple[jax.Array, jax.Array]
  segment_ids: jax.Array | None
  counted: jax.Array | None
  exempt: jax.Array | None
  rows: jax.Array
  places: jax.Array
