"""The chunked cross entropy against the whole one, and against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.training.loss import cross_entropy

BATCH, SEQ, EMBED, VOCAB = 3, 10, 6, 17


def inputs():
  rng = np.random.default_rng(0)
  hidden, head = rng.normal(size=(BATCH, SEQ, EMBED)), rng.normal(size=(EMBED, VOCAB))
  return (
    jnp.asarray(hidden, jnp.float32),
    jnp.asarray(head, jnp.float32),
    jnp.asarray(rng.integers(0, VOCAB, (BATCH, SEQ))),
  )


def reference(hidden, head, targets, smoothing=0.0, z_loss=0.0):
  logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
  log_z = np.log(np.exp(logits).sum(-1))
  log_p = logits - log_z[..., None]
  nats = -np.take_along_axis(log_p, np.asarray(targets)[..., None], -1)[..., 0]
  target = (1 - smoothing) * np.eye(VOCAB)[np.asarray(targets)] + smoothing / VOCAB
  return nats.sum(1), (-(target * log_p).sum(-1) + z_loss * log_z**2).sum(1)


@pytest.mark.parametrize("chunk", [1, 3, 5, 10, 64])
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.01)])
def test_equal_to_the_definition_for_any_chunk(chunk, smoothing, z_loss):
  hidden, head, targets = inputs()
  ours = cross_entropy(lambda h: h @ head, hidden, targets, chunk, smoothing, z_loss)
  for a, b in zip(ours, reference(hidden, head, targets, smoothing, z_loss), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5)


def test_gradient_does_not_depend_on_the_chunk():
  hidden, head, targets = inputs()

  def gradient(chunk):
    def loss(hidden, head):
      return cross_entropy(lambda h: h @ head, hidden, targets, chunk, 0.1, 0.01)[1].sum()

    return jax.grad(loss, (0, 1))(hidden, head)

  for a, b in zip(gradient(SEQ), gradient(4), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_whole_logits_never_exist():
  """No array of the compiled step has batch x seq x vocab elements, forward or backward."""
  hidden, head, targets = inputs()
  grad = jax.grad(lambda h, w: cross_entropy(lambda x: x @ w, h, targets, 2)[1].sum(), (0, 1))
  text = jax.jit(grad).lower(hidden, head).compile().as_text()
  assert f"f32[{BATCH},2,{VOCAB}]" in text.replace(" ", "") or f"f32[{BATCH * 2},{VOCAB}]" in text
  for shape in (f"[{BATCH},{SEQ},{VOCAB}]", f"[{BATCH * SEQ},{VOCAB}]", f"[{SEQ // 2},{BATCH},2,{VOCAB}]"):
    assert shape not in text
