"""One update: microbatches, gradients, optimizer. A pure function of state and batch."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from deepseek_jax.config import Config
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
  """`(params, buffers, tokens [batch, seq + 1], key) -> (nats, objective)`, each [batch], summed over the sequence."""

  def row_losses(params, buffers, tokens, key=None):
    model = nnx.merge(graphdef, params, buffers)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]  # [batch, seq]
    segment_ids, positions = document_positions(inputs, bos) if config.data.mask_documents else (None, None)
    hidden = model(inputs, positions, segment_ids, key)  # [batch, seq, embed]
    train = config.train
    return cross_entropy(model.unembedding(), hidden, targets, train.loss_chunk, train.label_smoothing, train.z_loss)

  return row_losses


def make_train_step(config: Config, graphdef, bos):
  """The update, to be jitted with `donate_argnames="state"`.

  Returns:
    `(state, batch, microbatches, learning_rate) -> (state, metrics)`. `batch` [microbatch, sequence, seq + 1] int32;
    its first `microbatches` are used (a batch ramp changes this number and no shape). `metrics` are scalars: loss (mean
    nats per token), total_loss (what is optimised), grad_norm, and the counts of skipped updates.
  """
  row_losses, tx = make_row_losses(config, graphdef, bos), make_optimizer(config.optimizer)
  has_dropout = config.model.dropout > 0 or config.model.attention.dropout > 0

  def gradients(state, batch, microbatches):
    tokens_in_batch = microbatches * batch.shape[1] * (batch.shape[2] - 1)

    def loss_fn(params, tokens, key):
      nats, objective = row_losses(params, state.buffers, tokens, key)
      # Divided by the whole batch, so that microbatches add up to the large batch's gradient.
      return objective.sum() / tokens_in_batch, nats.sum() / tokens_in_batch

    def accumulate(i, sums):
      tokens = jax.lax.dynamic_index_in_dim(batch, i, keepdims=False)  # [sequence, seq + 1]
      key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), state.step), i) if has_dropout else None
      (objective, loss), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, tokens, key)
      return jax.tree.map(jnp.add, sums, (grads, loss, objective))

    grads = jax.tree.map(jnp.zeros_like, state.params)
    zero = jnp.zeros((), jax.tree.leaves(grads)[0].dtype)
    return jax.lax.fori_loop(0, microbatches, accumulate, (grads, zero, zero))

  def train_step(state, batch, microbatches, learning_rate):
    grads, loss, total_loss = gradients(state, batch, microbatches)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(grad_norm)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = jax.tree.map(lambda p, u: p - learning_rate.astype(p.dtype) * u, state.params, updates)
    params, opt_state = jax.tree.map(
      lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
    )
    bad = 1 - finite.astype(jnp.int32)
    skipped = {"total": state.skipped["total"] + bad, "in_a_row": bad * (state.skipped["in_a_row"] + 1)}
    metrics = {"loss": loss, "total_loss": total_loss, "grad_norm": grad_norm, "skipped": skipped}
    return TrainState(state.step + 1, params, state.buffers, opt_state, skipped), metrics

  return train_step
