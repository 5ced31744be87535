"""HBM that a training step needs on each device, from shapes alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from deepseek_jax.config import Config
from deepseek_jax.config_sections import MeshConfig, OptimizerConfig
from deepseek_jax.kernels.implementations import native_file, supports
from deepseek_jax.mesh import abstract_mesh
from deepseek_jax.model.all_to_all import has_ragged_all_to_all
from deepseek_jax.model.expert_buffers import expert_buffers
from deepseek_jax.model.kernel_choice import attention_support
from deepseek_jax.model_config import ModelConfig
from deepseek_jax.optimizers.optimizer import UPDATE_BYTES, make_optimizer
from deepseek_jax.optimizers.trainable import split_trainable
from deepseek_jax.parallel.pipeline import layer_assignment
from deepseek_jax.plan.attention import ATTENTION_PLANS
from deepseek_jax.plan.flops import TRACE_DEVICE, abstract_params
from deepseek_jax.plan.topology import Chip
from deepseek_jax.sharding import elements_per_device, num_batch_shards


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
  """Bytes of HBM on one device. What is offloaded to the host is not counted."""

  params: int  # master weights
  optimizer: int  # moments or momentum
  gradients: int
  activations: int
  collectives: int  # gathered weights
  other: int  # the gathered head with its gradient, and logits; or what an optimizer's update needs beyond all of that

  @property
  def total_bytes(self) -> int:
    return sum(dataclasses.astuple(self))


# How many copies of each array XLA has live at the peak of a step. Fitted to what libtpu 0.0.50 allocates for 36 steps,
# dense and MoE, on v5e, v5p, v6e and tpu7x, 4 to 1024 chips. The fit is within 10% for all but a model of 0.1 GiB.
# Second copies of saved activations and of the scores are XLA's own, not the program's.
COPIES = {
  "saved_inputs": 1.67,  # block inputs, remat=full
  "saved_matmuls": 0.95,  # matmul outputs, remat=dots
  "saved": 1.0,  # activations, remat=none
  "scores": 2.08,
  "head": 1.16,
  "layer": 1.83,  # weights of a block but for its experts
  "experts": 4.4,
  "expert_rows": 7.5,
  "gradients": 3.72,  # sharded, with ZeRO 3
  "unsharded_gradients": 1.56,  # with ZeRO 1 and 2
}


def estimate_memory(config: Config, chip: Chip | None = None) -> MemoryEstimate:
  """Bytes per device of a training step.

  Parameters and optimizer state are exact. The rest counts the large arrays, times COPIES:
  - gradients in float32,
  - activations: those that the remat policy saves, the attention scores of a block, the rows of its experts,
  - collectives: the gathered weights of a block and their gradients. With ZeRO 1 and 2, and in a pipeline, also the
    weights that stay gathered through a step,
  - other: the gathered head with its gradient, and logits.

  A large update (UPDATE_BYTES) is a peak of its own, with one copy of the gradients: what the passes need is free by
  then, since clipping waits for all gradients. Where that peak is the higher one, `other` has the difference.

  Args:
    config: with resolved mesh sizes.
    chip: a v5p if None.
  """
  model, mesh, zero = config.model, config.mesh, config.parallel.zero
  shapes = _shapes_only(model)
  param_bytes, compute_bytes = jnp.dtype(model.param_dtype).itemsize, jnp.dtype(model.compute_dtype).itemsize
  sharded = _params_per_device(shapes, mesh)
  trainable = _params_per_device(shapes, mesh, trainable=config.optimizer.trainable)
  gathered, gradients = 0, COPIES["gradients"] * trainable
  if zero < 3:
    unsharded = _params_per_device(shapes, mesh, unsharded=True)
    if mesh.stage > 1:  # the last stack is split into stages, every stage has the rest
      stack = "moe_layers" if model.num_moe_layers else "dense_layers"
      staged = _params_per_device(shapes, mesh, unsharded=True, stack=stack)
      unsharded += staged // mesh.stage - staged
    gathered, gradients = unsharded * compute_bytes, COPIES["unsharded_gradients"] * unsharded * trainable / sharded
  elif mesh.stage > 1:
    gathered = sharded * param_bytes  # a copy in stage layout
  opt_state_bytes = _opt_state_bytes(
    config.optimizer, shapes, mesh
  )  # also where it is not here: this checks the section
  moments = 0 if config.optimizer.offload else opt_state_bytes
  activations, block_weights, head = map(int, _temporaries(config, compute_bytes, chip))
  gradient_bytes, collectives = int(gradients * param_bytes), gathered + block_weights
  update = trainable * param_bytes + _update_bytes(config.optimizer, shapes, mesh)
  other = max(head, update - gradient_bytes - activations - collectives)
  return MemoryEstimate(sharded * param_bytes, moments, gradient_bytes, activations, collectives, other)


def _shapes_only(model: ModelConfig) -> ModelConfig:
  """`model` with fields that no shape depends on at one value, for the caches below."""
  return dataclasses.replace(model, remat="full", moe=dataclasses.replace(model.moe, buffer_factor=0.0))


@functools.cache  # a search asks for few meshes, each with many microbatches and remat policies
def _params_per_device(
  model: ModelConfig,
  mesh: MeshConfig,
  unsharded: bool = False,
  stack: str | None = None,
  trainable: tuple[str, ...] = (),
) -> int:
  """Parameters on one device, of one stack or of all, that `trainable` selects (`optimizer.trainable`).

  unsharded: as ZeRO 1 and 2 gather them for a step.
  """
  params, _ = split_trainable(abstract_params(model, mesh, unsharded)[0], trainable)
  return sum(elements_per_device(leaf) for leaf in jax.tree.leaves(params[stack] if stack else params))


@functools.cache
def _opt_state_bytes(optimizer: OptimizerConfig, model: ModelConfig, mesh: MeshConfig) -> int:
  """Bytes of the optimizer's state on one device, without its counters."""
  params, _ = split_trainable(abstract_params(model, mesh)[0], optimizer.trainable)
  with jax.sharding.use_abstract_mesh(abstract_mesh(mesh, TRACE_DEVICE)):
    state = jax.eval_shape(make_optimizer(optimizer, model).init, params)
  return sum(elements_per_device(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state) if leaf.ndim)


@functools.cache
def _update_bytes(optimizer: OptimizerConfig, model: ModelConfig, mesh: MeshConfig) -> int:
  """Bytes on one device of what the optimizer's update makes."""
  if optimizer.kind not in UPDATE_BYTES:
    return 0
  params, _ = split_trainable(abstract_params(model, mesh)[0], optimizer.trainable)
  with jax.sharding.use_abstract_mesh(abstract_mesh(mesh, TRACE_DEVICE)):
    return UPDATE_BYTES[optimizer.kind](model, params)


def _temporaries(config: Config, compute_bytes: int, chip: Chip | None) -> tuple[float, float, float]:
  """Bytes of a microbatch's passes: (activations, gathered weights of a block, head).

  `compute_bytes`: of an element.
  """
  m, mesh, moe, tensor = config.model, config.mesh, config.model.moe, config.mesh.tensor
  softmax_bytes = max(4, compute_bytes)  # scores and logits are at least float32
  microbatch = config.train.microbatch or config.train.global_batch
  sequences = -(-microbatch // num_batch_shards(abstract_mesh(mesh)))
  seq = config.data.seq // mesh.context
  tokens = sequences * seq
  residual = tokens * m.embed * compute_bytes // tensor  # one residual stream
  attention_params = _attention_params(_shapes_only(m), tensor)
  expert_params = 3 * m.embed * moe.mlp * (moe.num_routed_experts // mesh.expert) // tensor
  # Keys of a query: the whole sequence, or with context parallelism one pair of chunks at a time.
  keys = config.data.seq if mesh.context == 1 else seq // 2
  scores = 0
  if not uses_fused_attention(config, chip.kind if chip else TRACE_DEVICE.device_kind):
    scores = sequences * m.attention.heads // tensor * min(seq, keys) * keys * softmax_bytes
  slots = _expert_slots(config, tokens)
  expert_rows = slots * m.embed * compute_bytes
  # A padded all-to-all has buffers with a row per token for every device, on the way there and back.
  is_padded = mesh.expert > 1 and chip and not has_ragged_all_to_all(chip.kind)
  padded_rows = 2 * mesh.expert if is_padded else 0
  block_weights = (attention_params + expert_params) * compute_bytes
  saved = _saved_bytes_per_layer(config, compute_bytes, tokens, slots, scores, block_weights)
  layers, in_flight, head_passes = m.layers + m.num_mtp_layers, 0, 1 + m.num_mtp_layers
  if mesh.stage > 1:  # layers of a virtual stage, residual streams of the microbatches in flight; the head runs later
    virtual_stages, staged_layers = config.parallel.virtual_stages, m.num_moe_layers or m.num_dense_layers
    slots = layer_assignment(staged_layers, mesh.stage, virtual_stages, config.parallel.stage_layers)[0].shape[-1]
    layers = max(slots, m.layers - staged_layers + m.num_mtp_layers)
    in_flight = (virtual_stages + 2) * mesh.stage + 3
    head_passes = 0
  activations = (
    saved * layers
    + in_flight * residual
    + _score_copies(config, chip) * scores
    + COPIES["expert_rows"] * expert_rows
    + padded_rows * tokens * m.embed * compute_bytes
  )
  layer_params = attention_params + 3 * m.embed * m.mlp // tensor
  weights = (COPIES["layer"] * layer_params + COPIES["experts"] * expert_params) * compute_bytes
  head = COPIES["head"] * m.embed * m.vocab // tensor * (compute_bytes + softmax_bytes) * head_passes
  logits = sequences * min(config.train.loss_chunk, seq) * m.vocab // tensor * softmax_bytes
  return activations, weights, head + logits


def _saved_bytes_per_layer(
  config: Config, compute_bytes: int, tokens: int, slots: int, scores: float, block_weights: float
) -> float:
  """Bytes of activations that a layer's forward pass saves under the remat policy.

  Args:
    tokens: on the device. slots: of its expert buffer.
    scores, block_weights: bytes of the layer's attention scores and gathered weights.
  """
  m, a, moe, tensor = config.model, config.model.attention, config.model.moe, config.mesh.tensor
  residual, attention = tokens * m.embed * compute_bytes // tensor, ATTENTION_PLANS[a.kind]
  head_dims, latent_dims = attention.qkv_dims(a)
  qkv_dims = head_dims // tensor + latent_dims
  if m.remat in ("full", "offload"):
    return COPIES["saved_inputs"] * residual * (m.remat == "full")
  # Inner width of the SwiGLUs that all tokens pass, on average over the layers.
  mlp = (m.num_dense_layers * m.mlp + m.num_moe_layers * moe.num_shared_experts * moe.mlp) // m.layers
  if m.remat == "dots":  # outputs of ordinary matmuls, but not of the grouped ones of routed experts
    if config.mesh.context > 1:
      qkv_dims += attention.expanded_dims(a) // tensor * (2 * config.mesh.context - 1) // 2
    matmul_dims = 2 * m.embed + qkv_dims + 2 * mlp // tensor
    return COPIES["saved_matmuls"] * (residual + tokens * matmul_dims * compute_bytes)
  # remat=none saves gathered weights and elementwise results too. Dropout and float64 recompute their scores.
  saved_scores = 0 if attention.recomputes_scores or a.dropout or compute_bytes >= 8 else 1.5 * scores
  mlp_elements = 6 * (tokens * mlp + slots * moe.mlp) // tensor
  block_weights += 3 * m.embed * mlp // tensor * compute_bytes
  expert_rows = slots * m.embed * compute_bytes
  activations = 14 * residual + (tokens * qkv_dims + mlp_elements) * compute_bytes + 3 * expert_rows
  return COPIES["saved"] * (activations + saved_scores + block_weights)


@functools.cache
def _attention_params(model: ModelConfig, tensor: int) -> int:
  """Parameters of a layer's attention on a device, all-gathered over what FSDP shards."""
  params = abstract_params(model, MeshConfig(data=1, tensor=tensor))[0]
  stack = params["moe_layers" if model.num_moe_layers else "dense_layers"]["attn"]
  return sum(elements_per_device(leaf) // leaf.shape[0] for leaf in jax.tree.leaves(stack))


def _expert_slots(config: Config, tokens: int) -> int:
  """Assignments that the expert buffer of a device with `tokens` holds."""
  moe = config.model.moe
  if not moe.num_routed_experts:
    return 0
  return expert_buffers(
    tokens, moe.num_experts_per_token, moe.num_routed_experts, config.mesh.expert, moe.buffer_factor
  ).capacity


def with_xla_attention(config: Config) -> Config:
  """`config` with XLA's attention instead of a kernel."""
  attention = dataclasses.replace(config.model.attention, implementation="xla")
  return dataclasses.replace(config, model=dataclasses.replace(config.model, attention=attention))


def uses_fused_attention(config: Config, device_kind: str) -> bool:
  """Whether attention is a kernel that keeps scores out of HBM, see kernels/attention/.

  On GPUs the kernel counts only where the config names it: it needs a library that may not be installed.
  """
  model, seq = config.model, config.data.seq
  file, implementation = native_file(device_kind), model.attention.implementation
  if not file or implementation == "xla" or (file == "pallas_gpu" and implementation == "auto"):
    return False
  queries, (key_dim, value_dim) = (
    seq // config.mesh.context,
    ATTENTION_PLANS[model.attention.kind].head_dims(model.attention),
  )
  q, k, v = (
    jax.ShapeDtypeStruct((1, positions, 1, width), jnp.dtype(model.compute_dtype))
    for positions, width in ((queries, key_dim), (seq, key_dim), (seq, value_dim))
  )
  is_shared = config.mesh.context > 1
  function = "attention_of_part" if is_shared else "attention"
  return bool(attention_support(model.attention, is_shared) and supports("attention", function, file, q, k, v))


def _score_copies(config: Config, chip: Chip | None) -> float:
  """Live copies of the scores. XLA makes more where each query head has its own key head, above all on newer chips."""
  a, is_dots = config.model.attention, config.model.remat == "dots"
  attention = ATTENTION_PLANS[a.kind]
  if attention.recomputes_scores:
    return COPIES["scores"]
  if attention.num_kv_heads(a) < a.heads:
    return COPIES["scores"] + is_dots
  is_newer_chip = chip and chip.kind in ("TPU v6e", "TPU7x")
  return 4.1 if is_newer_chip else COPIES["scores"] + (config.mesh.tensor > 1) + 2 * is_dots
