"""What a plan must know of each attention kind that the shapes of its parameters do not say."""

import dataclasses
from collections.abc import Callable

from deepseek_jax.model_config import AttentionConfig


@dataclasses.dataclass(frozen=True)
class AttentionPlan:
  """A row of ATTENTION_PLANS.

  Attributes:
    head_dims: config -> (width of a key head, of a value head): the multiply-accumulates of a query head with one key.
    num_kv_heads: config -> heads of keys and values, as attention sees them.
    qkv_dims: config -> (elements of a token's queries, keys and values and of what else is made of heads, which
      `mesh.tensor` shards; elements of its latents, which it does not shard).
    expanded_dims: config -> elements of a token's keys and values that context parallelism makes again for every pair
      of chunks; 0 where devices exchange keys and values themselves.
    recomputes_scores: its backward pass recomputes the scores whatever the remat policy, as where the widths of keys
      and values differ (kernels/attention/xla.py).
  """

  head_dims: Callable[[AttentionConfig], tuple[int, int]]
  num_kv_heads: Callable[[AttentionConfig], int]
  qkv_dims: Callable[[AttentionConfig], tuple[int, int]]
  expanded_dims: Callable[[AttentionConfig], int]
  recomputes_scores: bool


def _mla_qkv_dims(a: AttentionConfig) -> tuple[int, int]:
  """Queries and concatenated keys, expanded keys without RoPE and values; latents of queries and of keys."""
  qk_dim = a.qk_nope_head_dim + a.qk_rope_head_dim
  return a.heads * (2 * qk_dim + a.v_head_dim + a.qk_nope_head_dim), a.q_lora_rank + a.kv_lora_rank


ATTENTION_PLANS = {
  "gqa": AttentionPlan(
    head_dims=lambda a: (a.head_dim, a.head_dim),
    num_kv_heads=lambda a: a.kv_heads,
    qkv_dims=lambda a: ((a.heads + 2 * a.kv_heads) * a.head_dim, 0),
    expanded_dims=lambda a: 0,
    recomputes_scores=False,
  ),
  "mla": AttentionPlan(
    head_dims=lambda a: (a.qk_nope_head_dim + a.qk_rope_head_dim, a.v_head_dim),
    num_kv_heads=lambda a: a.heads,
    qkv_dims=_mla_qkv_dims,
    expanded_dims=lambda a: a.heads * (a.qk_nope_head_dim + a.v_head_dim),
    recomputes_scores=True,
  ),
}
