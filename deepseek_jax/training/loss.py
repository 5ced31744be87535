"""Next-token cross entropy of hidden states, with its gradient, a chunk of the sequence at a time.

[batch, seq, vocab] never exists: the pass that makes a chunk's logits uses them for the loss and both gradients at once.
"""

import functools

import jax
import jax.numpy as jnp

from deepseek_jax.model.linear import at_least_float32
from deepseek_jax.sharding import gathered, partial_sums, spec


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def cross_entropy(head, hidden, targets, chunk, label_smoothing=0.0, z_loss=0.0):
  """(nats [batch], objective []): the cross entropy summed over the sequence; and what is optimised, summed over all.

  objective = (1 - label_smoothing) * nats + label_smoothing * mean over vocab of -log p + z_loss * log(Z)^2. It alone
  has a gradient.

  Args:
    head: [embed, vocab] in its parameter's layout. hidden: [batch, seq, embed], whose dtype the products are in.
    targets: [batch, seq] int; a negative one does not count.
    chunk: positions whose logits exist at once.
  """
  return _in_chunks(head, hidden, targets, chunk, label_smoothing, z_loss, differentiate=False)[0]


def _in_chunks(head, hidden, targets, chunk, label_smoothing, z_loss, differentiate):
  """((nats, objective), (gradient of objective by head, by hidden) or None)."""
  batch, seq, embed = hidden.shape
  wide, chunk = at_least_float32(hidden.dtype), min(chunk, seq)
  product = functools.partial(jnp.einsum, precision=None if hidden.dtype == jnp.bfloat16 else "highest")
  kernel = gathered(head.astype(hidden.dtype), "embed", "vocab")  # once, for all chunks
  parts = partial_sums("embed", "vocab")

  def body(dhead, piece):
    hidden, targets = piece  # [batch, chunk, embed], [batch, chunk]
    logits = product(
      "bsd,dv->bsv", hidden, kernel, preferred_element_type=wide, out_sharding=spec("batch", "seq", "vocab")
    )
    nats, objective, dlogits = token_losses(logits, targets, label_smoothing, z_loss)
    sums = nats.sum(-1), objective.sum(-1)  # [batch]
    if not differentiate:
      return None, (sums, None)
    dlogits = dlogits.astype(hidden.dtype)
    dhead += product("bsd,bsv->dv", hidden, dlogits, preferred_element_type=wide, out_sharding=parts)
    return dhead, (sums, product("bsv,dv->bsd", dlogits, kernel, out_sharding=spec("batch", "seq", None)))

  short = -seq % chunk
  hidden = jnp.pad(hidden, ((0, 0), (0, short), (0, 0)))
  targets = jnp.pad(targets, ((0, 0), (0, short)), constant_values=-1)
  pieces = (
    hidden.reshape(batch, -1, chunk, embed).swapaxes(0, 1),  # [chunks, batch, chunk, embed]
    targets.reshape(batch, -1, chunk).swapaxes(0, 1),
  )
  zero = jnp.zeros(head.shape, wide, out_sharding=parts) if differentiate else None
  dhead, ((nats, objective), dhidden) = jax.lax.scan(body, zero, pieces)
  sums = nats.sum(0), objective.sum()
  if not differentiate:
    return sums, None
  dhead = jax.reshard(dhead, jax.typeof(head).sharding.spec).astype(head.dtype)
  return sums, (dhead, dhidden.swapaxes(0, 1).reshape(batch, -1, embed)[:, :seq])


def token_losses(logits, targets, label_smoothing, z_loss):
  """(nats, objective, gradient of objective by logits) of `logits` [batch, positions, vocab], which may be sharded over vocab.

  The target is picked by comparison: a gather from a sharded dimension would have to collect it.
  """
  counts = targets >= 0
  log_z = jax.nn.logsumexp(logits, -1)
  hit = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 2) == targets[..., None]
  nats = log_z - jnp.where(hit, logits, 0).sum(-1)
  objective, dlog_z, wanted = nats, 1.0, hit.astype(logits.dtype)
  if label_smoothing:
    objective = (1 - label_smoothing) * nats + label_smoothing * (log_z - logits.mean(-1))
    wanted = (1 - label_smoothing) * wanted + label_smoothing / logits.shape[-1]
  if z_loss:
    objective = objective + z_loss * jnp.square(log_z)
    dlog_z = (1 + 2 * z_loss * log_z)[..., None]
  dlogits = jnp.exp(logits - log_z[..., None]) * dlog_z - wanted
  return jnp.where(counts, nats, 0), jnp.where(counts, objective, 0), jnp.where(counts[..., None], dlogits, 0)


def _forward(head, hidden, targets, chunk, label_smoothing, z_loss):
  return _in_chunks(head, hidden, targets, chunk, label_smoothing, z_loss, differentiate=True)


def _backward(chunk, label_smoothing, z_loss, gradients, cotangents):
  dhead, dhidden = gradients
  scale = cotangents[1]
  return dhead * scale.astype(dhead.dtype), dhidden * scale.astype(dhidden.dtype), None


cross_entropy.defvjp(_forward, _backward)
