"""How much memory a training step needs on each device: derived from shapes, before any device exists."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from deepseek_jax.config import Config
from deepseek_jax.mesh import abstract_mesh
from deepseek_jax.model.expert_parallel import has_ragged_all_to_all
from deepseek_jax.parallel.pipeline import layer_assignment
from deepseek_jax.plan.flops import abstract_params
from deepseek_jax.plan.topology import Chip
from deepseek_jax.sharding import UNSHARDED_PARAMS, elements_per_device, num_batch_shards, rules


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


# How often XLA holds each of these at the peak of a step: fitted to what libtpu 0.0.50 allocates for 36 steps, dense and
# mixtures, on v5e, v5p, v6e and tpu7x, 4 to 1024 chips, all within 10% but a model of 0.1 GiB. Two copies of what is kept, or of
# the scores, are XLA's own, not the program's.
COPIES = {
  "kept_inputs": 1.67, "kept_products": 0.95, "kept": 1.0, "scores": 2.08, "head": 1.16, "layer": 1.83, "experts": 4.4,
  "rows": 7.5, "gradients": 3.72, "whole_gradients": 1.56,
}  # fmt: skip


def estimate_memory(config: Config, chip: Chip | None = None) -> Memory:
  """Bytes per device of a step of `config`, whose mesh sizes are resolved, on that kind of chip; default v5p.

  Parameters and moments are exact; with ZeRO 1 and 2, and in a pipeline, weights in use come on top, as collectives. Of the
  rest what is large is counted, times COPIES: gradients in float32; what the forward pass keeps under the remat policy, the
  scores of a block, the rows of its experts; the weights of a block as they are gathered, and their gradients; under other
  the gathered head with its gradient, and logits.
  """
  model, mesh, zero = config.model, config.mesh, config.parallel.zero
  shapes = dataclasses.replace(model, remat="full", moe=dataclasses.replace(model.moe, buffer_factor=0.0))
  kept = _elements(shapes, mesh)
  bytes_kept, compute = jnp.dtype(model.param_dtype).itemsize, jnp.dtype(model.compute_dtype).itemsize
  in_use, gradients = 0, COPIES["gradients"] * kept
  if zero < 3:
    whole = _elements(shapes, mesh, whole=True)
    if mesh.stage > 1:  # the last stack is in the stages, the rest whole on each
      staged = _elements(shapes, mesh, whole=True, stack="moe_layers" if model.num_moe_layers else "dense_layers")
      whole += staged // mesh.stage - staged
    in_use, gradients = whole * compute, COPIES["whole_gradients"] * whole
  elif mesh.stage > 1:
    in_use = kept * bytes_kept  # laid out in stages
  moments = 0 if config.optimizer.offload else 2 * kept * jnp.dtype(config.optimizer.moments_dtype).itemsize
  activations, weights, head = map(int, _passes(config, compute, chip))
  return Memory(kept * bytes_kept, moments, int(gradients * bytes_kept), activations, in_use + weights, head)


@functools.cache  # a search asks for few meshes and many ways to use them
def _elements(model, mesh, whole=False, stack=None):
  """Parameters, of one stack or all, that one device holds outside of `rules`; `whole`: as ZeRO 1 and 2 use them."""
  with rules(UNSHARDED_PARAMS if whole else {}):
    params = abstract_params(model, mesh)[0]
    return sum(elements_per_device(leaf) for leaf in jax.tree.leaves(params[stack] if stack else params))


def _passes(config: Config, width, chip):
  """(activations, weights of a block, head): bytes in a microbatch's passes, elements being `width` bytes wide."""
  m, mesh, moe, tensor = config.model, config.mesh, config.model.moe, config.mesh.tensor
  wide = max(4, width)
  rows = -(-(config.train.microbatch or config.train.global_batch) // num_batch_shards(abstract_mesh(mesh)))
  seq = config.data.seq // mesh.context
  stream = rows * seq * m.embed * width // tensor  # one residual stream
  _, attention = _attention(m, tensor)
  experts = 3 * m.embed * moe.mlp * (moe.num_routed_experts // mesh.expert) // tensor
  # The whole sequence, or of a context mesh one pair of chunks at a time.
  span = config.data.seq if mesh.context == 1 else seq // 2
  scores = 0 if fused_attention(config, chip) else rows * m.attention.heads // tensor * min(seq, span) * span * wide
  expert_rows = rows * seq * _room(moe, mesh.expert) * m.embed * width
  # Where messages are padded, rows for all devices, there and here.
  padding = 0 if mesh.expert == 1 or not chip or has_ragged_all_to_all(chip.kind) else 2 * mesh.expert
  a_layer = _kept(config, width, rows * seq, scores, expert_rows, (attention + experts) * width)
  layers, waiting, ends = m.layers + m.num_mtp_layers, 0, 1 + m.num_mtp_layers
  if mesh.stage > 1:  # a virtual_stage's layers, and the streams of microbatches under way; the head has its turn after
    virtual_stages, in_stages = config.parallel.virtual_stages, m.num_moe_layers or m.num_dense_layers
    slots = layer_assignment(in_stages, mesh.stage, virtual_stages, config.parallel.stage_layers)[0].shape[-1]
    layers, waiting, ends = (
      max(slots, m.layers - in_stages + m.num_mtp_layers),
      (virtual_stages + 2) * mesh.stage + 3,
      0,
    )
  return (
    a_layer * layers
    + waiting * stream
    + _score_copies(config, chip) * scores
    + COPIES["rows"] * expert_rows
    + padding * rows * seq * m.embed * width,
    (COPIES["layer"] * (attention + 3 * m.embed * m.mlp // tensor) + COPIES["experts"] * experts) * width,
    COPIES["head"] * m.embed * m.vocab // tensor * (width + wide) * ends
    + rows * min(config.train.loss_chunk, seq) * m.vocab // tensor * wide,
  )


def _kept(config: Config, width, tokens, scores, expert_rows, weights):
  """Bytes that a layer's forward pass keeps of `tokens` under the remat policy; `weights` of its attention and experts."""
  m, a, moe, tensor = config.model, config.model.attention, config.model.moe, config.mesh.tensor
  stream, (heads, _) = tokens * m.embed * width // tensor, _attention(m, tensor)
  if m.remat in ("full", "offload"):
    return COPIES["kept_inputs"] * stream * (m.remat == "full")
  inner = (m.num_dense_layers * m.mlp + m.num_moe_layers * moe.num_shared_experts * moe.mlp) // m.layers  # on average
  if m.remat == "dots":  # products of whole matrices, which those of routed experts are not
    if a.kind == "mla" and config.mesh.context > 1:  # keys and values are made of latents for every pair of chunks
      heads += a.heads * (a.qk_nope_head_dim + a.v_head_dim) // tensor * (2 * config.mesh.context - 1) // 2
    return COPIES["kept_products"] * (stream + tokens * (2 * m.embed + heads + 2 * inner // tensor) * width)
  # Gathered weights too, and what is elementwise; attend() keeps no scores of MLA or dropout.
  kept_scores = 1.5 * scores if a.kind == "gqa" and not a.dropout and width < 8 else 0
  inner_rows = 6 * (inner + _room(moe, config.mesh.expert) * moe.mlp) // tensor
  weights += 3 * m.embed * inner // tensor * width
  return COPIES["kept"] * (
    14 * stream + tokens * (heads + inner_rows) * width + 3 * expert_rows + kept_scores + weights
  )


def _attention(model, tensor):
  """(numbers that a token's queries, keys and values have, parameters) of a layer's attention on a device."""
  a = model.attention
  if a.kind != "mla":
    widths = (a.heads + 2 * a.kv_heads) * a.head_dim // tensor
    return widths, 2 * model.embed * (a.heads + a.kv_heads) * a.head_dim // tensor
  key, value = a.qk_nope_head_dim + a.qk_rope_head_dim, a.v_head_dim
  params = a.q_lora_rank * model.embed + (a.q_lora_rank or model.embed) * a.heads * key // tensor
  params += a.kv_lora_rank * (model.embed + a.heads * (a.qk_nope_head_dim + value) // tensor)
  params += a.heads * value * model.embed // tensor
  return a.heads * (2 * key + value + a.qk_nope_head_dim) // tensor + a.q_lora_rank + a.kv_lora_rank, params


def fused_attention(config: Config, chip: Chip | None):
  """Whether attention is a kernel that keeps scores on the chip: see kernels/attention/. Of GPUs only where it is asked for
  by name, since it is that of a library which may not be installed."""
  a, dtype = config.model.attention, config.model.compute_dtype
  on_tpu = not chip or chip.torus > 0
  wanted = (
    a.implementation != "xla" and dtype != "float64" if on_tpu else a.implementation == "pallas" and dtype == "bfloat16"
  )
  whole = config.mesh.context == 1 or a.kv_comm == "gather"
  return wanted and whole and config.data.seq // config.mesh.context % 128 == 0 and not a.dropout


def _score_copies(config: Config, chip):
  """XLA makes more copies of the scores with a key head for each query head, then most on newer chips, and under `dots`."""
  a, dots = config.model.attention, config.model.remat == "dots"
  if a.kind == "mla" or a.kv_heads < a.heads:
    return COPIES["scores"] + (dots and a.kind != "mla")
  new = chip and chip.kind in ("TPU v6e", "TPU7x")
  return 4.1 if new else COPIES["scores"] + (config.mesh.tensor > 1) + 2 * dots


def _room(moe, devices):
  """Choices for each of a device's tokens that it has room for: see model/exchange.py."""
  if not moe.num_routed_experts:
    return 0
  most = devices * min(moe.num_experts_per_token, moe.num_routed_experts // devices)
  return min(most, math.ceil(moe.buffer_factor * moe.num_experts_per_token)) if moe.buffer_factor else most
