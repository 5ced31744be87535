"""How much memory a training step needs on each device: derived from shapes, before any device exists."""

import dataclasses

import jax
import jax.numpy as jnp

from deepseek_jax.config import Config
from deepseek_jax.mesh import abstract_mesh
from deepseek_jax.plan.flops import abstract_params
from deepseek_jax.sharding import batch_parts, size_per_device


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one device."""

  params: int
  gradients: int
  moments: int
  activations: int
  logits: int

  @property
  def total(self):
    return sum(dataclasses.astuple(self))


def estimate_memory(config: Config) -> Memory:
  """Bytes per device of a step of `config`, whose mesh sizes are resolved.

  Parameters and moments are exact. Gradients are counted twice: the newest, and the sum over microbatches. Activations
  count what the forward pass keeps for the backward pass under the remat policy plus one block's working set, in the
  compute dtype, with the gathered weights of one block and its experts' gradients; logits, the gathered head and its
  gradient. XLA's own temporaries come on top.
  """
  m, mesh = config.model, config.mesh
  per_device = sum(size_per_device(leaf) for leaf in jax.tree.leaves(abstract_params(m, mesh)[0]))
  width, wide = jnp.dtype(m.compute_dtype).itemsize, max(4, jnp.dtype(m.compute_dtype).itemsize)
  rows = -(-(config.train.microbatch or config.train.global_batch) // batch_parts(abstract_mesh(mesh)))
  tokens, tensor = rows * config.data.seq, mesh.tensor

  stream = tokens * m.embed * width  # one residual stream
  a, moe = m.attention, m.moe
  if a.kind == "mla":
    key, value = a.qk_nope_head_dim + a.qk_rope_head_dim, a.v_head_dim
    heads = a.heads * (2 * key + 2 * value + a.qk_nope_head_dim) // tensor + a.q_lora_rank + a.kv_lora_rank
    attention_weights = a.q_lora_rank * m.embed + (a.q_lora_rank or m.embed) * a.heads * key // tensor
    attention_weights += a.kv_lora_rank * (m.embed + a.heads * (a.qk_nope_head_dim + value) // tensor)
    attention_weights += a.heads * value * m.embed // tensor
  else:
    heads = (2 * a.heads + 2 * a.kv_heads) * a.head_dim // tensor
    attention_weights = 2 * m.embed * (a.heads + a.kv_heads) * a.head_dim // tensor
  # The widest block: a mixture has the rows of its chosen experts, and for now all its experts' weights gathered.
  inner, expert_weights = m.mlp, 3 * m.embed * m.mlp
  if m.num_moe_layers:
    rows_wide = (moe.num_experts_per_token + moe.num_shared_experts) * moe.mlp
    inner = max(inner, rows_wide) if m.num_dense_layers else rows_wide
    expert_weights = 3 * m.embed * moe.mlp * (moe.num_routed_experts + moe.num_shared_experts)
    heads += 2 * moe.num_experts_per_token * m.embed  # rows sorted by expert, in and out
  products = tokens * (2 * m.embed + heads + 2 * inner // tensor) * width
  scores = rows * a.heads // tensor * config.data.seq**2 * (width + wide)
  block = stream * 6 + products + scores + tokens * inner // tensor * 2 * width
  # attend() keeps no scores of MLA, of dropout or of float64.
  whole = block if a.kind == "gqa" and not a.dropout and width < 8 else block - scores
  kept = {"full": stream, "dots": stream + products, "none": whole}[m.remat] * (m.layers + m.num_mtp_layers)
  weights = (attention_weights + expert_weights // tensor) * width
  if m.num_moe_layers:
    weights += 3 * m.embed * moe.mlp * moe.num_routed_experts // tensor * wide  # their gradients, before they scatter
  chunk = min(config.train.loss_chunk, config.data.seq)
  return Memory(
    params=per_device * jnp.dtype(m.param_dtype).itemsize,
    gradients=2 * per_device * jnp.dtype(m.param_dtype).itemsize,
    moments=2 * per_device * jnp.dtype(config.optimizer.moments_dtype).itemsize,
    # Blocks of multi-token prediction stand outside the loop over layers: XLA keeps their working sets beside its own.
    activations=kept + (block + weights) * (1 + m.num_mtp_layers),
    logits=2 * rows * chunk * m.vocab // tensor * wide + m.embed * m.vocab // tensor * (width + wide),
  )
