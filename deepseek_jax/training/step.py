"""One update: microbatches, gradients, optimizer. A pure function of state and batch."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from deepseek_jax.config import Config
from deepseek_jax.training.balance import moved_biases, observer
from deepseek_jax.training.loss import cross_entropy
from deepseek_jax.training.optimizer import make_optimizer
from deepseek_jax.training.state import TrainState


def document_positions(tokens, bos):
  """(segment_ids, positions), each [batch, seq], of `tokens` [batch, seq] in which `bos` starts each document."""
  starts = tokens == bos
  index = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, 1)
  # Batched associative scans: a row's own running count and running start.
  segment_ids = jnp.cumsum(starts, 1, dtype=jnp.int32)
  return segment_ids, index - jax.lax.cummax(jnp.where(starts, index, 0), 1)


def make_row_losses(config: Config, graphdef, bos):
  """`(params, buffers, tokens [batch, seq + 1], key, mtp_weight) -> (nats, objective, observed)`.

  nats [batch] is the cross entropy summed over the sequence; objective [], what is optimised, summed over the batch too,
  and so is observed, what the step reports: `mtp_loss` [depth], `balance_loss`, `load` {stack: [layers, experts] int32}.
  """
  train, moe = config.train, config.model.moe
  observe = observer(moe, config.balance)

  def row_losses(params, buffers, tokens, key=None, mtp_weight=0.0):
    model = nnx.merge(graphdef, params, buffers)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]  # [batch, seq]
    seq = inputs.shape[1]
    segment_ids, positions = document_positions(inputs, bos) if config.data.mask_documents else (None, None)
    head = model.unembedding()

    def losses(hidden, targets):
      return cross_entropy(head, hidden, targets, train.loss_chunk, train.label_smoothing, train.z_loss)

    hidden, stacks = model(inputs, positions, segment_ids, key, observe)  # [batch, seq, embed]
    nats, objective = losses(hidden, targets)
    depths = model.mtp(hidden, inputs, positions, segment_ids, key, observe)
    mtp_nats = []
    for depth, (hidden, _) in enumerate(depths, 1):
      nats_ahead, objective_ahead = losses(hidden, targets[:, depth:])
      # A mean over the seq - depth targets that there are (V3 eq. 24 divides by seq), and over depths (eq. 25).
      share = seq / (seq - depth)
      objective += mtp_weight / len(depths) * share * objective_ahead
      mtp_nats.append(share * nats_ahead.sum())
    layers = {name: seen for name, seen in stacks.items() if seen is not None}
    if depths and depths[0][1] is not None:
      layers["mtp_layers"] = jax.tree.map(lambda *depth: jnp.stack(depth), *(seen for _, seen in depths))
    observed = {"load": {name: seen["load"] for name, seen in layers.items()}}
    if layers:
      observed["balance_loss"] = seq * sum(seen["loss"].sum() for seen in layers.values())  # of [layers, batch]
      objective += observed["balance_loss"]
    if mtp_nats:
      observed["mtp_loss"] = jnp.stack(mtp_nats)
    return nats, objective, observed

  return row_losses


def make_train_step(config: Config, graphdef, bos):
  """The update, to be jitted with `donate_argnames="state"`.

  Returns:
    `(state, batch, microbatches, rates) -> (state, metrics)`. `batch` [microbatch, sequence, seq + 1] int32; its first
    `microbatches` are used (a batch ramp changes this number and no shape). `rates` are those of `schedule.rates`.
    `metrics`: loss (mean nats per token), total_loss (what is optimised), grad_norm, balance_loss, mtp_loss [depth],
    load {stack: [layers, experts]}, and the counts of skipped updates.
  """
  row_losses, tx = make_row_losses(config, graphdef, bos), make_optimizer(config.optimizer)
  model = config.model
  random = model.dropout > 0 or model.attention.dropout > 0 or model.moe.dispatch == "capacity"

  def gradients(state, batch, microbatches, mtp_weight):
    tokens_in_batch = microbatches * batch.shape[1] * (batch.shape[2] - 1)

    def loss_fn(params, tokens, key):
      nats, objective, observed = row_losses(params, state.buffers, tokens, key, mtp_weight)
      # Divided by the whole batch, so that microbatches add up to the large batch's gradient.
      share = jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.integer) else x / tokens_in_batch, observed)
      return objective / tokens_in_batch, (nats.sum() / tokens_in_batch, share)

    def one(i):
      tokens = jax.lax.dynamic_index_in_dim(batch, i, keepdims=False)  # [sequence, seq + 1]
      key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), state.step), i) if random else None
      (objective, (loss, observed)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, tokens, key)
      return grads, {"loss": loss, "total_loss": objective, **observed}

    reported = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, 0)[1])
    sums = jax.tree.map(jnp.zeros_like, state.params), reported
    return jax.lax.fori_loop(0, microbatches, lambda i, sums: jax.tree.map(jnp.add, sums, one(i)), sums)

  def train_step(state, batch, microbatches, rates):
    grads, metrics = gradients(state, batch, microbatches, rates["mtp_weight"])
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(grad_norm)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    rate = rates["learning_rate"]
    params = jax.tree.map(lambda p, u: p - rate.astype(p.dtype) * u, state.params, updates)
    buffers = moved_biases(state.buffers, metrics["load"], rates["bias_speed"])
    new, old = (params, buffers, opt_state), (state.params, state.buffers, state.opt_state)
    params, buffers, opt_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)
    bad = 1 - finite.astype(jnp.int32)
    skipped = {"total": state.skipped["total"] + bad, "in_a_row": bad * (state.skipped["in_a_row"] + 1)}
    metrics |= {"grad_norm": grad_norm, "skipped": skipped}
    return TrainState(state.step + 1, params, buffers, opt_state, skipped), metrics

  return train_step
