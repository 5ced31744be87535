"""Next-token cross entropy of hidden states, with its gradient, a chunk of the sequence at a time.

[batch, seq, vocab] never exists: the pass that makes a chunk's logits uses them for the loss and both gradients at once.
"""

import functools

import jax
import jax.numpy as jnp

from deepseek_jax.model.linear import at_least_float32
from deepseek_jax.sharding import all_gather_params, axis_index, axis_size, pmax, psum


def cross_entropy(head, hidden, targets, chunk, label_smoothing=0.0, z_loss=0.0):
  """(nats [batch], objective []): the cross entropy summed over the sequence; and what is optimised, summed over all.

  objective = (1 - label_smoothing) * nats + label_smoothing * mean over vocab of -log p + z_loss * log(Z)^2. It alone
  has a gradient. Both are of the sequences and positions that this device has, and the same on all that share `vocab`.

  Args:
    head: [embed, vocab] as parameters are kept. hidden: [batch, seq, embed], whose dtype the products are in.
    targets: [batch, seq] int; a negative one does not count.
    chunk: positions whose logits exist at once.
  """
  kernel = all_gather_params(head.astype(hidden.dtype), "embed", "vocab")  # once, for all chunks
  return _cross_entropy(kernel, hidden, targets, chunk, label_smoothing, z_loss)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _cross_entropy(kernel, hidden, targets, chunk, label_smoothing, z_loss):
  return _in_chunks(kernel, hidden, targets, chunk, label_smoothing, z_loss, differentiate=False)[0]


def _in_chunks(kernel, hidden, targets, chunk, label_smoothing, z_loss, differentiate):
  """((nats, objective), (gradient of objective by kernel, by hidden) or None)."""
  batch, seq, embed = hidden.shape
  wide, chunk = at_least_float32(hidden.dtype), min(chunk, seq)
  product = functools.partial(jnp.einsum, precision=None if hidden.dtype == jnp.bfloat16 else "highest")

  def body(dkernel, piece):
    hidden, targets = piece  # [batch, chunk, embed], [batch, chunk]
    logits = product("bsd,dv->bsv", hidden, kernel, preferred_element_type=wide)
    nats, objective, dlogits = token_losses(logits, targets, label_smoothing, z_loss)
    sums = nats.sum(-1), objective.sum(-1)  # [batch]
    if not differentiate:
      return None, (sums, None)
    dlogits = dlogits.astype(hidden.dtype)
    dkernel += product("bsd,bsv->dv", hidden, dlogits, preferred_element_type=wide)
    return dkernel, (sums, product("bsv,dv->bsd", dlogits, kernel))

  short = -seq % chunk
  hidden = jnp.pad(hidden, ((0, 0), (0, short), (0, 0)))
  targets = jnp.pad(targets, ((0, 0), (0, short)), constant_values=-1)
  pieces = (
    hidden.reshape(batch, -1, chunk, embed).swapaxes(0, 1),  # [chunks, batch, chunk, embed]
    targets.reshape(batch, -1, chunk).swapaxes(0, 1),
  )
  # The sum over sequences varies over the devices as hidden does.
  zero = jnp.zeros_like(kernel, wide) + 0 * hidden[0, 0, :, None].astype(wide) if differentiate else None
  dkernel, ((nats, objective), dhidden) = jax.lax.scan(body, zero, pieces)
  sums = nats.sum(0), objective.sum()
  if not differentiate:
    return sums, None
  return sums, (dkernel.astype(kernel.dtype), dhidden.swapaxes(0, 1).reshape(batch, -1, embed)[:, :seq])


def token_losses(logits, targets, label_smoothing, z_loss):
  """(nats, objective, gradient of objective by logits) of `logits` [batch, positions, vocab], of which devices may share vocab.

  The target is picked by comparison: it may be another device's.
  """
  counts, here = targets >= 0, logits.shape[-1]
  vocab = here * axis_size("vocab")
  top = pmax(logits.max(-1), "vocab")
  log_z = top + jnp.log(psum(jnp.exp(logits - top[..., None]).sum(-1), "vocab"))
  hit = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 2) == (targets - axis_index("vocab") * here)[..., None]
  nats = log_z - psum(jnp.where(hit, logits, 0).sum(-1), "vocab")
  objective, dlog_z, wanted = nats, 1.0, hit.astype(logits.dtype)
  if label_smoothing:
    objective = (1 - label_smoothing) * nats + label_smoothing * (log_z - psum(logits.sum(-1), "vocab") / vocab)
    wanted = (1 - label_smoothing) * wanted + label_smoothing / vocab
  if z_loss:
    objective = objective + z_loss * jnp.square(log_z)
    dlog_z = (1 + 2 * z_loss * log_z)[..., None]
  dlogits = jnp.exp(logits - log_z[..., None]) * dlog_z - wanted
  return jnp.where(counts, nats, 0), jnp.where(counts, objective, 0), jnp.where(counts[..., None], dlogits, 0)


def _forward(kernel, hidden, targets, chunk, label_smoothing, z_loss):
  return _in_chunks(kernel, hidden, targets, chunk, label_smoothing, z_loss, differentiate=True)


def _backward(chunk, label_smoothing, z_loss, gradients, cotangents):
  dkernel, dhidden = gradients
  # Each device that shares `vocab` has the same objective, and its logits count in all of them.
  scale = psum(cotangents[1], "vocab")
  return dkernel * scale.astype(dkernel.dtype), dhidden * scale.astype(dhidden.dtype), None


_cross_entropy.defvjp(_forward, _backward)
