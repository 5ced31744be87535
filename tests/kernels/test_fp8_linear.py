"""FP8 linear layers: values and gradients by their definition in NumPy, what the forward pass saves, and on a mesh."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from deepseek_jax.kernels.fp8_linear import FP8_ACTIVATION, FP8_WEIGHT, Recipe, fp8_linear, fp8_ragged_linear
from deepseek_jax.kernels.quantize import api as quantizers
from deepseek_jax.kernels.swiglu.xla import swiglu_float32

ROWS, K, N = 200, 150, 260
quantize = jax.jit(quantizers.quantize, static_argnames=("tile", "pow2_scales", "implementation"))
REPORT, POW2, OTHER = Recipe(), Recipe(pow2_scales=True), Recipe(pow2_scales=True, block=256)
SIZES = (50, 0, 110, 27)  # and 13 rows of none


def problem(groups=None, rows=ROWS, k=K, n=N):
  """(x [rows, k], w [k, n] or [groups, k, n], dy [rows, n]), float32."""
  rng = np.random.default_rng(0)
  shapes = (rows, k), (k, n) if groups is None else (groups, k, n), (rows, n)
  return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def round_trip(x, tile, recipe=REPORT, fp8=True):
  """`x` quantized to FP8 and dequantized, in float64."""
  q = quantize(x, tile, pow2_scales=recipe.pow2_scales, implementation="reference").dequantize() if fp8 else x
  return np.asarray(q, np.float64)


def expected(x, w, dy, recipe=REPORT, sizes=(ROWS,)):
  """(y, dx, dw), w and dw [groups, k, n]."""
  along, square = (1, recipe.block), (recipe.block, recipe.block)
  x_y, w_y = round_trip(x, along, recipe, recipe.forward), round_trip(w, square, recipe, recipe.forward)
  dy_x, w_x = round_trip(dy, along, recipe, recipe.dgrad), round_trip(w, square, recipe, recipe.dgrad)
  x_w, dy_w = (round_trip(a.T, along, recipe, recipe.wgrad) for a in (x, dy))
  y, dx, dw, start = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape), 0
  for group, size in enumerate(sizes):
    rows = slice(start, start + size)
    y[rows], dx[rows], dw[group] = x_y[rows] @ w_y[group], dy_x[rows] @ w_x[group].T, x_w[:, rows] @ dy_w[:, rows].T
    start += size
  return y, dx, dw


def computed(product, x, w, dy):
  """(y, dx, dw) of a layer `product`."""

  @jax.jit
  def all_three(x, w, dy):
    y, vjp = jax.vjp(product, x, w)
    return y, *vjp(dy)

  return all_three(x, w, dy)


def assert_close(ours, reference, tolerance=2e-6):
  for a, b in zip(ours, reference, strict=True):
    assert np.linalg.norm(np.asarray(a, np.float64) - b) < tolerance * np.linalg.norm(b)


@pytest.mark.parametrize(
  ("implementation", "recipe"),
  [
    *itertools.product(["xla", "reference", "pallas_tpu"], [REPORT, OTHER]),
    ("pallas_gpu", REPORT),
    ("pallas_gpu", POW2),
  ],
  ids=lambda value: (
    value if isinstance(value, str) else f"{value.block} pow2_scales" if value.pow2_scales else "the report's"
  ),
)
def test_value_and_gradients(implementation, recipe):
  x, w, dy = problem()
  recipe = dataclasses.replace(recipe, implementation=implementation)
  ours = computed(lambda x, w: fp8_linear(x, w, recipe=recipe)[0], x, w, dy)
  y, dx, dw = expected(x, w[None], dy, recipe)
  assert_close(ours, (y, dx, dw[0]))


@pytest.mark.parametrize(
  ("implementation", "step"), [("reference", 128), ("xla", 16), ("pallas_gpu", 128), ("pallas_tpu", 32)]
)
@pytest.mark.quick(implementation="pallas_tpu")
def test_value_and_gradients_by_group(implementation, step):
  x, w, dy = problem(len(SIZES))
  recipe, sizes = Recipe(implementation=implementation), jnp.asarray(SIZES, jnp.int32)
  product = lambda x, w: fp8_ragged_linear(x, w, group_sizes=sizes, step=step, recipe=recipe)[0]
  assert_close(computed(product, x, w, dy), expected(x, w, dy, recipe, SIZES))


@pytest.mark.parametrize(
  ("name", "groups"), [("forward", None), ("dgrad", None), ("wgrad", None), ("wgrad", SIZES)], ids=str
)
def test_each_product_may_stay_as_it_is(name, groups):
  """Rounding changes a product by some percent, so that the tolerance tells them apart."""
  recipe = Recipe(**{name: False})
  x, w, dy = problem(groups and len(groups))
  if groups:
    sizes = jnp.asarray(groups, jnp.int32)
    ours = computed(lambda x, w: fp8_ragged_linear(x, w, group_sizes=sizes, recipe=recipe)[0], x, w, dy)
    assert_close(ours, expected(x, w, dy, recipe, groups))
  else:
    ours = computed(lambda x, w: fp8_linear(x, w, recipe=recipe)[0], x, w, dy)
    y, dx, dw = expected(x, w[None], dy, recipe)
    assert_close(ours, (y, dx, dw[0]))


@pytest.mark.parametrize("groups", [None, SIZES], ids=["dense", "by group"])
@pytest.mark.parametrize("wgrad", [True, False])
def test_a_swiglu_is_recomputed_from_its_inputs_in_fp8(groups, wgrad):
  """Forward of the inputs as they are; backward of their roundings, through the derivative written out."""
  recipe, sizes = Recipe(wgrad=wgrad), groups and jnp.asarray(groups, jnp.int32)
  gate, w, dy = problem(groups and len(groups))
  up = jnp.asarray(np.random.default_rng(1).standard_normal(gate.shape), jnp.float32)

  def layer(pair, w):
    return (
      fp8_linear(pair, w, recipe=recipe)
      if groups is None
      else fp8_ragged_linear(pair, w, group_sizes=sizes, recipe=recipe)
    )[0]

  y, (dgate, dup), dw = computed(layer, (gate, up), w, dy)
  dequantized = [jnp.asarray(round_trip(a, (1, 128), recipe, wgrad), jnp.float32) for a in (gate, up)]
  w, dw = (a[None] if groups is None else a for a in (w, dw))
  expected_y, _, _ = expected(swiglu_float32(gate, up), w, dy, recipe, groups or (ROWS,))
  _, dx, expected_dw = expected(swiglu_float32(*dequantized), w, dy, recipe, groups or (ROWS,))
  g, u = (np.asarray(a, np.float64) for a in dequantized)
  sigmoid = 1 / (1 + np.exp(-g))
  assert_close(
    (y, dgate, dup, dw), (expected_y, dx * u * sigmoid * (1 + g * (1 - sigmoid)), dx * g * sigmoid, expected_dw)
  )


def test_what_is_saved_for_the_backward_pass_does_not_change_the_result():
  gate, w, _ = problem()
  pair = gate.astype(jnp.bfloat16), (gate[::-1] + 1).astype(jnp.bfloat16)

  def layer(**options):
    return jax.jit(lambda x, w: fp8_linear(x, w, recipe=Recipe(**options))[0])

  for x in (pair, pair[0]):
    y = layer()(x, w)
    for options in ({"wgrad": False}, {"fp8_residual": False}, {"dgrad": False}):
      np.testing.assert_array_equal(layer(**options)(x, w), y)
    np.testing.assert_array_equal(jax.jit(lambda x, w: jax.vjp(lambda x: fp8_linear(x, w)[0], x)[0])(x, w), y)


def test_layers_of_one_activation_are_those_of_each_and_gradients_add_up():
  x, w, dy = problem()
  weights, gradients = (w, 3 * w[:, :40]), (dy, dy[:, :40])
  y, dx, dw = computed(lambda x, w: fp8_linear(x, *w), x, weights, gradients)
  separate = [computed(lambda x, w: fp8_linear(x, w)[0], x, *pair) for pair in zip(weights, gradients, strict=True)]
  jax.tree.map(np.testing.assert_array_equal, y, tuple(a[0] for a in separate))
  np.testing.assert_allclose(dx, sum(a[1] for a in separate), rtol=1e-5, atol=1e-4)
  jax.tree.map(np.testing.assert_array_equal, dw, tuple(a[2] for a in separate))


def residuals(function, *arrays):
  """[(dtype, shape)] of what the forward pass saves for the backward pass."""
  leaves = jax.tree.leaves(jax.eval_shape(lambda *arrays: jax.vjp(function, *arrays)[1], *arrays))
  return [(str(a.dtype), a.shape) for a in leaves if a.size]


def residual_bytes(saved):
  return sum(np.prod(shape) * jnp.dtype(dtype).itemsize for dtype, shape in saved)


@pytest.mark.parametrize("layers", [1, 2])
def test_one_copy_of_the_activation_is_saved_in_fp8_transposed(layers):
  x, w, _ = problem(rows=256, k=128, n=384)
  saved = residuals(lambda x, *w: fp8_linear(x, *w), x.astype(jnp.bfloat16), *[w] * layers)
  assert saved.count(("float8_e4m3fn", (128, 256))) == 1  # the transpose; w is as large as none of them
  activation_bytes, weight_bytes = 256 * 128 + 128 * 2 * 4, 128 * 384 + 3 * 4
  assert residual_bytes(saved) == activation_bytes + layers * weight_bytes
  exact = residuals(lambda x, w: x @ w, x.astype(jnp.bfloat16), w.astype(jnp.bfloat16))
  assert residual_bytes(exact) == 2 * (256 * 128 + 128 * 384)


def test_by_group_as_little_is_saved():
  x, w, _ = problem(2, rows=256, k=128, n=384)
  sizes = jnp.asarray([100, 156], jnp.int32)
  saved = residuals(lambda x, w: fp8_ragged_linear(x, w, group_sizes=sizes)[0], x, w)
  assert residual_bytes(saved) == 256 * 128 + 128 * 2 * 4 + 2 * (128 * 384 + 3 * 4) + 2 * 4


def test_of_a_swiglu_its_inputs_are_saved_in_fp8():
  x, w, _ = problem(rows=256, k=128, n=384)
  saved = residuals(lambda gate, up, w: fp8_linear((gate, up), w)[0], *[x.astype(jnp.bfloat16)] * 2, w)
  assert residual_bytes(saved) == 2 * (256 * 128 + 256 * 4) + 128 * 384 + 3 * 4


def test_an_activation_that_is_saved_as_it_is_gives_the_same_gradients():
  x, w, dy = problem()
  x = x.astype(jnp.bfloat16)
  layer = lambda recipe: lambda x, w: fp8_linear(x, w, recipe=recipe)[0]
  unquantized = layer(Recipe(fp8_residual=False))
  assert ("bfloat16", (ROWS, K)) in residuals(unquantized, x, w)
  jax.tree.map(
    np.testing.assert_array_equal, *(computed(f, x, w, dy.astype(jnp.bfloat16)) for f in (unquantized, layer(REPORT)))
  )


@pytest.mark.parametrize(("names", "copies"), [((), 0), ((FP8_ACTIVATION,), 1), ((FP8_ACTIVATION, FP8_WEIGHT), 2)])
def test_policies_of_rematerialisation_know_the_copies_by_name(names, copies):
  x, w, _ = problem()
  policy = jax.checkpoint_policies.save_only_these_names(*names)
  layer = jax.checkpoint(lambda x, w: fp8_linear(2 * x, w)[0], policy=policy)
  assert sum(dtype == "float8_e4m3fn" for dtype, _ in residuals(layer, x, w)) == copies


@pytest.mark.parametrize("by_group", [False, True])
def test_inside_shard_map_the_gradients_of_a_shared_matrix_add_up(by_group):
  x, w, dy = problem(1 if by_group else None, rows=128)
  mesh = jax.make_mesh((2,), ("devices",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
  sizes = jnp.asarray([128], jnp.int32)
  local = (
    (lambda x, w: fp8_ragged_linear(x, w, group_sizes=sizes)[0]) if by_group else (lambda x, w: fp8_linear(x, w)[0])
  )
  _, dx, dw = computed(local, x, w, dy)
  with jax.set_mesh(mesh):
    split = jax.P("devices")
    two, dy_two = (jax.device_put(jnp.concatenate([a, a]), jax.NamedSharding(mesh, split)) for a in (x, dy))
    w = jax.device_put(w, jax.NamedSharding(mesh, jax.P()))
    product = jax.shard_map(local, in_specs=(split, jax.P()), out_specs=split)
    ours = jax.block_until_ready(jax.jit(jax.grad(lambda x, w: (product(x, w) * dy_two).sum(), argnums=(0, 1)))(two, w))
  np.testing.assert_allclose(ours[0], np.concatenate([dx, dx]), rtol=1e-6, atol=1e-5)
  np.testing.assert_allclose(ours[1], 2 * dw, rtol=1e-6, atol=1e-5)


def test_gradients_have_the_dtypes_of_what_they_are_of():
  x, w, dy = problem()
  y, dx, dw = computed(lambda x, w: fp8_linear(x, w)[0], x.astype(jnp.bfloat16), w, dy.astype(jnp.bfloat16))
  assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)


def test_an_implementation_that_does_not_exist_is_refused():
  with pytest.raises(ValueError, match="no implementation 'cuda': use auto, pallas, xla, reference"):
    fp8_linear(*problem()[:2], recipe=Recipe(implementation="cuda"))
