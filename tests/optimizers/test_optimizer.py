"""AdamW against its definition (Loshchilov and Hutter 2019), what is decayed, and the dtype of the moments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config_sections import OptimizerConfig
from deepseek_jax.optimizers.optimizer import make_optimizer
from tests.configs import DENSE


def params():
  return {"a": {"kernel": jnp.array([[1.0, -2.0], [3.0, 0.5]])}, "norm": {"scale": jnp.array([1.0, 2.0])}}


def test_three_steps_equal_the_definition():
  config, rate = OptimizerConfig(clip=1.0), 0.1
  tx, p = make_optimizer(config, DENSE), params()
  state = tx.init(p)
  rng = np.random.default_rng(0)
  expected = {"kernel": np.array(p["a"]["kernel"]), "scale": np.array(p["norm"]["scale"])}
  moments = {name: [np.zeros_like(value), np.zeros_like(value)] for name, value in expected.items()}
  for t in range(1, 4):
    g = {"kernel": rng.normal(size=(2, 2)), "scale": rng.normal(size=2)}
    norm = np.sqrt(sum((x**2).sum() for x in g.values()))
    updates, state = tx.update(
      {"a": {"kernel": jnp.array(g["kernel"])}, "norm": {"scale": jnp.array(g["scale"])}}, state, p
    )
    p = jax.tree.map(lambda p, u: p - rate * u, p, updates)
    for name, value in expected.items():
      clipped = g[name] / max(norm, 1.0)
      m, v = moments[name]
      m[:] = 0.9 * m + 0.1 * clipped
      v[:] = 0.95 * v + 0.05 * clipped**2
      step = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
      value -= rate * (step + (0.1 * value if name == "kernel" else 0))
  np.testing.assert_allclose(p["a"]["kernel"], expected["kernel"], rtol=1e-5)
  np.testing.assert_allclose(p["norm"]["scale"], expected["scale"], rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_moments_dtype(dtype):
  tx = make_optimizer(OptimizerConfig(moments_dtype=dtype), DENSE)
  state = tx.init(params())
  updates, state = tx.update(jax.tree.map(jnp.ones_like, params()), state, params())
  kept = {x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)}
  assert kept == {jnp.dtype(dtype)}
  assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype("float32")}
