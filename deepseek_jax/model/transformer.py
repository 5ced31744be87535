"""The decoder: embedding, scanned stacks of blocks, final norm, output head, and multi-token prediction on top."""

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.model.block import Block
from deepseek_jax.model.linear import Linear, at_least_float32, matmul_precision, normal_param
from deepseek_jax.model.mtp import MTPLayer
from deepseek_jax.model.norm import RMSNorm
from deepseek_jax.model.rope import rotation
from deepseek_jax.model_config import ModelConfig
from deepseek_jax.sharding import gathered, spec

STACKS = ("dense_layers", "moe_layers")  # in the order that the stream passes them


def stacked(make, layers, key):
  """`layers` modules made from as many keys, each parameter with a leading `layers` dimension."""
  return jax.vmap(lambda key: make(nnx.Rngs(key)))(jax.random.split(key, layers))


def rematerialised(layer, policy):
  """`layer` with the backward pass recomputing what `config.remat` says."""
  if policy == "none":
    return layer
  saved = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}[policy]
  return jax.checkpoint(layer, policy=saved)


def nothing(routing, kept):
  """The `observe` of a forward pass of which only the hidden states are wanted."""
  return None


class Transformer(nnx.Module):
  """Every DeepSeek model up to V3: pre-norm, RMSNorm, SwiGLU, RoPE; dense layers first, then mixtures of experts."""

  def __init__(self, config: ModelConfig, key):
    keys = jax.random.split(key, 5)
    self.embed = normal_param((config.vocab, config.embed), ("vocab", "embed"), config, nnx.Rngs(keys[0]))
    if config.num_dense_layers:
      self.dense_layers = stacked(lambda rngs: Block(config, rngs), config.num_dense_layers, keys[1])
    if config.num_moe_layers:
      self.moe_layers = stacked(lambda rngs: Block(config, rngs, experts=True), config.num_moe_layers, keys[3])
    self.final_norm = RMSNorm(config.embed, config)
    if not config.tied_embeddings:
      self.head = Linear((config.embed, config.vocab), ("embed", "vocab"), config, nnx.Rngs(keys[2]))
    if config.num_mtp_layers:
      self.mtp_layers = stacked(lambda rngs: MTPLayer(config, rngs), config.num_mtp_layers, keys[4])
    self.config = config

  def __call__(self, tokens, positions=None, segment_ids=None, dropout_key=None, observe=nothing):
    """Final hidden states [batch, seq, embed], normed, in the compute dtype, and what was observed.

    Args:
      tokens: [batch, seq] int. positions: [batch, seq] int, default 0 .. seq - 1.
      segment_ids: [batch, seq] int; attention stays within a segment. Default: one segment.
      dropout_key: randomness of dropout and of the capacity dispatch; None is neither.
      observe: (Routing or None, what a cache keeps) of a layer -> a tree, or None.

    Returns:
      (hidden, {name of the stack: trees of `observe` with a leading layers dimension}).
    """
    config, angles, observed = self.config, self.angles(tokens, positions), {}
    exempt = self.exempt(tokens, dropout_key)
    keys = None if dropout_key is None else jax.random.split(dropout_key, config.layers)

    def layer(x, scanned):
      block, key = scanned
      x, routing, kept = block(x, angles, segment_ids, key, exempt)
      return x, observe(routing, kept)

    with matmul_precision(config):
      x, start = self.embedded(tokens), 0
      for name, layers in ((s, getattr(self, s)) for s in STACKS if hasattr(self, s)):
        count = getattr(config, f"num_{name}")
        scanned = (layers, None if keys is None else keys[start : start + count])
        x, observed[name] = jax.lax.scan(rematerialised(layer, config.remat), x, scanned)
        start += count
      return self.final_norm(x), observed

  def mtp(self, hidden, tokens, positions=None, segment_ids=None, dropout_key=None, observe=nothing):
    """Hidden states and observations of each depth of multi-token prediction, a list of pairs.

    `hidden` [batch, seq, embed] is what `tokens` [batch, seq] gave; the other arguments are those of that call. Depth k
    has seq - k positions: its position i has seen tokens 0 .. i + k, and predicts token i + k + 1 (V3 eq. 24).
    """
    config, depths = self.config, []
    embedded, angles = self.embedded(tokens), self.angles(tokens, positions)
    exempt = self.exempt(tokens, dropout_key)
    for depth in range(config.num_mtp_layers):
      layer = jax.tree.map(lambda p, depth=depth: p[depth], self.mtp_layers)
      # A position belongs to the document of its hidden state: a document's last one, which sees the next document's
      # first token, must not be seen by that document. Rotation is relative, so that it may start anywhere.
      embedded, angles = embedded[:, 1:], jax.tree.map(lambda a: a[:, :-1], angles)
      segment_ids = None if segment_ids is None else segment_ids[:, :-1]
      key = None if dropout_key is None else jax.random.fold_in(dropout_key, config.layers + depth)

      def step(layer, *arguments):
        hidden, routing, kept = layer(*arguments)
        return hidden, observe(routing, kept)

      with matmul_precision(config):
        step = rematerialised(step, config.remat)
        hidden, seen = step(layer, hidden[:, :-1], embedded, angles, segment_ids, key, exempt)
      depths.append((hidden, seen))
    return depths

  def prefill(self, tokens):
    """(hidden [batch, seq, embed], cache): a cache of seq positions for `decode`, of what attention keeps of `tokens`."""
    return self(tokens, observe=lambda routing, kept: kept)

  def decode(self, tokens, cache, position):
    """(hidden [batch, 1, embed], cache) after `tokens` [batch, 1] at `position`; the cache holds what came before."""
    config, new = self.config, {}
    angles = self.angles(tokens, jnp.reshape(position, (1, 1)))

    def layer(x, scanned):
      block, cache = scanned
      return block.decode(x, angles, cache, position)

    with matmul_precision(config):
      x = self.embedded(tokens)
      for name in cache:
        x, new[name] = jax.lax.scan(layer, x, (getattr(self, name), cache[name]))
      return self.final_norm(x), new

  def embedded(self, tokens):
    """[batch, seq, embed] in the compute dtype."""
    table = gathered(self.embed[...].astype(self.config.compute_dtype), "vocab", "embed")
    return table.at[tokens].get(out_sharding=spec("batch", "seq", None))

  def exempt(self, tokens, key):
    """[batch] bool: the sequences of which no layer drops a token in training (V2 section 2.2.4); None without a key."""
    if key is None:
      return None
    key = jax.random.fold_in(key, self.config.layers + self.config.num_mtp_layers)
    return jax.random.bernoulli(key, self.config.moe.capacity_exempt, tokens.shape[:1], out_sharding=spec("batch"))

  def angles(self, tokens, positions):
    """cos and sin of the rotation at `positions`, or at 0 .. seq - 1."""
    positions = jnp.arange(tokens.shape[1])[None] if positions is None else positions
    return rotation(positions, self.config.attention, at_least_float32(self.config.compute_dtype))

  def unembedding(self):
    """The head [embed, vocab] that turns hidden states into scores, in its parameter's dtype and layout."""
    return self.embed[...].T if self.config.tied_embeddings else self.head.kernel[...]

  def logits(self, hidden):
    """Scores [batch, seq, vocab] of hidden states [batch, seq, embed], in at least float32."""
    head = gathered(self.unembedding().astype(hidden.dtype), "embed", "vocab")
    with matmul_precision(self.config):
      return jnp.einsum(
        "bsd,dv->bsv", hidden, head,
        preferred_element_type=at_least_float32(hidden.dtype),
        out_sharding=spec("batch", "seq", "vocab"),
      )  # fmt: skip


def graphdef(config: ModelConfig):
  """The static half of the model, to merge with params and buffers. Allocates nothing; needs a mesh set."""
  return nnx.graphdef(jax.eval_shape(lambda key: Transformer(config, key), jax.random.key(0)))


def new_params(config: ModelConfig, key):
  """(params, buffers): plain nested dicts of a freshly initialised model."""
  _, params, buffers = nnx.split(Transformer(config, key), nnx.Param, ...)
  return nnx.to_pure_dict(params), nnx.to_pure_dict(buffers)
