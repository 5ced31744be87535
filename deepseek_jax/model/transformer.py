"""The decoder: embedding, a scanned stack of blocks, final norm, output head."""

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.model.block import Block
from deepseek_jax.model.linear import Linear, at_least_float32, matmul_precision, normal_param
from deepseek_jax.model.norm import RMSNorm
from deepseek_jax.model.rope import rotation
from deepseek_jax.model_config import ModelConfig
from deepseek_jax.sharding import gathered, gathered_for_loop, spec


def stacked(make, layers, key):
  """`layers` modules made from as many keys, each parameter with a leading `layers` dimension."""
  return jax.vmap(lambda key: make(nnx.Rngs(key)))(jax.random.split(key, layers))


def rematerialised(layer, policy):
  """`layer` with the backward pass recomputing what `config.remat` says."""
  if policy == "none":
    return layer
  saved = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}[policy]
  return jax.checkpoint(layer, policy=saved)


class Transformer(nnx.Module):
  """DeepSeek LLM (arXiv:2401.02954 section 2.2): pre-norm, RMSNorm, SwiGLU, RoPE, untied embeddings."""

  def __init__(self, config: ModelConfig, key):
    keys = jax.random.split(key, 3)
    self.embed = normal_param((config.vocab, config.embed), ("vocab", "embed"), config, nnx.Rngs(keys[0]))
    self.dense_layers = stacked(lambda rngs: Block(config, rngs), config.layers, keys[1])
    self.final_norm = RMSNorm(config.embed, config)
    self.head = Linear((config.embed, config.vocab), ("embed", "vocab"), config, nnx.Rngs(keys[2]))
    self.config = config

  def __call__(self, tokens, positions=None, segment_ids=None, dropout_key=None):
    """Final hidden states [batch, seq, embed], normed, in the compute dtype.

    Args:
      tokens: [batch, seq] int. positions: [batch, seq] int, default 0 .. seq - 1.
      segment_ids: [batch, seq] int; attention stays within a segment. Default: one segment.
      dropout_key: randomness of dropout; None is none.
    """
    config, dtype = self.config, jnp.dtype(self.config.compute_dtype)
    positions = jnp.arange(tokens.shape[1])[None] if positions is None else positions
    attention = config.attention
    angles = rotation(positions, attention.head_dim, attention.rope_theta, at_least_float32(dtype))
    table = gathered(self.embed[...].astype(dtype), "vocab", "embed")
    with matmul_precision(config):
      x = table.at[tokens].get(out_sharding=spec("batch", "seq", None))  # [batch, seq, embed]

      def layer(x, scanned):
        block, key = scanned
        return block(x, angles, segment_ids, key), None

      keys = None if dropout_key is None else jax.random.split(dropout_key, config.layers)
      x, _ = jax.lax.scan(rematerialised(layer, config.remat), x, (self.dense_layers, keys))
      return self.final_norm(x)

  def unembedding(self):
    """The function from hidden states [batch, seq, embed] to scores [batch, seq, vocab] in at least float32.

    The head is gathered once, here, however often the function is called: the loss calls it chunk by chunk.
    """
    head = gathered_for_loop(self.head.kernel[...], *self.head.axes)

    def logits(hidden):
      with matmul_precision(self.config):
        return jnp.einsum(
          "bsd,dv->bsv", hidden, head.astype(hidden.dtype),
          preferred_element_type=at_least_float32(hidden.dtype),
          out_sharding=spec("batch", "seq", "vocab"),
        )  # fmt: skip

    return logits

  def logits(self, hidden):
    """Scores [batch, seq, vocab] of hidden states [batch, seq, embed], in at least float32."""
    return self.unembedding()(hidden)


def graphdef(config: ModelConfig):
  """The static half of the model, to merge with params and buffers. Allocates nothing; needs a mesh set."""
  return nnx.graphdef(jax.eval_shape(lambda key: Transformer(config, key), jax.random.key(0)))


def new_params(config: ModelConfig, key):
  """(params, buffers): plain nested dicts of a freshly initialised model."""
  _, params, buffers = nnx.split(Transformer(config, key), nnx.Param, ...)
  return nnx.to_pure_dict(params), nnx.to_pure_dict(buffers)
