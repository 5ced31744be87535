"""Next-token cross entropy in chunks of the sequence: float32 logits of [batch, seq, vocab] never exist whole."""

import jax
import jax.numpy as jnp


def token_losses(logits, targets, label_smoothing, z_loss):
  """(nats, objective), each [batch, seq]: the cross entropy, and what is optimised.

  `logits` [batch, seq, vocab] may be sharded over vocab: the target is picked by comparison, not by a gather.
  objective = (1 - label_smoothing) * nats + label_smoothing * mean over vocab of -log p + z_loss * log(Z)^2.
  """
  log_z = jax.nn.logsumexp(logits, -1)
  vocab = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 2)
  nats = log_z - jnp.where(vocab == targets[..., None], logits, 0).sum(-1)
  objective = nats
  if label_smoothing:
    objective = (1 - label_smoothing) * nats + label_smoothing * (log_z - logits.mean(-1))
  if z_loss:
    objective = objective + z_loss * jnp.square(log_z)
  return nats, objective


def cross_entropy(logits_of, hidden, targets, chunk, label_smoothing=0.0, z_loss=0.0):
  """(nats, objective), each [batch], summed over the sequence.

  Args:
    logits_of: hidden [batch, positions, embed] -> logits [batch, positions, vocab].
    hidden: [batch, seq, embed]. targets: [batch, seq] int. chunk: positions whose logits exist at once.
  """

  def chunk_sums(hidden, targets):
    nats, objective = token_losses(logits_of(hidden), targets, label_smoothing, z_loss)
    return nats.sum(-1), objective.sum(-1)

  batch, seq, embed = hidden.shape
  if seq <= chunk:  # these logits may exist at once, so the backward pass need not make them again
    return chunk_sums(hidden, targets)
  chunk_sums = jax.checkpoint(chunk_sums)  # the backward pass makes a chunk's logits again instead of keeping all
  chunks = seq // chunk
  whole = chunks * chunk

  def body(sums, piece):
    return jax.tree.map(jnp.add, sums, chunk_sums(*piece)), None

  sums = jax.tree.map(jnp.zeros_like, jax.eval_shape(chunk_sums, hidden[:, :1], targets[:, :1]))
  pieces = (
    hidden[:, :whole].reshape(batch, chunks, chunk, embed).swapaxes(0, 1),  # [chunks, batch, chunk, embed]
    targets[:, :whole].reshape(batch, chunks, chunk).swapaxes(0, 1),
  )
  sums, _ = jax.lax.scan(body, sums, pieces)
  if whole < seq:
    sums, _ = body(sums, (hidden[:, whole:], targets[:, whole:]))
  return sums
