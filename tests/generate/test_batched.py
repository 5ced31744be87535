"""Prompts of several lengths in one batch against each prompt alone."""

import jax
import numpy as np
import pytest

from deepseek_jax.config_sections import MeshConfig, SampleConfig
from deepseek_jax.generate import batched
from deepseek_jax.generate.batched import continue_batch
from deepseek_jax.mesh import make_mesh
from deepseek_jax.model.transformer import graphdef, init_params
from tests.generate.test_decoding import BYTES, MODEL

pytestmark = pytest.mark.jax_version

PROMPTS = [[BYTES.bos, *text] for text in (b"ab", b"a", b"the words", b"x y")]


@pytest.fixture(scope="module")
def weights():
  """(mesh, params, buffers) on two devices, which share a batch."""
  mesh = make_mesh(MeshConfig(data=1, fsdp=2), jax.devices()[:2])
  with jax.set_mesh(mesh):
    yield mesh, *jax.block_until_ready(jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(3)))


def generate(weights, prompts, seeds, temperature=0.0, max_tokens=40, **arguments):
  mesh, params, buffers = weights
  sample = SampleConfig(max_tokens=max_tokens, temperature=temperature, top_p=1.0)
  return continue_batch(
    graphdef(MODEL), params, buffers, prompts, seeds, batch=4, window=64, tokenizer=BYTES, config=sample, mesh=mesh, **arguments
  )  # fmt: skip


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_a_prompt_in_a_batch_is_continued_as_alone(weights, temperature):
  together = generate(weights, PROMPTS, [3, 4, 5, 6], temperature)
  assert len({tuple(ids) for ids in together}) == 4
  for i, ids in enumerate(together):
    assert generate(weights, [PROMPTS[i]], [3 + i], temperature) == [ids]
    assert len(ids) == 40 or len(ids) < 40 and BYTES.eos not in ids


def test_the_seed_of_a_prompt_decides(weights):
  first, second = generate(weights, [PROMPTS[0]] * 2, [1, 2], temperature=2.0)
  assert first != second


def test_eos_ends_a_text_and_the_others_go_on(weights, monkeypatch):
  full = generate(weights, PROMPTS, [0] * 4)
  at = next(i for i, token in enumerate(full[0]) if i >= 3 and token not in full[0][:i])
  monkeypatch.setattr(BYTES, "eos", full[0][at])
  ended = generate(weights, PROMPTS, [0] * 4)
  assert ended == [batched.until_eos(ids, full[0][at]) for ids in full] and len(ended[0]) == at


def test_what_needs_no_more_stops_early(weights, monkeypatch):
  calls, original = [], batched.generate_tokens
  monkeypatch.setattr(batched, "generate_tokens", lambda *a, **k: calls.append(a) or original(*a, **k))
  full = generate(weights, PROMPTS, [0] * 4)
  passes = len(calls)
  assert passes == 2  # 16 tokens, then the rest
  ids = generate(weights, PROMPTS, [0] * 4, has_ended=lambda ids: len(ids) >= 3)
  assert len(calls) == passes + 1
  assert all(of_prompt == whole[: len(of_prompt)] for of_prompt, whole in zip(ids, full, strict=True))
  assert all(len(of_prompt) >= 3 for of_prompt in ids)
  np.testing.assert_array_equal(generate(weights, PROMPTS[:1], [0], max_tokens=1), [full[0][:1]])
