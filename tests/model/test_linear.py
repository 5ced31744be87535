"""FP8 linear layers are matrix products, whatever their einsum."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.kernels.fp8_linear import Recipe
from deepseek_jax.model.linear import linear
from deepseek_jax.model_config import Fp8Config

SHAPES = {
  "bsd,df->bsf": ((2, 3, 6), (6, 5)),
  "bsd,dhk->bshk": ((2, 3, 6), (6, 4, 5)),
  "bshv,hvd->bsd": ((2, 3, 4, 5), (4, 5, 6)),
}


@pytest.mark.parametrize("equation", SHAPES)
def test_the_product_of_every_equation(equation):
  """Of whole numbers up to 15 and one of 448, which FP8 holds: exactly the einsum, and its gradients."""
  rng = np.random.default_rng(0)
  x, w = (jnp.asarray(rng.integers(-15, 16, shape), jnp.float32) for shape in SHAPES[equation])
  x, w = x.at[..., 0].set(448), w.at[0].set(448)
  recipe = Recipe(pow2_scales=True, wgrad=False, implementation="reference")

  @functools.partial(jax.jit, static_argnums=0)
  def value_and_gradients(product, x, w):
    y, vjp = jax.vjp(product, x, w)
    return y, vjp(jnp.ones_like(y).at[..., 0].set(448))

  ours = value_and_gradients(lambda x, w: linear(recipe, equation, x, w)[0], x, w)
  exact = value_and_gradients(lambda x, w: jnp.einsum(equation, x, w), x, w)
  jax.tree.map(np.testing.assert_array_equal, ours, exact)


def test_the_defaults_of_kernels_and_config_are_the_same():
  assert Recipe(**dataclasses.asdict(Fp8Config())) == Recipe()
