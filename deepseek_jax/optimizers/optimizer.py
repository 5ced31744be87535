"""The optimizers as one table, and what is the same for all: clipping, weight decay, and the state's dtype and memory.

The learning rate is applied by the step, since its schedule lives on the host.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.config_sections import OptimizerConfig
from deepseek_jax.model.transformer import param_axes
from deepseek_jax.model_config import ModelConfig
from deepseek_jax.optimizers.muon import muon, update_bytes
from deepseek_jax.optimizers.trainable import check_trainable
from deepseek_jax.typing import Params, PyTree


def adamw(config: OptimizerConfig, model: ModelConfig) -> optax.GradientTransformation:
  """Adam (Kingma and Ba 2015) for every parameter. With decoupled weight decay it is AdamW (Loshchilov and Hutter 2019)."""
  return optax.scale_by_adam(config.beta1, config.beta2, config.eps)


# optimizer.kind -> what makes updates of clipped gradients. `make_optimizer` adds weight decay, and the state's dtype.
OPTIMIZERS: dict[str, Callable[[OptimizerConfig, ModelConfig], optax.GradientTransformation]] = {
  "adamw": adamw,
  "muon": muon,
}
# optimizer.kind -> bytes on a device of what its update makes, see `update_bytes` in muon.py. Others are elementwise: XLA
# fuses them, and they need none.
UPDATE_BYTES: dict[str, Callable[[ModelConfig, Params], int]] = {"muon": update_bytes}


def weight_decay_mask(params: Params) -> PyTree:
  """Tree of bools: True for matrices, False for norm scales (what DeepSeek excludes from decay is not published)."""
  return jax.tree.map_with_path(lambda path, _: path[-1].key != "scale", params)


def with_state_dtype(dtype: Any, transformation: optax.GradientTransformation) -> optax.GradientTransformation:
  """`transformation` whose floating-point state is stored in `dtype`, and computed in the dtype of the updates."""

  def cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)

  def init(params):
    return cast(transformation.init(params), dtype)

  def update(updates, state, params=None):
    compute_dtype = jax.tree.leaves(updates)[0].dtype
    updates, state = transformation.update(updates, cast(state, compute_dtype), params)
    return updates, cast(state, dtype)

  return optax.GradientTransformation(init, update)


def place_opt_state(space: Any, opt_state: optax.OptState) -> optax.OptState:
  """`opt_state` with its moments in the memory `space`, a jax.memory.Space: Host or Device. Arrays may be abstract."""

  def leaf(x):
    if not x.ndim:
      return x
    if isinstance(x, jax.ShapeDtypeStruct):
      kind = "pinned_host" if space == jax.memory.Space.Host else "device"
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding.with_memory_kind(kind))
    return jax.device_put(x, space)

  return jax.tree.map(leaf, opt_state)


def make_optimizer(config: OptimizerConfig, model: ModelConfig) -> optax.GradientTransformation:
  """Clipping by the global norm, then the optimizer `config.kind`, then decoupled weight decay.

  The caller multiplies updates by -learning_rate. `model`: whose parameters they are, for optimizers that treat some
  apart. Its trees hold those that are trained. A mesh has to be set where it is called.

  Raises ConfigError where `config.trainable` names no parameter.
  """
  if config.trainable:
    check_trainable(param_axes(model), config.trainable)
  return optax.chain(
    optax.clip_by_global_norm(config.clip),
    with_state_dtype(jnp.dtype(config.moments_dtype), OPTIMIZERS[config.kind](config, model)),
    optax.add_decayed_weights(config.weight_decay, mask=weight_decay_mask),
  )
