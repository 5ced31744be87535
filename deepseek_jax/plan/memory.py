"""How much memory a training step needs on each device: derived from shapes, before any device exists."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from deepseek_jax.config import Config
from deepseek_jax.mesh import abstract_mesh
from deepseek_jax.parallel.pipeline import stage_table
from deepseek_jax.plan.flops import abstract_params
from deepseek_jax.sharding import WHOLE_WEIGHTS, batch_parts, rules, size_per_device


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one device; what waits in the host's memory is not among them."""

  params: int
  optimizer: int
  gradients: int
  activations: int
  collectives: int
  other: int

  @property
  def total(self):
    return sum(dataclasses.astuple(self))


# How often XLA holds each of these at the peak of a step: fitted to what libtpu 0.0.50 allocates for 12 steps, dense and
# mixtures, 64 to 1024 chips, each within 4%. Two copies of what is kept, or of the scores, are XLA's own, not the program's.
COPIES = {
  "kept_inputs": 1.9, "kept_products": 1.12, "scores": 1.95, "head": 1.27, "layer": 3.1, "experts": 3.5, "rows": 12.4,
  "gradients": 3.7, "whole_gradients": 1.6,
}  # fmt: skip


def estimate_memory(config: Config) -> Memory:
  """Bytes per device of a step of `config`, whose mesh sizes are resolved.

  Parameters and moments are exact; with ZeRO 1 and 2, and in a pipeline, weights in use come on top, as collectives. Of the
  rest what is large is counted, times COPIES: gradients in float32; what the forward pass keeps under the remat policy, the
  scores of a block, the rows of its experts; the weights of a block as they are gathered, and their gradients; under other
  the gathered head with its gradient, and logits.
  """
  model, mesh, zero = config.model, config.mesh, config.parallel.zero
  kept = _elements(model, mesh)
  bytes_kept, compute = jnp.dtype(model.param_dtype).itemsize, jnp.dtype(model.compute_dtype).itemsize
  in_use, gradients = 0, COPIES["gradients"] * kept
  if zero < 3:
    with rules(WHOLE_WEIGHTS):
      whole = _elements(model, mesh)
      if mesh.stage > 1:  # the last stack is in the stages, the rest whole on each
        staged = _elements(model, mesh, "moe_layers" if model.num_moe_layers else "dense_layers")
        whole += staged // mesh.stage - staged
    in_use, gradients = whole * compute, COPIES["whole_gradients"] * whole
  elif mesh.stage > 1:
    in_use = kept * bytes_kept  # laid out in stages
  moments = 0 if config.optimizer.offload else 2 * kept * jnp.dtype(config.optimizer.moments_dtype).itemsize
  activations, weights, head = map(int, _passes(config, compute))
  return Memory(kept * bytes_kept, moments, int(gradients * bytes_kept), activations, in_use + weights, head)


def _elements(model, mesh, stack=None):
  """Parameters, of one stack or all, that one device holds under the rules in force."""
  params = abstract_params(model, mesh)[0]
  return sum(size_per_device(leaf) for leaf in jax.tree.leaves(params[stack] if stack else params))


def _passes(config: Config, width):
  """(activations, weights of a block, head): bytes in a microbatch's passes, elements being `width` bytes wide."""
  m, mesh, a, moe = config.model, config.mesh, config.model.attention, config.model.moe
  wide, tensor = max(4, width), mesh.tensor
  rows = -(-(config.train.microbatch or config.train.global_batch) // batch_parts(abstract_mesh(mesh)))
  seq = config.data.seq // mesh.context
  tokens = rows * seq
  stream = tokens * m.embed * width // tensor  # one residual stream
  if a.kind == "mla":
    key, value = a.qk_nope_head_dim + a.qk_rope_head_dim, a.v_head_dim
    heads = a.heads * (2 * key + value + a.qk_nope_head_dim) // tensor + a.q_lora_rank + a.kv_lora_rank
    attention = a.q_lora_rank * m.embed + (a.q_lora_rank or m.embed) * a.heads * key // tensor
    attention += a.kv_lora_rank * (m.embed + a.heads * (a.qk_nope_head_dim + value) // tensor)
    attention += a.heads * value * m.embed // tensor
  else:
    heads = (a.heads + 2 * a.kv_heads) * a.head_dim // tensor
    attention = 2 * m.embed * (a.heads + a.kv_heads) * a.head_dim // tensor
  inner, experts, choices = m.mlp, 0, 0
  if m.num_moe_layers:  # rows for the choices that a device has room for
    choices = _room(moe, mesh.expert)
    inner = max(m.mlp * bool(m.num_dense_layers), (choices + moe.num_shared_experts) * moe.mlp)
    experts = 3 * m.embed * moe.mlp * (moe.num_routed_experts // mesh.expert) // tensor * width
  # The whole sequence, or of a context mesh one pair of chunks at a time.
  span = config.data.seq if mesh.context == 1 else seq // 2
  scores = rows * a.heads // tensor * min(seq, span) * span * wide
  expert_rows = tokens * choices * m.embed * width
  products = stream + tokens * (2 * m.embed + heads + 2 * inner // tensor) * width + 2 * expert_rows
  # attend() keeps no scores of MLA, of dropout or of float64.
  all_of_it = products + (scores if a.kind == "gqa" and not a.dropout and width < 8 else 0)
  a_layer = {
    "full": COPIES["kept_inputs"] * stream, "dots": COPIES["kept_products"] * products,
    "none": COPIES["kept_products"] * all_of_it, "offload": 0,
  }[m.remat]  # fmt: skip
  layers, waiting = m.layers + m.num_mtp_layers, 0
  if mesh.stage > 1:  # a circuit's layers at a time, and the streams of microbatches under way
    circuits, in_stages = config.parallel.circuits, m.num_moe_layers or m.num_dense_layers
    slots = stage_table(in_stages, mesh.stage, circuits, config.parallel.stage_layers)[0].shape[-1]
    layers, waiting = max(slots, m.layers - in_stages + m.num_mtp_layers), (circuits + 2) * mesh.stage + 3
  dense = (attention + 3 * m.embed * m.mlp // tensor) * width
  heads = 1 + m.num_mtp_layers
  return (
    a_layer * layers + waiting * stream + COPIES["scores"] * scores + COPIES["rows"] * expert_rows,
    COPIES["layer"] * dense + COPIES["experts"] * experts,
    COPIES["head"] * m.embed * m.vocab // tensor * (width + wide) * heads
    + rows * min(config.train.loss_chunk, seq) * m.vocab // tensor * wide,
  )


def _room(moe, devices):
  """Choices for each of a device's tokens that it has room for: see model/exchange.py."""
  most = devices * min(moe.num_experts_per_token, moe.num_routed_experts // devices)
  return min(most, math.ceil(moe.buffer_factor * moe.num_experts_per_token)) if moe.buffer_factor else most
