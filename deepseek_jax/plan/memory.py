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

  Parameters and moments are exact. Gradients are counted twice: the newest, and the sum over microbatches. Activations count what the forward pass keeps for the backward pass
  under the remat policy plus one block's working set, in the compute dtype, with gathered weights of one block; XLA's
  own temporaries come on top.
  """
  m, mesh = config.model, config.mesh
  per_device = sum(size_per_device(leaf) for leaf in jax.tree.leaves(abstract_params(m, mesh)))
  width, wide = jnp.dtype(m.compute_dtype).itemsize, max(4, jnp.dtype(m.compute_dtype).itemsize)
  rows = -(-(config.train.microbatch or config.train.global_batch) // batch_parts(abstract_mesh(mesh)))
  tokens, tensor = rows * config.data.seq, mesh.tensor

  stream = tokens * m.embed * width  # one residual stream
  a = m.attention
  products = (
    tokens * (2 * m.embed + (2 * a.heads + 2 * a.kv_heads) * a.head_dim // tensor + 2 * m.mlp // tensor) * width
  )
  scores = rows * a.heads // tensor * config.data.seq**2 * (width + wide)
  block = stream * 6 + products + scores + tokens * m.mlp // tensor * 2 * width
  kept = {"full": stream, "dots": stream + products, "none": block}[m.remat] * m.layers
  weights = (2 * m.embed * (a.heads + a.kv_heads) * a.head_dim + 3 * m.embed * m.mlp) // tensor * width
  chunk = min(config.train.loss_chunk, config.data.seq)
  return Memory(
    params=per_device * jnp.dtype(m.param_dtype).itemsize,
    gradients=2 * per_device * jnp.dtype(m.param_dtype).itemsize,
    moments=2 * per_device * jnp.dtype(config.optimizer.moments_dtype).itemsize,
    activations=kept + block + weights,
    logits=2 * rows * chunk * m.vocab // tensor * wide,
  )
