"""One update: microbatches, gradients, optimizer. A pure function of state and batch."""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from deepseek_jax.config import Config
from deepseek_jax.model.transformer import param_axes
from deepseek_jax.sharding import (
  LATENTS, WHOLE_WEIGHTS, agreed, gathered, in_shards, on_every_device, reduced, rules, spec, summed, varying,
)  # fmt: skip
from deepseek_jax.training.balance import moved_biases
from deepseek_jax.training.objective import Objective
from deepseek_jax.training.optimizer import make_optimizer
from deepseek_jax.training.state import TrainState


def layouts(tree):
  """PartitionSpecs of the arrays in `tree`."""
  return jax.tree.map(lambda array: jax.typeof(array).sharding.spec, tree)


def make_row_nats(config: Config, graphdef, bos):
  """`(params, buffers, tokens [batch, seq + 1]) -> nats [batch]`, the cross entropy summed over each sequence."""
  objective = Objective(config, bos)

  def local(params, buffers, tokens):
    return objective(nnx.merge(graphdef, params, buffers), tokens)[0]

  def row_nats(params, buffers, tokens):
    with rules(LATENTS[config.parallel.latent]):
      layout = layouts(params), layouts(buffers), spec("batch", None)
      return on_every_device(local, layout, spec("batch"), differentiable=False)(params, buffers, tokens)

  return row_nats


def in_use(params, axes, dtype):
  """`params` made whole, and in the model's compute `dtype`, but for the router's, which it uses as they are."""

  def leaf(path, param, names):
    in_router = any(part.key == "router" for part in path)
    return gathered(param if in_router else param.astype(dtype), *names) if any(names) else param

  return jax.tree.map_with_path(leaf, params, axes)


def make_gradients(config: Config, graphdef, bos):
  """`(state, batch, microbatches, mtp_weight) -> (gradients laid out as state.params, what the step reports)`."""
  objective, zero = Objective(config, bos), config.parallel.zero
  axes, dtype = param_axes(config.model), config.model.compute_dtype
  model = config.model
  random = model.dropout > 0 or model.attention.dropout > 0 or model.moe.dispatch == "capacity"

  def local(microbatches, params, buffers, batch, mtp_weight, step):
    """As one device sees it: `batch` [microbatch, its sequences, seq + 1]."""
    params, buffers = varying((params, buffers))
    weights = params if zero == 3 else in_use(params, axes, dtype)

    def share(weights, tokens, key):
      with rules({} if zero == 3 else WHOLE_WEIGHTS):
        nats, share, observed = objective(nnx.merge(graphdef, weights, buffers), tokens, key, mtp_weight)
      return share, {"loss": nats.sum(), **observed}

    def one(i):
      tokens = jax.lax.dynamic_index_in_dim(batch, i, keepdims=False)  # [sequences, seq + 1]
      key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), step), i) if random else None
      (total, observed), grads = jax.value_and_grad(share, has_aux=True)(weights, varying(tokens), key)
      grads = jax.tree.map(lambda g, names: in_shards(g, *names), grads, axes) if zero == 2 else grads
      return varying((grads, {"total_loss": total, **observed}))

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, 0))
    # Summed in the dtype of the parameters, whatever that of the weights in use.
    sums = jax.tree.map(lambda z, p: z.astype(p.dtype), zeros[0], params), zeros[1]
    grads, reported = jax.lax.fori_loop(
      0, microbatches, lambda i, sums: jax.tree.map(jnp.add, sums, one(i)), varying(sums)
    )
    grads = jax.tree.map(lambda g, names: reduced(g, *names, shards=zero == 1), grads, axes)
    total = summed(reported.pop("total_loss"), "batch", "stream", "stages")
    overflow = {name: summed(reported.pop(name), "seq") for name in ("overflow",) if name in reported}
    return grads, agreed({"total_loss": total} | summed(reported | overflow, "batch"))

  def gradients(state, batch, microbatches, mtp_weight):
    tokens_in_batch = microbatches * batch.shape[1] * (batch.shape[2] - 1)
    with rules(LATENTS[config.parallel.latent]):
      layout = layouts(state.params), layouts(state.buffers), spec(None, "batch", None), spec(), spec()
      arguments = state.params, state.buffers, batch, mtp_weight, state.step
      if isinstance(microbatches, int):  # a constant of the program: XLA makes one microbatch no loop
        found = on_every_device(functools.partial(local, microbatches), layout, (layouts(state.params), spec()))
        grads, reported = found(*arguments)
      else:
        found = on_every_device(local, (spec(), *layout), (layouts(state.params), spec()))
        grads, reported = found(microbatches, *arguments)
    # Divided by the whole batch, so that microbatches add up to the large batch's gradient.
    return jax.tree.map(
      lambda x: x if jnp.issubdtype(x.dtype, jnp.integer) else x / tokens_in_batch, (grads, reported)
    )

  return gradients


def make_train_step(config: Config, graphdef, bos):
  """The update, to be jitted with `donate_argnames="state"`.

  Returns:
    `(state, batch, microbatches, rates) -> (state, metrics)`. `batch` [microbatch, sequence, seq + 1] int32; its first
    `microbatches` are used (a batch ramp changes this number and no shape). `rates` are those of `schedule.rates`.
    `metrics`: loss (mean nats per token), total_loss (what is optimised), grad_norm, balance_loss, mtp_loss [depth],
    load {stack: [layers, experts]}, overflow (choices that found no room), and the counts of skipped updates.
  """
  gradients, tx = make_gradients(config, graphdef, bos), make_optimizer(config.optimizer)

  def train_step(state, batch, microbatches, rates):
    grads, metrics = gradients(state, batch, microbatches, rates["mtp_weight"])
    grad_norm = optax.tree.norm(grads)
    good = jnp.isfinite(grad_norm) & (metrics.get("overflow", 0) == 0)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    rate = rates["learning_rate"]
    params = jax.tree.map(lambda p, u: p - rate.astype(p.dtype) * u, state.params, updates)
    buffers = moved_biases(state.buffers, metrics["load"], rates["bias_speed"])
    new, old = (params, buffers, opt_state), (state.params, state.buffers, state.opt_state)
    params, buffers, opt_state = jax.tree.map(lambda new, old: jnp.where(good, new, old), new, old)
    bad = 1 - good.astype(jnp.int32)
    skipped = {"total": state.skipped["total"] + bad, "in_a_row": bad * (state.skipped["in_a_row"] + 1)}
    metrics |= {"grad_norm": grad_norm, "skipped": skipped}
    return TrainState(state.step + 1, params, buffers, opt_state, skipped), metrics

  return train_step
