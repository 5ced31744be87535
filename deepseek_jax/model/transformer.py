"""The decoder: embedding, scanned stacks of blocks, final norm, output head, and multi-token prediction on top."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.errors import ConfigError
from deepseek_jax.kernels.implementations import chosen
from deepseek_jax.model.batch_context import BatchContext
from deepseek_jax.model.block import Block
from deepseek_jax.model.linear import FP8_OUTPUT, Linear, at_least_float32, matmul_precision, normal_param
from deepseek_jax.model.mtp import MTPLayer
from deepseek_jax.model.norm import RMSNorm
from deepseek_jax.model.rope import rotation
from deepseek_jax.model_config import ModelConfig
from deepseek_jax.sharding import (
  all_gather_params,
  axis_index,
  axis_size,
  reduce_scatter_sequence,
  slice_sequence,
  whole,
)

STACKS = ("dense_layers", "moe_layers")  # in the order that the stream passes them


def init_stack(make, layers, key):
  """`layers` modules made from as many keys, each parameter with a leading `layers` dimension."""
  return jax.vmap(lambda key: make(nnx.Rngs(key)))(jax.random.split(key, layers))


def layer_keys(key, numbers):
  """Keys of the layers `numbers` [n] int; None for no key."""
  return None if key is None else jax.vmap(lambda i: jax.random.fold_in(key, i))(numbers)


def remat_layer(layer, policy):
  """`layer` with the backward pass recomputing what `config.remat` says."""
  if policy == "none":
    return layer
  policies = jax.checkpoint_policies
  offloaded = policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[], names_which_can_be_offloaded=["block_input"],
    offload_src="device", offload_dst="pinned_host",
  )  # fmt: skip
  products = policies.save_from_both_policies(
    policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(FP8_OUTPUT)
  )
  saved = {"full": None, "dots": products, "offload": offloaded}[policy]

  def named(x, *arguments):
    return layer(checkpoint_name(x, "block_input"), *arguments)

  return jax.checkpoint(named if policy == "offload" else layer, policy=saved)


def implementation_fields(config: ModelConfig) -> dict[str, tuple[str, str]]:
  """Of each kernel that the model calls, the config field that names its implementation, and what that says."""
  fields = {"attention": ("model.attention.implementation", config.attention.implementation)}
  if config.precision == "fp8":
    fp8 = "quantize", "swiglu", "fp8_matmul", "fp8_grouped_matmul"
    fields |= dict.fromkeys(fp8, ("model.fp8.implementation", config.fp8.implementation))
  elif config.moe.num_routed_experts:
    fields["grouped_matmul"] = "model.moe.implementation", config.moe.implementation
  return fields


def check_kernels(config: ModelConfig):
  """Raises ConfigError where kernels are asked for that the devices of the mesh do not have."""
  for kernel, (field, implementation) in implementation_fields(config).items():
    if implementation == "pallas":  # else devices are not looked at: several processes may not have met yet
      try:
        chosen(kernel, implementation)
      except ValueError as e:
        raise ConfigError(f"{field}={implementation}: {e}") from e


def nothing(routing, kept):
  """The `observe` of a forward pass of which only the hidden states are wanted."""
  return None


class Transformer(nnx.Module):
  """Every DeepSeek model up to V3: pre-norm, RMSNorm, SwiGLU, RoPE; dense layers first, then mixtures of experts."""

  def __init__(self, config: ModelConfig, key):
    check_kernels(config)
    keys = jax.random.split(key, 5)
    self.embed = normal_param((config.vocab, config.embed), ("vocab", "embed"), config, nnx.Rngs(keys[0]))
    if config.num_dense_layers:
      self.dense_layers = init_stack(lambda rngs: Block(config, rngs), config.num_dense_layers, keys[1])
    if config.num_moe_layers:
      self.moe_layers = init_stack(lambda rngs: Block(config, rngs, experts=True), config.num_moe_layers, keys[3])
    self.final_norm = RMSNorm(config.embed, config)
    if not config.tied_embeddings:
      self.head = Linear((config.embed, config.vocab), ("embed", "vocab"), config, nnx.Rngs(keys[2]))
    if config.num_mtp_layers:
      self.mtp_layers = init_stack(lambda rngs: MTPLayer(config, rngs), config.num_mtp_layers, keys[4])
    self.config = config

  def __call__(self, ids, tokens=None, dropout_key=None, observe=nothing):
    """Final hidden states [batch, stream, embed], normed, in the compute dtype, and what was observed.

    Args:
      ids: [batch, seq] int. tokens: a BatchContext, by default `batch_context(ids)`.
      dropout_key: randomness of dropout; None is none.
      observe: (Routing or None, what a cache keeps) of a layer -> a tree, or None.

    Returns:
      (hidden, {name of the stack: trees of `observe` with a leading layers dimension}).
    """
    tokens, observed = self.batch_context(ids) if tokens is None else tokens, {}
    x, start = self.embed_tokens(ids), 0
    for name, layers in self.stacks():
      count = getattr(self.config, f"num_{name}")
      keys = layer_keys(dropout_key, start + jnp.arange(count))
      x, observed[name] = self.run_layers(layers, x, tokens, keys, observe)
      start += count
    return self.final_norm(x), observed

  def stacks(self):
    """(name, blocks stacked along their first dimension) of each stack, in the order that the stream passes them."""
    return [(name, getattr(self, name)) for name in STACKS if hasattr(self, name)]

  def run_layers(self, layers, x, tokens, keys, observe):
    """(x, trees of `observe`, stacked) after the stacked blocks `layers`; `keys` [layers] or None."""

    def layer(x, scanned):
      block, key = scanned
      x, routing, kept = block(x, tokens, key)
      return x, observe(routing, kept)

    with matmul_precision(self.config):
      return jax.lax.scan(remat_layer(layer, self.config.remat), x, (layers, keys))

  def mtp(self, hidden, ahead, tokens, dropout_key=None, observe=nothing):
    """Hidden states and observations of each depth of multi-token prediction, a list of pairs.

    `hidden` [batch, stream, embed] and `tokens` are those of the main model. `ahead` [depth, batch, seq] int: the ids k + 1
    positions on, for k = 0, 1, ...; -1 where the sequence has ended, and what comes out there means nothing. Position i of
    depth k + 1 has seen ids 0 .. i + k + 1, and predicts id i + k + 2 (V3 eq. 24).
    """
    depths = []
    for depth, ids in enumerate(ahead):
      layer = jax.tree.map(lambda p, depth=depth: p[depth], self.mtp_layers)
      key = None if dropout_key is None else jax.random.fold_in(dropout_key, self.config.layers + depth)
      # A position belongs to the document of its hidden state: a document's last one, which sees the next document's
      # first token, must not be seen by that document. Rotation is relative, so that it may start anywhere.
      tokens = dataclasses.replace(tokens, token_mask=ids >= 0)

      def step(hidden, layer, embedded, tokens, key):
        hidden, routing, kept = layer(hidden, embedded, tokens, key)
        return hidden, observe(routing, kept)

      with matmul_precision(self.config):
        step = remat_layer(step, self.config.remat)
        hidden, seen = step(hidden, layer, self.embed_tokens(jnp.maximum(ids, 0)), tokens, key)
      depths.append((hidden, seen))
    return depths

  def prefill(self, ids):
    """(hidden [batch, seq, embed], cache): a cache of seq positions for `decode`, of what attention keeps of `ids`."""
    return self(ids, observe=lambda routing, kept: kept)

  def decode(self, ids, cache, position):
    """(hidden [batch, 1, embed], cache) after `ids` [batch, 1] at `position`; the cache holds what came before."""
    new, rotation = {}, self.rotation(jnp.reshape(position, (1, 1)))

    def layer(x, scanned):
      block, cache = scanned
      return block.decode(x, rotation, cache, position)

    with matmul_precision(self.config):
      x = self.embed_tokens(ids)
      for name in cache:
        x, new[name] = jax.lax.scan(layer, x, (getattr(self, name), cache[name]))
      return self.final_norm(x), new

  def embed_tokens(self, ids):
    """[batch, stream, embed] in the compute dtype, of `ids` [batch, seq]."""
    table = all_gather_params(self.embed[...].astype(self.config.compute_dtype), "vocab", "embed")
    if axis_size("vocab") == 1:
      return table[ids]
    row = ids - axis_index("vocab") * table.shape[0]
    inside = (row >= 0) & (row < table.shape[0])  # the other devices have the rest
    return reduce_scatter_sequence(jnp.where(inside[..., None], table[jnp.where(inside, row, 0)], 0))

  def batch_context(self, ids, places=None, positions=None, segment_ids=None, key=None):
    """The BatchContext of `ids` [batch, seq], which are at `places` [seq] of their sequence: by default 0 .. seq - 1.

    positions: [batch, seq] int, default `places`, of the rotation. segment_ids: as in BatchContext. key: of the draw that
    exempts sequences from dispatch=capacity; None exempts all.
    """
    batch, seq = ids.shape
    places = jnp.arange(seq) if places is None else places
    rows = axis_index("batch") * batch + jnp.arange(batch)
    return BatchContext(
      rotation=self.rotation(places[None] if positions is None else positions),
      segment_ids=segment_ids,
      token_mask=None,
      no_drop=None if key is None else self.no_drop(rows, key),
      sequence_ids=rows,
      position_ids=slice_sequence(places, 0),
    )

  def no_drop(self, rows, key):
    """[batch] bool: the sequences `rows` of which no layer drops a token in training (V2 section 2.2.4)."""
    share, key = (
      self.config.moe.no_drop_fraction,
      jax.random.fold_in(key, self.config.layers + self.config.num_mtp_layers),
    )
    return jax.vmap(lambda row: jax.random.bernoulli(jax.random.fold_in(key, row), share))(rows)

  def rotation(self, positions):
    """cos and sin of the rotation at `positions` [batch or 1, seq]."""
    return rotation(positions, self.config.attention, at_least_float32(self.config.compute_dtype))

  def output_embedding(self):
    """The head [embed, vocab] that turns hidden states into scores, in its parameter's dtype and layout."""
    return self.embed[...].T if self.config.tied_embeddings else self.head.kernel[...]

  def logits(self, hidden):
    """Scores [batch, stream, vocab] of hidden states [batch, stream, embed], in at least float32."""
    head = all_gather_params(self.output_embedding().astype(hidden.dtype), "embed", "vocab")
    with matmul_precision(self.config):
      logits = jnp.einsum("bsd,dv->bsv", hidden, head, preferred_element_type=at_least_float32(hidden.dtype))
    return whole(logits, "vocab", 2)


def graphdef(config: ModelConfig):
  """The static half of the model, to merge with params and buffers. Allocates nothing; needs a mesh set."""
  return nnx.graphdef(_abstract(config))


def init_params(config: ModelConfig, key):
  """(params, buffers): plain nested dicts of a freshly initialised model."""
  _, params, buffers = nnx.split(Transformer(config, key), nnx.Param, ...)
  return nnx.to_pure_dict(params), nnx.to_pure_dict(buffers)


def param_axes(config: ModelConfig):
  """The tree of params with the logical axes of each, a tuple of names: stacked layers are its first dimension, None."""
  state = nnx.state(_abstract(config), nnx.Param)
  return nnx.to_pure_dict(jax.tree.map(_axes, state, is_leaf=lambda x: isinstance(x, nnx.Variable)))


def _abstract(config: ModelConfig):
  """The model without arrays. The key is made inside: on the mesh of a topology that is not here, nothing may run."""
  return jax.eval_shape(lambda: Transformer(config, jax.random.key(0)))


def _axes(param):
  logical = param.get_metadata()["logical"]
  return (None,) * (len(param.shape) - len(logical)) + logical
