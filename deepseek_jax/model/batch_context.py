"""What a block knows of its tokens beside their stream."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BatchContext:
  """Facts of the tokens that one device works on; `seq` is its part of the sequence inside blocks, `stream` between them.

  rotation: (cos, sin), each [batch or 1, seq, 1, rope_dim / 2].
  segment_ids: [batch, seq] int; attention stays within a segment. None: one segment.
  token_mask: [batch or 1, seq] bool, False for what only fills the sequence, which routers pass over. None: all count.
  no_drop: [batch] bool, where dispatch=capacity drops nothing. None: everywhere.
  sequence_ids: [batch] int, position_ids: [stream] int; which sequences of the microbatch, and which of their positions, these are.
  """

  rotation: tuple[jax.Array, jax.Array]
  segment_ids: jax.Array | None
  token_mask: jax.Array | None
  no_drop: jax.Array | None
  sequence_ids: jax.Array
  position_ids: jax.Array
