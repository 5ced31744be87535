"""Multi-head latent attention: expanded and absorbed are one function, for a cache of the size that V2 promises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.config_sections import MeshConfig
from deepseek_jax.mesh import make_mesh
from deepseek_jax.model import paged_cache
from deepseek_jax.model.attention_kinds import ATTENTION
from deepseek_jax.model.decode import decode
from deepseek_jax.model.mla import softmax_scale
from deepseek_jax.model.paged_cache import CachePositions
from deepseek_jax.model.rope import apply_rope, rope_cos_sin, rope_frequencies
from deepseek_jax.model.transformer import STACKS, graphdef, init_params
from deepseek_jax.model_config import AttentionConfig, YarnConfig
from deepseek_jax.plan.flops import cache_elements_per_token
from tests import configs

MLA = dataclasses.replace(configs.MLA, heads=4, qk_rope_head_dim=6, v_head_dim=10)
V3 = dataclasses.replace(configs.V3, num_mtp_layers=0, init_std=0.3, remat="none", attention=MLA)
YARN = YarnConfig(factor=40.0, original_seq=8, mscale=1.3, mscale_all_dim=0.6)
GQA = dataclasses.replace(configs.GQA, heads=4, kv_heads=2)
ATTENTIONS = {
  "mla": MLA,
  "mla without q_lora": dataclasses.replace(MLA, q_lora_rank=0),
  "mla with yarn": dataclasses.replace(MLA, yarn=YARN),
  "gqa": GQA,
  "mha": dataclasses.replace(GQA, kv_heads=4),
  "mla with a window": dataclasses.replace(MLA, window=3),
  "gqa with a window": dataclasses.replace(GQA, window=3),
}
MODELS = {name: dataclasses.replace(V3, attention=attention) for name, attention in ATTENTIONS.items()} | {
  "hash router": dataclasses.replace(V3, attention=GQA, layers=2, moe=configs.HASH_MOE)
}


def model_of(config):
  with jax.set_mesh(make_mesh(MeshConfig(data=1), jax.devices()[:1])):
    params, buffers = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    return nnx.merge(graphdef(config), params, buffers)


@pytest.mark.parametrize("name", MODELS)
def test_decoding_equals_the_full_forward_pass(name):
  config = dataclasses.replace(MODELS[name], param_dtype="float64", compute_dtype="float64")
  ids = np.random.default_rng(0).integers(0, 64, (2, 12))
  with jax.enable_x64(True), jax.set_mesh(make_mesh(MeshConfig(data=1), jax.devices()[:1])):
    model = model_of(config)
    expected = model.logits(jax.jit(lambda model, ids: model(ids)[0])(model, jnp.asarray(ids)))
    cache = new_cache(config)
    table = jnp.array([[3, 1, 0, 5], [2, 4, 6, 5]])  # page 5 is nobody's
    step = jax.jit(decode)
    # Both prompts are of 5 positions, for which one program is compiled.
    for start, end, padding in ((0, 5, 0), (5, 9, 1), *((at, at + 1, 0) for at in range(9, 12))):
      where = CachePositions(jnp.full(2, start), jnp.full(2, end - start), table)
      new = np.pad(ids[:, start:end], ((0, 0), (0, padding)))
      hidden, cache = step(model, jnp.asarray(new), cache, where)
      got = model.logits(hidden)[:, : end - start]
      np.testing.assert_allclose(got, expected[:, start:end], rtol=1e-10, atol=1e-10)


def new_cache(config):
  """Of 7 pages of 4 positions. Page 5, which is nobody's, has large values."""
  shapes = ATTENTION[config.attention.kind].token_shapes(config.attention)
  layers = {name: getattr(config, f"num_{name}") for name in STACKS}
  zeros = {name: paged_cache.zeros(shapes, n, 7, 4, config.compute_dtype) for name, n in layers.items() if n}
  return jax.tree.map(lambda array: array.at[:, 5].set(1e30), zeros)


@pytest.mark.parametrize("name", ["mla", "gqa"])
def test_bytes_of_the_cache(name):
  config = dataclasses.replace(V3, attention=ATTENTIONS[name])
  with jax.set_mesh(make_mesh(MeshConfig(data=1), jax.devices()[:1])):
    cache = new_cache(config)
  a = config.attention
  width = a.kv_lora_rank + a.qk_rope_head_dim if a.kind == "mla" else 2 * a.kv_heads * a.head_dim
  total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
  assert total == 7 * 4 * config.layers * width * 4
  assert cache_elements_per_token(config) == config.layers * width


def test_rotation_keeps_relative_positions_and_pairs_are_interleaved():
  rng = np.random.default_rng(0)
  q, k = rng.normal(size=(2, 1, 1, 1, 6)).astype(np.float32)

  def product(i, j):
    turned = [
      apply_rope(jnp.asarray(x), *rope_cos_sin(jnp.array([[at]]), MLA, jnp.float32), interleaved=True)
      for x, at in ((q, i), (k, j))
    ]
    return float((turned[0] * turned[1]).sum())

  assert product(3, 1) == pytest.approx(product(9, 7), rel=1e-5) != pytest.approx(product(3, 2), rel=1e-3)
  # By hand, as complex numbers of the pairs (2i, 2i + 1).
  z, w = (x.reshape(3, 2) @ np.array([1, 1j]) for x in (q[0, 0, 0], k[0, 0, 0]))
  turn = np.exp(2j * 10000.0 ** (-np.arange(3) / 3))
  assert product(3, 1) == pytest.approx((z * turn * w.conj()).real.sum(), rel=1e-5)


def test_yarn_of_the_released_models():
  v3 = AttentionConfig(
    kind="mla", heads=2, kv_lora_rank=4, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    yarn=YarnConfig(factor=40.0, mscale=1.0, mscale_all_dim=1.0),
  )  # fmt: skip
  assert softmax_scale(v3) == pytest.approx(0.135234, abs=1e-6)
  v2 = dataclasses.replace(v3, yarn=YarnConfig(factor=40.0, mscale=0.707, mscale_all_dim=0.707))
  assert softmax_scale(v2) == pytest.approx(0.114721, abs=1e-6)
  assert softmax_scale(dataclasses.replace(v3, yarn=YarnConfig())) == pytest.approx(192**-0.5)
  plain, stretched = (rope_frequencies(64, 1e4, YarnConfig(factor=f)) for f in (1.0, 40.0))
  ratio = plain / stretched
  assert ratio[0] == 1 and ratio[-1] == pytest.approx(40) and (np.diff(ratio) >= 0).all()
