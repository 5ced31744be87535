"""AdamW as an Optax chain without its learning rate, which the step applies: the schedule lives on the host."""

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.config import OptimizerConfig


def weight_decay_mask(params):
  """Tree of bools: True for matrices, False for norm scales (what DeepSeek excludes from decay is not published)."""
  return jax.tree.map_with_path(lambda path, _: path[-1].key != "scale", params)


def with_state_dtype(dtype, transformation):
  """`transformation` with the floating arrays of its state kept in `dtype` between updates, used in the params' dtype."""

  def cast(tree, to):
    return jax.tree.map(lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)

  def init(params):
    return cast(transformation.init(params), dtype)

  def update(updates, state, params=None):
    updates, state = transformation.update(updates, cast(state, jax.tree.leaves(updates)[0].dtype), params)
    return updates, cast(state, dtype)

  return optax.GradientTransformation(init, update)


def place_opt_state(space: jax.memory.Space, opt_state):
  """`opt_state` with its moments, whole or abstract, in the host's or in the devices' memory."""

  def leaf(x):
    if not x.ndim:
      return x
    if isinstance(x, jax.ShapeDtypeStruct):
      kind = "pinned_host" if space == jax.memory.Space.Host else "device"
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding.with_memory_kind(kind))
    return jax.device_put(x, space)

  return jax.tree.map(leaf, opt_state)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
  """Clip by global norm, Adam, decoupled weight decay. Its updates are to be multiplied by minus the learning rate."""
  return optax.chain(
    optax.clip_by_global_norm(config.clip),
    with_state_dtype(jnp.dtype(config.moments_dtype), optax.scale_by_adam(config.beta1, config.beta2, config.eps)),
    optax.add_decayed_weights(config.weight_decay, mask=weight_decay_mask),
  )
