"""Decoding against the model asked one token at a time, on one device and on a mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.config_sections import MeshConfig, SampleConfig
from deepseek_jax.data import tokenizer
from deepseek_jax.generate.decoding import continue_prompt
from deepseek_jax.generate.request import BOUNDS
from deepseek_jax.mesh import make_mesh
from deepseek_jax.model.transformer import graphdef, init_params
from tests.configs import DENSE, GQA

pytestmark = pytest.mark.jax_version

MODEL = dataclasses.replace(DENSE, vocab=260, init_std=0.3, attention=dataclasses.replace(GQA, heads=4, kv_heads=2))
GREEDY = SampleConfig(prompt="ab", max_tokens=9, temperature=0.0)
BYTES = tokenizer.load_tokenizer("byte")


def generate(mesh_config, settings, seq=64, seed=0):
  mesh = make_mesh(mesh_config, jax.devices()[: abs(mesh_config.data * mesh_config.fsdp * mesh_config.tensor)])
  with jax.set_mesh(mesh):
    params, buffers = jax.block_until_ready(jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(3)))
    return continue_prompt(MODEL, params, buffers, BYTES, settings, seq, seed, mesh)


def greedy_reference(window):
  """The likeliest token again and again, from whole forward passes; a full window forgets its older half.

  Zeros behind the tokens, which these do not see, make one program do for all lengths.
  """
  longest = min(window, 3 + GREEDY.max_tokens)
  with jax.set_mesh(make_mesh(MeshConfig(data=1), jax.devices()[:1])):
    params, _ = jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(3))

    @jax.jit
    def forward(params, ids):
      model = nnx.merge(graphdef(MODEL), params, {})
      return model.logits(model(ids)[0])

    ids, start = [BYTES.bos, *b"ab"], 0
    for _ in range(GREEDY.max_tokens):
      start = start if len(ids) - start < window else len(ids) - window // 2
      seen = ids[start:]
      logits = np.array(forward(params, jnp.array([seen + [0] * (longest - len(seen))]))[0, len(seen) - 1])
      ids.append(int(logits[: BYTES.vocab].argmax()))
      if ids[-1] == BYTES.eos:
        break
  return BYTES.decode([i for i in ids[3:] if i != BYTES.eos])


@pytest.mark.parametrize("window", [64, 4])
def test_greedy_equals_whole_forward_passes(window):
  assert generate(MeshConfig(data=1), GREEDY, seq=window) == greedy_reference(window)


@pytest.mark.parametrize("mesh", [MeshConfig(data=1, fsdp=4), MeshConfig(data=2, tensor=2)])
def test_every_mesh_gives_the_same_text(mesh):
  assert generate(mesh, GREEDY) == generate(MeshConfig(data=1), GREEDY)


def test_the_seed_decides():
  hot = SampleConfig(prompt="ab", max_tokens=30, temperature=2.0, top_p=1.0)
  first = generate(MeshConfig(data=1), hot, seed=1)
  assert first == generate(MeshConfig(data=1), hot, seed=1) != generate(MeshConfig(data=1), hot, seed=2)
  assert generate(MeshConfig(data=1), hot, seed=-1) != first  # any integer is one


def test_what_a_config_may_say_an_engine_does():
  """A run samples at its end: a value that the engine refuses has to be an error before the run begins."""
  for field in dataclasses.fields(SampleConfig):
    if field.name not in ("prompt", "max_tokens"):
      limits = field.metadata.get("at_least", field.metadata.get("above")), field.metadata.get("at_most")
      assert limits == BOUNDS[field.name], field.name
