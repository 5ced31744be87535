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


def estimate_memory(config: Config) -> Memory:
  """Bytes per device of a step of `config`, whose mesh sizes are resolved.

  Parameters and moments are exact; with ZeRO 1 and 2, and in a pipeline, weights in use come on top. Gradients are counted
  twice: the newest, and the sum over microbatches. Activations count what the forward pass keeps for the backward pass
  under the remat policy plus one block's working set, in the compute dtype, with the gathered weights of one block; logits,
  the gathered head and its gradient. XLA's own temporaries come on top.
  """
  model, mesh, zero = config.model, config.mesh, config.parallel.zero
  kept = _elements(model, mesh)
  bytes_kept, compute = jnp.dtype(model.param_dtype).itemsize, jnp.dtype(model.compute_dtype).itemsize
  in_use, newest, summed = 0, kept, kept
  if zero < 3:
    with rules(WHOLE_WEIGHTS):
      whole = _elements(model, mesh)
      if mesh.stage > 1:  # the last stack is in the stages, the rest whole on each
        staged = _elements(model, mesh, "moe_layers" if model.num_moe_layers else "dense_layers")
        whole += staged // mesh.stage - staged
    in_use, newest, summed = whole * compute, whole, whole if zero == 1 else kept
  elif mesh.stage > 1:
    in_use = kept * bytes_kept  # laid out in stages
  moments = 0 if config.optimizer.offload else 2 * kept * jnp.dtype(config.optimizer.moments_dtype).itemsize
  activations, logits = _passes(config, compute)
  return Memory(kept * bytes_kept, moments, (newest + summed) * bytes_kept, activations, in_use, logits)


def _elements(model, mesh, stack=None):
  """Parameters, of one stack or all, that one device holds under the rules in force."""
  params = abstract_params(model, mesh)[0]
  return sum(size_per_device(leaf) for leaf in jax.tree.leaves(params[stack] if stack else params))


def _passes(config: Config, width):
  """(activations, logits): bytes of a microbatch's forward and backward pass, elements being `width` bytes wide."""
  m, mesh, a, moe = config.model, config.mesh, config.model.attention, config.model.moe
  wide, tensor = max(4, width), mesh.tensor
  rows = -(-(config.train.microbatch or config.train.global_batch) // batch_parts(abstract_mesh(mesh)))
  seq = config.data.seq // mesh.context
  tokens = rows * seq

  stream = tokens * m.embed * width // tensor  # one residual stream
  if a.kind == "mla":
    key, value = a.qk_nope_head_dim + a.qk_rope_head_dim, a.v_head_dim
    heads = a.heads * (2 * key + 2 * value + a.qk_nope_head_dim) // tensor + a.q_lora_rank + a.kv_lora_rank
    attention_weights = a.q_lora_rank * m.embed + (a.q_lora_rank or m.embed) * a.heads * key // tensor
    attention_weights += a.kv_lora_rank * (m.embed + a.heads * (a.qk_nope_head_dim + value) // tensor)
    attention_weights += a.heads * value * m.embed // tensor
  else:
    heads = (2 * a.heads + 2 * a.kv_heads) * a.head_dim // tensor
    attention_weights = 2 * m.embed * (a.heads + a.kv_heads) * a.head_dim // tensor
  # The widest block: a mixture has rows for the choices that its device has room for.
  inner, expert_weights, choices = m.mlp, 3 * m.embed * m.mlp, 0
  if m.num_moe_layers:
    choices = _room(moe, mesh.expert)
    rows_wide = (choices + moe.num_shared_experts) * moe.mlp
    inner = max(inner, rows_wide) if m.num_dense_layers else rows_wide
    routed = moe.num_routed_experts // mesh.expert
    expert_weights = 3 * m.embed * moe.mlp * (routed + moe.num_shared_experts)
    heads += 2 * choices * m.embed  # rows sorted by expert, in and out
    if mesh.expert > 1:  # and as they arrive and go back
      heads += 2 * min(moe.num_experts_per_token, mesh.expert) * m.embed + 2 * min(mesh.expert, choices) * m.embed
  products = tokens * (2 * m.embed + heads + 2 * inner // tensor) * width
  span = config.data.seq if mesh.context == 1 else seq // 2  # of a context mesh, one pair of chunks at a time
  scores = rows * a.heads // tensor * min(seq, span) * span * (width + wide)
  block = stream * 6 + products + scores + tokens * inner // tensor * 2 * width
  # attend() keeps no scores of MLA, of dropout or of float64.
  all_of_it = block if a.kind == "gqa" and not a.dropout and width < 8 else block - scores
  a_layer = {"full": stream, "dots": stream + products, "none": all_of_it, "offload": 0}[m.remat]
  layers, waiting = m.layers + m.num_mtp_layers, 0
  if mesh.stage > 1:  # a circuit's layers at a time, and the streams of microbatches under way
    circuits, in_stages = config.parallel.circuits, m.num_moe_layers or m.num_dense_layers
    slots = stage_table(in_stages, mesh.stage, circuits, config.parallel.stage_layers)[0].shape[-1]
    layers, waiting = max(slots, m.layers - in_stages + m.num_mtp_layers), (circuits + 2) * mesh.stage + 3
  weights = (attention_weights + expert_weights // tensor) * width
  if m.num_moe_layers:
    routed = 3 * m.embed * moe.mlp * moe.num_routed_experts // mesh.expert // tensor
    weights += routed * wide  # their gradients, before they scatter
  chunk = min(config.train.loss_chunk, seq)
  return (
    # Blocks of multi-token prediction stand outside the loop over layers: XLA keeps their working sets beside its own.
    a_layer * layers + waiting * stream + (block + weights) * (1 + m.num_mtp_layers),
    2 * rows * chunk * m.vocab // tensor * wide + m.embed * m.vocab // tensor * (width + wide),
  )


def _room(moe, devices):
  """Choices for each of a device's tokens that it has room for: see model/exchange.py."""
  most = devices * min(moe.num_experts_per_token, moe.num_routed_experts // devices)
  return min(most, math.ceil(moe.buffer_factor * moe.num_experts_per_token)) if moe.buffer_factor else most
