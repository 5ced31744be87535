"""Next-token cross entropy of hidden states, with its gradient, a chunk of the sequence at a time.

Logits [batch, seq, vocab] never exist: one pass computes a chunk's logits, its loss, and both gradients.
"""

import functools

import jax
import jax.numpy as jnp

from deepseek_jax.model.linear import at_least_float32
from deepseek_jax.sharding import all_gather_params, axis_index, axis_size, pmax, psum


def cross_entropy(
  head: jax.Array,
  hidden: jax.Array,
  targets: jax.Array,
  chunk_size: int,
  label_smoothing: float = 0.0,
  z_loss: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
  """(loss_sums [batch], objective []): the cross entropy in nats, summed over positions, and what is optimized.

  The objective is the sum over batch and positions of (1 - label_smoothing) * cross entropy
  + label_smoothing * mean over vocab of -log p + z_loss * log(Z)^2. Only the objective has a gradient. Both are of the
  sequences and positions that this device has, and the same on all devices that share `vocab`.

  Args:
    head: [embed, vocab], this device's shard of the parameter.
    hidden: [batch, seq, embed]; matmuls are in its dtype.
    targets: [batch, seq] int; negative targets do not count.
    chunk_size: positions whose logits exist at once.
  """
  kernel = all_gather_params(head.astype(hidden.dtype), "embed", "vocab")  # once, for all chunks
  return _cross_entropy(kernel, hidden, targets, chunk_size, label_smoothing, z_loss)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _cross_entropy(kernel, hidden, targets, chunk_size, label_smoothing, z_loss):
  return _chunked_cross_entropy(kernel, hidden, targets, chunk_size, label_smoothing, z_loss, differentiate=False)[0]


def _chunked_cross_entropy(kernel, hidden, targets, chunk_size, label_smoothing, z_loss, differentiate):
  """((loss_sums, objective), (gradient of objective by kernel, by hidden) or None)."""
  batch, seq, embed = hidden.shape
  accum_dtype, chunk_size = at_least_float32(hidden.dtype), min(chunk_size, seq)
  einsum = functools.partial(jnp.einsum, precision=None if hidden.dtype == jnp.bfloat16 else "highest")

  def body(dkernel, chunk):
    hidden, targets = chunk  # [batch, chunk_size, embed], [batch, chunk_size]
    logits = einsum("bsd,dv->bsv", hidden, kernel, preferred_element_type=accum_dtype)
    losses, objectives, dlogits = token_losses(logits, targets, label_smoothing, z_loss)
    sums = losses.sum(-1), objectives.sum(-1)  # [batch]
    if not differentiate:
      return None, (sums, None)
    dlogits = dlogits.astype(hidden.dtype)
    dkernel += einsum("bsd,bsv->dv", hidden, dlogits, preferred_element_type=accum_dtype)
    return dkernel, (sums, einsum("bsv,dv->bsd", dlogits, kernel))

  padding = -seq % chunk_size
  hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
  targets = jnp.pad(targets, ((0, 0), (0, padding)), constant_values=-1)
  chunks = (
    hidden.reshape(batch, -1, chunk_size, embed).swapaxes(0, 1),  # [chunks, batch, chunk_size, embed]
    targets.reshape(batch, -1, chunk_size).swapaxes(0, 1),  # [chunks, batch, chunk_size]
  )
  zero = None
  if differentiate:
    # 0 * hidden: typed as varying over the devices that `hidden` varies over, as the sum over sequences does.
    zero = jnp.zeros_like(kernel, accum_dtype) + 0 * hidden[0, 0, :, None].astype(accum_dtype)
  dkernel, ((losses, objectives), dhidden) = jax.lax.scan(body, zero, chunks)  # losses and objectives [chunks, batch]
  sums = losses.sum(0), objectives.sum()
  if dkernel is None:
    return sums, None
  return sums, (dkernel.astype(kernel.dtype), dhidden.swapaxes(0, 1).reshape(batch, -1, embed)[:, :seq])


def token_losses(
  logits: jax.Array, targets: jax.Array, label_smoothing: float, z_loss: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(cross entropy in nats, objective, gradient of the objective by logits): [batch, seq], [batch, seq], as `logits`.

  All are 0 for negative targets.

  Args:
    logits: [batch, seq, this device's shard of vocab].
    targets: [batch, seq] int, ids of the whole vocabulary. They are compared with the shard's ids, since a target may
      be in another device's shard.
  """
  valid, shard_size = targets >= 0, logits.shape[-1]
  vocab = shard_size * axis_size("vocab")
  max_logits = pmax(logits.max(-1), "vocab")
  log_z = max_logits + jnp.log(psum(jnp.exp(logits - max_logits[..., None]).sum(-1), "vocab"))
  shard_ids = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 2)
  is_target = shard_ids == (targets - axis_index("vocab") * shard_size)[..., None]
  losses = log_z - psum(jnp.where(is_target, logits, 0).sum(-1), "vocab")
  objective, dlog_z, target_probs = losses, 1.0, is_target.astype(logits.dtype)
  if label_smoothing:
    objective = (1 - label_smoothing) * losses + label_smoothing * (log_z - psum(logits.sum(-1), "vocab") / vocab)
    target_probs = (1 - label_smoothing) * target_probs + label_smoothing / vocab
  if z_loss:
    objective = objective + z_loss * jnp.square(log_z)
    dlog_z = (1 + 2 * z_loss * log_z)[..., None]
  dlogits = jnp.exp(logits - log_z[..., None]) * dlog_z - target_probs
  return jnp.where(valid, losses, 0), jnp.where(valid, objective, 0), jnp.where(valid[..., None], dlogits, 0)


def _cross_entropy_fwd(kernel, hidden, targets, chunk_size, label_smoothing, z_loss):
  return _chunked_cross_entropy(kernel, hidden, targets, chunk_size, label_smoothing, z_loss, differentiate=True)


def _cross_entropy_bwd(chunk_size, label_smoothing, z_loss, gradients, cotangents):
  dkernel, dhidden = gradients
  # Devices that share `vocab` have the same objective, so that a device's logits count in each of their objectives.
  scale = psum(cotangents[1], "vocab")
  return dkernel * scale.astype(dkernel.dtype), dhidden * scale.astype(dhidden.dtype), None


_cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)
