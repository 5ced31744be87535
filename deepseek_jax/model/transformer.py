"""The decoder: embedding, scanned stacks of blocks, final norm, output head, and multi-token prediction on top."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.model.batch_context import BatchContext
from deepseek_jax.model.block import Block
from deepseek_jax.model.kernel_choice import check_kernels
from deepseek_jax.model.layer_output import LayerOutput
from deepseek_jax.model.linear import Linear, at_least_float32, matmul_precision, normal_param
from deepseek_jax.model.mtp import MTPLayer
from deepseek_jax.model.norm import RMSNorm
from deepseek_jax.model.remat import remat_layer
from deepseek_jax.model.rope import rope_cos_sin
from deepseek_jax.model_config import ModelConfig
from deepseek_jax.sharding import (
  all_gather,
  all_gather_params,
  axis_index,
  axis_size,
  reduce_scatter_sequence,
  slice_sequence,
)
from deepseek_jax.typing import Params, PyTree

STACKS = ("dense_layers", "moe_layers")  # in the order in which they run

# What is used of a layer's output, as a tree of arrays, or None.
AuxFn = Callable[[LayerOutput], PyTree]


def layer_names(config: ModelConfig) -> dict[str, list[str]]:
  """{stack: a name for each of its layers}: layer_0, layer_1, ... in the order in which they run; depths are mtp_1, ..."""
  names, first = {}, 0
  for stack in STACKS:
    end = first + getattr(config, f"num_{stack}")
    names[stack], first = [f"layer_{i}" for i in range(first, end)], end
  return names | {"mtp_layers": [f"mtp_{depth}" for depth in range(1, config.num_mtp_layers + 1)]}


def make_rngs(key: jax.Array | None) -> nnx.Rngs | None:
  """The Rngs of `key`; None for no key."""
  return None if key is None else nnx.Rngs(key)


def init_stack(make_layer: Callable[[nnx.Rngs | None], nnx.Module], layers: int, key: jax.Array | None) -> nnx.Module:
  """`layers` modules, each from its own key, as one module whose parameters have a leading `layers` dimension."""
  keys = None if key is None else jax.random.split(key, layers)
  return jax.vmap(lambda key: make_layer(make_rngs(key)), axis_size=layers)(keys)


def layer_keys(key: jax.Array | None, layer_numbers: jax.Array) -> jax.Array | None:
  """Keys [n] of the layers `layer_numbers` int [n]; None for no key."""
  return None if key is None else jax.vmap(lambda i: jax.random.fold_in(key, i))(layer_numbers)


def no_aux(output: LayerOutput) -> None:
  """The AuxFn of a forward pass of which only the hidden states are used."""
  return None


class Transformer(nnx.Module):
  """Every DeepSeek model up to V3: pre-norm, RMSNorm, SwiGLU, RoPE; dense layers first, then mixtures of experts."""

  def __init__(self, config: ModelConfig, key: jax.Array | None):
    """key: of the initial parameters. None: zeros, where only shapes are asked for."""
    check_kernels(config)
    keys = [None] * 5 if key is None else jax.random.split(key, 5)
    self.embed = normal_param((config.vocab, config.embed), ("vocab", "embed"), config, make_rngs(keys[0]))
    if config.num_dense_layers:
      self.dense_layers = init_stack(lambda rngs: Block(config, rngs), config.num_dense_layers, keys[1])
    if config.num_moe_layers:
      self.moe_layers = init_stack(lambda rngs: Block(config, rngs, is_moe=True), config.num_moe_layers, keys[3])
    self.final_norm = RMSNorm(config.embed, config)
    if not config.tied_embeddings:
      self.head = Linear((config.embed, config.vocab), ("embed", "vocab"), config, make_rngs(keys[2]))
    if config.num_mtp_layers:
      self.mtp_layers = init_stack(lambda rngs: MTPLayer(config, rngs), config.num_mtp_layers, keys[4])
    self.config = config

  def __call__(
    self,
    ids: jax.Array,
    batch_context: BatchContext | None = None,
    dropout_key: jax.Array | None = None,
    aux_fn: AuxFn = no_aux,
  ) -> tuple[jax.Array, dict[str, PyTree]]:
    """Final hidden states and the aux outputs of all layers.

    Args:
      ids: int [batch, seq].
      batch_context: default `self.batch_context(ids)`.
      dropout_key: None: no dropout.
      aux_fn: what is returned of each layer's output.

    Returns:
      Hidden states [batch, stream, embed] after the final norm, in the compute dtype, and {name of the stack: what
      aux_fn returns of its layers, with a leading layers dimension}.
    """
    batch_context = self.batch_context(ids) if batch_context is None else batch_context
    x, first_layer, aux = self.embed_tokens(ids), 0, {}
    for name, layers in self.stacks():
      num_layers = getattr(self.config, f"num_{name}")
      keys = layer_keys(dropout_key, first_layer + jnp.arange(num_layers))
      x, aux[name] = self.run_layers(layers, x, batch_context, keys, aux_fn)
      first_layer += num_layers
    return self.final_norm(x), aux

  def stacks(self) -> list[tuple[str, Block]]:
    """(name, blocks stacked along the first dimension of their parameters) of each stack, in order of execution."""
    return [(name, getattr(self, name)) for name in STACKS if hasattr(self, name)]

  def run_layers(
    self, layers: Block, x: jax.Array, batch_context: BatchContext, keys: jax.Array | None, aux_fn: AuxFn
  ) -> tuple[jax.Array, PyTree]:
    """(x, what aux_fn returns with a leading layers dimension) after the stacked blocks `layers`.

    x: [batch, stream, embed]. keys: [layers], of dropout, or None.
    """

    def layer(x, layer_inputs):
      block, key = layer_inputs
      x, output = block(x, batch_context, key)
      return x, aux_fn(output)

    with matmul_precision(self.config):
      return jax.lax.scan(remat_layer(layer, self.config.remat), x, (layers, keys))

  def mtp(
    self,
    hidden: jax.Array,
    next_ids: Sequence[jax.Array] | jax.Array,
    batch_context: BatchContext,
    dropout_key: jax.Array | None = None,
    aux_fn: AuxFn = no_aux,
  ) -> list[tuple[jax.Array, PyTree]]:
    """(hidden states [batch, stream, embed], what aux_fn returns) of each depth of multi-token prediction.

    Position i of depth k + 1 takes ids 0 .. i + k + 1 and predicts id i + k + 2 (V3 eq. 24), for k = 0, 1, ...

    Args:
      hidden: [batch, stream, embed], of the main model. batch_context: of the main model.
      next_ids: int [depth, batch, seq], the ids k + 1 positions later. -1 past the end of the sequence, where the
        hidden states mean nothing.
    """
    depths = []
    for depth, ids in enumerate(next_ids):
      mtp_layer = jax.tree.map(lambda p, depth=depth: p[depth], self.mtp_layers)
      key = None if dropout_key is None else jax.random.fold_in(dropout_key, self.config.layers + depth)
      # A position belongs to the document of its hidden state. A document's last position takes the next document's
      # first token, so that the next document must not attend to it. RoPE is relative: positions may start anywhere.
      depth_context = dataclasses.replace(batch_context, token_mask=ids >= 0, token_ids=jnp.maximum(ids, 0))

      def layer(hidden, mtp_layer, embeddings, batch_context, key):
        hidden, output = mtp_layer(hidden, embeddings, batch_context, key)
        return hidden, aux_fn(output)

      with matmul_precision(self.config):
        embeddings = self.embed_tokens(jnp.maximum(ids, 0))
        rematted_layer = remat_layer(layer, self.config.remat)
        hidden, aux = rematted_layer(hidden, mtp_layer, embeddings, depth_context, key)
      depths.append((hidden, aux))
    return depths

  def embed_tokens(self, ids: jax.Array) -> jax.Array:
    """Embeddings [batch, stream, embed] in the compute dtype, of `ids` int [batch, seq]."""
    table = all_gather_params(self.embed[...].astype(self.config.compute_dtype), "vocab", "embed")
    if axis_size("vocab") == 1:
      return table[ids]
    row = ids - axis_index("vocab") * table.shape[0]
    is_local = (row >= 0) & (row < table.shape[0])  # other devices have the other rows
    return reduce_scatter_sequence(jnp.where(is_local[..., None], table[jnp.where(is_local, row, 0)], 0))

  def batch_context(
    self,
    ids: jax.Array,
    position_ids: jax.Array | None = None,
    rope_positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    no_drop_key: jax.Array | None = None,
  ) -> BatchContext:
    """The BatchContext of `ids` int [batch, seq].

    Args:
      position_ids: int [seq], positions in the sequence, default 0 .. seq - 1.
      rope_positions: int [batch, seq], positions for RoPE, default `position_ids`.
      segment_ids: int [batch, seq], as in BatchContext.
      no_drop_key: draws the sequences of which dispatch=capacity drops nothing; None: of all.
    """
    batch, seq = ids.shape
    position_ids = jnp.arange(seq) if position_ids is None else position_ids
    sequence_ids = axis_index("batch") * batch + jnp.arange(batch)
    return BatchContext(
      rotation=self.rotation(position_ids[None] if rope_positions is None else rope_positions),
      segment_ids=segment_ids,
      token_ids=ids,
      token_mask=None,
      no_drop=None if no_drop_key is None else self.draw_no_drop(sequence_ids, no_drop_key),
      sequence_ids=sequence_ids,
      position_ids=slice_sequence(position_ids, 0),
    )

  def draw_no_drop(self, sequence_ids: jax.Array, key: jax.Array) -> jax.Array:
    """bool [batch]: which sequences of `sequence_ids` int [batch] drop no token in training (V2 section 2.2.4)."""
    fraction = self.config.moe.no_drop_fraction
    key = jax.random.fold_in(key, self.config.layers + self.config.num_mtp_layers)  # unlike the key of any layer
    return jax.vmap(lambda i: jax.random.bernoulli(jax.random.fold_in(key, i), fraction))(sequence_ids)

  def rotation(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """RoPE's (cos, sin) at `positions` int [batch or 1, seq], as in BatchContext."""
    return rope_cos_sin(positions, self.config.attention, at_least_float32(self.config.compute_dtype))

  def output_embedding(self) -> jax.Array:
    """The output head [embed, vocab], in its parameter's dtype and sharding."""
    return self.embed[...].T if self.config.tied_embeddings else self.head.kernel[...]

  def logits(self, hidden: jax.Array) -> jax.Array:
    """Logits [batch, stream, vocab] of hidden states [batch, stream, embed], in at least float32."""
    head = all_gather_params(self.output_embedding().astype(hidden.dtype), "embed", "vocab")
    with matmul_precision(self.config):
      logits = jnp.einsum("bsd,dv->bsv", hidden, head, preferred_element_type=at_least_float32(hidden.dtype))
    return all_gather(logits, "vocab", 2)


def graphdef(config: ModelConfig) -> nnx.GraphDef:
  """The static half of the model, to merge with params and buffers. Allocates nothing; needs a mesh set."""
  return nnx.graphdef(_abstract_model(config))


def init_params(config: ModelConfig, key: jax.Array | None) -> tuple[Params, Params]:
  """(params, buffers) of an initial model, as `Transformer` makes it of `key`: plain nested dicts of arrays."""
  _, params, buffers = nnx.split(Transformer(config, key), nnx.Param, ...)  # type: ignore[misc]
  return nnx.to_pure_dict(params), nnx.to_pure_dict(buffers)


def param_axes(config: ModelConfig, stacked: bool = True) -> Params:
  """The tree of params with each one's logical axes, a tuple of names.

  stacked: with the first axis of stacked layers, which is None; else the axes that a layer by itself has.
  """
  state, axes = nnx.state(_abstract_model(config), nnx.Param), _logical_axes if stacked else _layer_axes
  return nnx.to_pure_dict(jax.tree.map(axes, state, is_leaf=lambda x: isinstance(x, nnx.Variable)))


def buffer_types(config: ModelConfig) -> Params:
  """The tree of buffers with each one's type, a subclass of nnx.Variable."""
  state = nnx.state(_abstract_model(config), nnx.Not(nnx.Param))
  return nnx.to_pure_dict(jax.tree.map(type, state, is_leaf=lambda x: isinstance(x, nnx.Variable)))


def _abstract_model(config: ModelConfig) -> Transformer:
  """The model without arrays."""
  return _trace_model(config, jax.sharding.get_abstract_mesh(), jax.dtypes.canonicalize_dtype(config.param_dtype))


@functools.cache  # a start needs it several times, and tracing takes seconds
def _trace_model(config: ModelConfig, mesh: jax.sharding.AbstractMesh, dtype: jnp.dtype) -> Transformer:
  """The model without arrays; `mesh`, the one that is set, and `dtype`, that of its parameters, fix what comes out."""
  return jax.eval_shape(lambda: Transformer(config, key=None))


def _layer_axes(param: nnx.Variable) -> tuple[str | None, ...]:
  return param.get_metadata()["logical"]


def _logical_axes(param: nnx.Variable) -> tuple[str | None, ...]:
  logical = _layer_axes(param)
  return (None,) * (len(param.shape) - len(logical)) + logical
