"""Sliding-window attention: values, gradients and programs of both kinds against a mask by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model.attention import attention_with_dropout
from deepseek_jax.plan.flops import training_flops
from tests import configs

BATCH, SEQ, HEADS, KV_HEADS, WIDTH = 2, 24, 4, 2, 6
VALUE_WIDTHS = {"gqa": WIDTH, "mla": 5}  # those of keys and values differ in MLA: another path of XLA's implementation


def reference(q, k, v, segments, window):
  """[batch, seq, heads, value width]; each head and each mask entry by itself."""
  k, v = (jnp.repeat(x, HEADS // KV_HEADS, 2) for x in (k, v))
  i, j = np.indices((SEQ, SEQ))
  mask = (j <= i) & (j > i - window)
  mask = mask[None] & (segments[:, :, None] == segments[:, None]) if segments is not None else mask[None]
  logits = 0.5 * jnp.einsum("bqhk,bshk->bhqs", q, k)
  weights = jnp.where(mask[:, None], jnp.exp(logits - logits.max(-1, keepdims=True)), 0)
  return jnp.einsum("bhqs,bshv->bqhv", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 2e-5)])
@pytest.mark.parametrize(
  ("kind", "window", "packed"), [("gqa", 5, True), ("gqa", 2, False), ("mla", 5, False), ("mla", 30, True)]
)
def test_a_window_is_a_mask(kind, window, packed, dtype, tolerance):
  rng = np.random.default_rng(0)
  widths = (HEADS, WIDTH), (KV_HEADS, WIDTH), (KV_HEADS, VALUE_WIDTHS[kind]), (HEADS, VALUE_WIDTHS[kind])
  with jax.enable_x64(dtype == np.float64):
    q, k, v, dy = (rng.normal(size=(BATCH, SEQ, *shape)).astype(dtype) for shape in widths)
    segments = np.sort(rng.integers(0, 3, (BATCH, SEQ)), 1) if packed else None

    def results(attend):
      y, pull = jax.vjp(attend, q, k, v)
      return y, *pull(dy)

    ours = results(functools.partial(attention_with_dropout, scale=0.5, segment_ids=segments, window=window))
    expected = results(functools.partial(reference, segments=segments, window=window))
  for a, b in zip(ours, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("attention", [configs.GQA, configs.MLA], ids=["gqa", "mla"])
def test_a_plan_counts_the_pairs_of_the_window(attention):
  def flops(window):
    model = dataclasses.replace(configs.DENSE, attention=dataclasses.replace(attention, window=window))
    return training_flops(model, 24)

  everything, windowed = flops(0), flops(5)
  assert flops(24) == flops(99) == everything
  pairs = sum(min(i + 1, 5) for i in range(24))
  assert windowed.attention_causal == pytest.approx(everything.attention_causal * pairs / (24 * 25 / 2), rel=1e-12)
  assert (windowed.matmul, windowed.attention_full) == (everything.matmul, everything.attention_full)
