"""The chunked cross entropy and its own gradients, against the definition and its automatic derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config_sections import MeshConfig
from deepseek_jax.mesh import make_mesh
from deepseek_jax.sharding import axis_size, psum, psum_replicated, pvary, spec, spmd
from deepseek_jax.training.loss import cross_entropy

BATCH, SEQ, EMBED, VOCAB = 4, 10, 8, 24
DOES_NOT_COUNT = (2, 5)


@pytest.fixture
def one_device():
  with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
    yield


def inputs(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  head, hidden = rng.normal(size=(EMBED, VOCAB)), rng.normal(size=(BATCH, SEQ, EMBED))
  targets = rng.integers(0, VOCAB, (BATCH, SEQ))
  targets[DOES_NOT_COUNT] = -1
  return jnp.asarray(head, dtype), jnp.asarray(hidden, dtype), jnp.asarray(targets)


def reference(head, hidden, targets, smoothing=0.0, z_loss=0.0):
  """(loss_sums [batch], objective) by the definition, from whole logits in float64."""
  logits = hidden.astype(jnp.float64) @ head.astype(jnp.float64)
  log_z = jax.nn.logsumexp(logits, -1)
  log_p = logits - log_z[..., None]
  valid = targets >= 0
  losses = -jnp.take_along_axis(log_p, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
  objective = (1 - smoothing) * losses - smoothing * log_p.mean(-1) + z_loss * log_z**2
  return jnp.where(valid, losses, 0).sum(1), jnp.where(valid, objective, 0).sum()


def derivative(function, *arguments):
  """((loss_sums, objective), (gradient of 3 * objective by head, by hidden)); 3, so that a lost scale is seen."""

  def scaled(head, hidden):
    loss_sums, objective = function(head, hidden, *arguments)
    return 3 * objective, (loss_sums, objective)

  def of(head, hidden):
    (_, sums), gradients = jax.value_and_grad(scaled, (0, 1), has_aux=True)(head, hidden)
    return sums, gradients

  return of


@pytest.mark.parametrize("chunk", [1, 4, 10, 64])
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.01)])
def test_value_and_gradients_are_the_definition_s_for_any_chunk(one_device, chunk, smoothing, z_loss):
  with jax.enable_x64(True):
    head, hidden, targets = inputs(jnp.float64)
    whole = derivative(reference, targets, smoothing, z_loss)(head, hidden)
    ours = derivative(cross_entropy, targets, chunk, smoothing, z_loss)(head, hidden)
    undifferentiated = cross_entropy(head, hidden, targets, chunk, smoothing, z_loss)
    for a, b in zip(jax.tree.leaves((ours, undifferentiated)), jax.tree.leaves((whole, whole[0])), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)
    assert not ours[1][1][DOES_NOT_COUNT].any()


@pytest.mark.parametrize(
  "axes", [{"data": 4}, {"fsdp": 4}, {"tensor": 4}, {"fsdp": 2, "tensor": 2}, {"context": 2, "tensor": 2}], ids=str
)
def test_every_mesh_equals_one_device(axes):
  with jax.enable_x64(True):
    head, hidden, targets = inputs(jnp.float64)
    alone = derivative(reference, targets, 0.1, 0.01)(head, hidden)
    with jax.set_mesh(make_mesh(MeshConfig(**{"data": 1, **axes}))):
      layout = spec("embed", "vocab"), spec("batch", "seq", None), spec("batch", "seq")
      head, hidden, targets = jax.device_put((head, hidden, targets), layout)

      def local(head, hidden, targets):
        head, hidden, targets = pvary((head, hidden, targets))
        share = lambda *arrays: tuple(x / axis_size("vocab") for x in cross_entropy(*arrays, 4, 0.1, 0.01))
        (loss_sums, objective), (dhead, dhidden) = derivative(share, targets)(head, hidden)
        objective = psum(objective, "batch", "seq", "vocab")
        sums = psum(loss_sums, "seq", "vocab"), objective
        return sums, (psum_replicated(dhead, "embed", "vocab"), psum(dhidden, "vocab"))

      sums = spec("batch"), spec()
      sharded = jax.jit(spmd(local, layout, (sums, layout[:2])))(head, hidden, targets)
    assert sharded[1][0].sharding == head.sharding  # the gradient lies as its parameter does
    for a, b in zip(jax.tree.leaves(sharded), jax.tree.leaves(alone), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


def test_gradients_in_bfloat16_have_the_dtypes_of_what_they_are_of(one_device):
  """A float32 head with bfloat16 hidden states: products in bfloat16, sums over chunks in float32."""
  head, hidden, targets = inputs()
  hidden = hidden.astype(jnp.bfloat16)
  _, (dhead, dhidden) = derivative(cross_entropy, targets, 2, 0.1, 0.01)(head, hidden)
  assert (dhead.dtype, dhidden.dtype) == (jnp.float32, jnp.bfloat16)
  _, whole = derivative(cross_entropy, targets, 2, 0.1, 0.01)(head, hidden.astype(jnp.float32))
  for ours, exact in zip((dhead, dhidden), whole, strict=True):
    assert jnp.linalg.norm(ours.astype(jnp.float32) - exact) < 0.01 * jnp.linalg.norm(exact)


def test_whole_logits_never_exist(one_device):
  """No array of the compiled gradient has batch x seq x vocab elements."""
  head, hidden, targets = inputs()
  grad = jax.grad(lambda head, hidden: cross_entropy(head, hidden, targets, 2)[1], (0, 1))
  text = jax.jit(grad).lower(head, hidden).compile().as_text()
  assert f"f32[{BATCH},2,{VOCAB}]" in text.replace(" ", "") or f"f32[{BATCH * 2},{VOCAB}]" in text
  for shape in (f"[{BATCH},{SEQ},{VOCAB}]", f"[{BATCH * SEQ},{VOCAB}]", f"[{SEQ // 2},{BATCH},2,{VOCAB}]"):
    assert shape not in text
