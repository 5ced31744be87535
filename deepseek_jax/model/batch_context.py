"""What a block needs to know of its tokens in addition to their hidden states."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BatchContext:
  """Describes the tokens of one device. `seq` is its part of the sequence inside blocks, `stream` between them."""

  rotation: tuple[jax.Array, jax.Array]  # RoPE's (cos, sin), each [batch or 1, seq, 1, rope_dim / 2]
  token_ids: jax.Array  # int [batch, seq], for routers that hash them
  segment_ids: jax.Array | None  # int [batch, seq]; attention stays within a segment. None: one segment
  token_mask: jax.Array | None  # bool [batch or 1, seq]; False: padding, which is not routed. None: all count
  no_drop: jax.Array | None  # bool [batch]; True: dispatch=capacity keeps all tokens of the sequence. None: of all
  sequence_ids: jax.Array  # int [batch], which sequences of the microbatch these are
  position_ids: jax.Array  # int [stream], which positions of their sequence these are
