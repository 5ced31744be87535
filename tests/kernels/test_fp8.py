"""FP8 quantization and GEMMs: the same tests for every implementation.

GEMMs are compared with float64 products of the same FP8 operands, so that a test bounds the kernel's error alone.
Scales differ by powers of two, which are exact: a wrong scale is a large error.
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from deepseek_jax.kernels import implementations
from deepseek_jax.kernels.fp8_grouped_matmul import api as grouped
from deepseek_jax.kernels.fp8_matmul import api as dense
from deepseek_jax.kernels.qtensor import QTensor
from deepseek_jax.kernels.quantize import api as quantizers
from deepseek_jax.kernels.swiglu import api as swiglu

quantize = jax.jit(quantizers.quantize, static_argnames=("tile", "pow2_scales", "implementation"))
quantize_both = jax.jit(quantizers.quantize_both, static_argnames=("block", "pow2_scales", "implementation"))
swiglu_quantize = jax.jit(swiglu.swiglu_quantize, static_argnames=("block", "pow2_scales", "implementation"))
fp8_matmul = jax.jit(dense.fp8_matmul, static_argnames=("out_dtype", "implementation"))
fp8_grouped_matmul = jax.jit(grouped.fp8_grouped_matmul, static_argnames=("step", "implementation"))
fp8_grouped_wgrad = jax.jit(grouped.fp8_grouped_wgrad, static_argnames=("step", "implementation"))
ROWS, K, N = 256, 384, 256
EACH = pytest.mark.parametrize("implementation", ["xla", "reference", "pallas_gpu", "pallas_tpu"])
EACH_WITH_STEPS = pytest.mark.parametrize(
  ("implementation", "step"),
  [("reference", 128), ("xla", 32), ("xla", 128), ("pallas_gpu", 128), ("pallas_tpu", 16), ("pallas_tpu", 128)],
)
TILES = pytest.mark.parametrize("tile", [(1, 128), (128, 128)], ids=["activations", "weights"])
SIZES = {
  "several": (100, 29, 127),
  "empty groups": (0, 130, 0, 0, 126),
  "one group": (256,),
  "tiny groups": (1, 2, 3, 250),
  "rows of no group": (40, 0, 60),
}


def normal(*shape, seed=0, outliers=False):
  """float32; with `outliers`, columns of log-normal size, as activations have."""
  rng = np.random.default_rng(seed)
  x = rng.standard_normal(shape)
  return jnp.asarray(x * np.exp(1.5 * rng.standard_normal((1, shape[-1]))) if outliers else x, jnp.float32)


def float64(q):
  """`q` dequantized in NumPy, by the definition of a tile."""
  values, scales = np.asarray(q.values, np.float64), np.asarray(q.scales, np.float64)
  row, column = (np.arange(n) // t for n, t in zip(values.shape[-2:], q.tile, strict=True))
  with np.errstate(invalid="ignore"):  # infinite scales of zeros
    return values * scales[..., row, :][..., column]


def error(ours, reference):
  """Relative, in the Frobenius norm."""
  return np.linalg.norm(np.asarray(ours, np.float64) - reference) / np.linalg.norm(reference)


def operands(k=K, outliers=False, pow2_scales=False, wgrad=False):
  """(a [ROWS, k], b [N, k]): an activation and a weight, or two activations."""
  a = quantize(normal(ROWS, k, outliers=outliers), (1, 128), pow2_scales=pow2_scales, implementation="reference")
  b = quantize(
    normal(N, k, seed=1), (1, 128) if wgrad else (128, 128), pow2_scales=pow2_scales, implementation="reference"
  )
  return a, b


def random_scales(q, seed):
  """`q` with another power of two as the scale of each tile: a scale used in the wrong place is wrong by a factor."""
  exponents = np.random.default_rng(seed).permutation(q.scales.size).reshape(q.scales.shape) % 64 - 32
  return QTensor(q.values, jnp.asarray(2.0**exponents, jnp.float32), q.tile)


# Quantization.


@EACH
@TILES
@pytest.mark.parametrize("pow2_scales", [False, True])
@pytest.mark.parametrize("shape", [(256, 256), (2, 129, 127)], ids=str)
@pytest.mark.quick(implementation="pallas_tpu", shape=(2, 129, 127), pow2_scales=True, tile=(128, 128))
def test_tiles_are_rounded_as_numpy_rounds_them(implementation, tile, pow2_scales, shape):
  x = normal(*shape)
  q = quantize(x, tile, pow2_scales=pow2_scales, implementation=implementation)
  x, values, (rows, columns) = np.asarray(x), np.asarray(q.values, np.float32), tile
  scales = np.asarray(q.scales)
  for i in range(q.scales.shape[-2]):
    for j in range(q.scales.shape[-1]):
      part = (..., slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
      absmax = np.abs(x[part]).max((-2, -1))
      scale = np.exp2(np.ceil(np.log2(absmax / 448))) if pow2_scales else absmax * np.float32(1 / 448)
      np.testing.assert_array_equal(scales[..., i, j], scale)
      expected = (x[part] / scale[..., None, None]).astype(ml_dtypes.float8_e4m3fn)
      np.testing.assert_array_equal(values[part], expected.astype(np.float32))
  assert q.values.dtype == jnp.float8_e4m3fn and q.scales.dtype == jnp.float32
  assert q.scales.shape == (*shape[:-2], *(-(-n // t) for n, t in zip(shape[-2:], tile, strict=True)))


@EACH
@TILES
@pytest.mark.parametrize("pow2_scales", [False, True])
def test_what_is_multiplied_by_a_power_of_two_changes_its_scales_alone(implementation, tile, pow2_scales):
  x = normal(256, 256)
  q, larger = (quantize(a, tile, pow2_scales=pow2_scales, implementation=implementation) for a in (x, x * 2.0**20))
  np.testing.assert_array_equal(q.values, larger.values)
  np.testing.assert_array_equal(q.scales * 2.0**20, larger.scales)


@EACH
def test_scales_are_the_least_powers_of_two_that_hold_a_tile(implementation):
  x = jnp.stack([jnp.full((128,), value) for value in (448.0, 448.001, 224.0, 3.5, 2.0**-120)])
  q = quantize(x, (1, 128), pow2_scales=True, implementation=implementation)
  np.testing.assert_array_equal(q.scales[:, 0], [1.0, 2.0, 0.5, 2.0**-7, 2.0**-126])


@EACH
@pytest.mark.parametrize("pow2_scales", [False, True])
def test_zeros_stay_zeros_beside_any_tile(implementation, pow2_scales):
  x = normal(2, 256).at[0, :128].set(0)
  q = quantize(x, (1, 128), pow2_scales=pow2_scales, implementation=implementation)
  assert not q.values[0, :128].astype(jnp.float32).any() and np.isfinite(q.scales).all()
  np.testing.assert_allclose(float64(q)[0, 128:], x[0, 128:], atol=0.5)


@EACH
def test_the_largest_value_of_a_tile_becomes_448_of_its_sign(implementation):
  x = normal(64, 128)
  largest = np.take_along_axis(np.asarray(x), np.abs(x).argmax(1, keepdims=True), 1)
  q = quantize(x, (1, 128), implementation=implementation)
  values = np.asarray(q.values, np.float32)
  np.testing.assert_array_equal(values[np.abs(x) == np.abs(largest)], 448 * np.sign(largest[:, 0]))
  assert np.abs(values).max() == 448


@EACH
@TILES
@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("pow2_scales", [False, True])
def test_a_tile_with_a_value_that_is_not_finite_is_nan_and_no_other(implementation, tile, value, pow2_scales):
  q = quantize(normal(256, 256).at[130, 7].set(value), tile, pow2_scales=pow2_scales, implementation=implementation)
  bad = np.isnan(float64(q))
  in_tile = np.zeros_like(bad)
  in_tile[128 if tile[0] == 128 else 130 : 256 if tile[0] == 128 else 131, :128] = True
  np.testing.assert_array_equal(bad, in_tile)


@EACH
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.quick(implementation="pallas_gpu", dtype=jnp.bfloat16)
@pytest.mark.quick(implementation="pallas_tpu", dtype=jnp.bfloat16)
def test_both_are_the_matrix_and_its_transpose_in_tiles_along_their_rows(implementation, dtype):
  x = normal(200, 300).astype(dtype)
  both = quantize_both(x, 128, implementation=implementation)
  for q, a in zip(both, (x, x.T), strict=True):
    expected = quantize(a, (1, 128), implementation="reference")
    jax.tree.map(np.testing.assert_array_equal, q, expected)


@EACH
@pytest.mark.parametrize("pow2_scales", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.quick(implementation="pallas_gpu", dtype=jnp.bfloat16, pow2_scales=False)
@pytest.mark.quick(implementation="pallas_tpu", dtype=jnp.bfloat16, pow2_scales=False)
def test_swiglu_is_rounded_once(implementation, pow2_scales, dtype):
  """To the nearest FP8 value: as near as float32's own error allows, and scales as near."""
  gate, up = (normal(200, 300, seed=seed).astype(dtype) for seed in (0, 1))
  both = swiglu_quantize(gate, up, 128, pow2_scales=pow2_scales, implementation=implementation)
  wide = [np.asarray(a, np.float64) for a in (gate, up)]
  y = wide[0] / (1 + np.exp(-wide[0])) * wide[1]
  for q, a in zip(both, (y, y.T), strict=True):
    expected = quantize(jnp.asarray(a, jnp.float32), (1, 128), pow2_scales=pow2_scales, implementation="reference")
    np.testing.assert_allclose(q.scales, expected.scales, rtol=0 if pow2_scales else 1e-6)
    unit = np.exp2(np.maximum(np.floor(np.log2(np.abs(np.asarray(q.values, np.float64)) + 1e-30)), -6) - 3)
    assert (np.abs(float64(q) - a) <= unit * q.broadcast_scales() * (0.5 + 1e-4)).all()


def test_halves_of_swiglu_that_differ_are_refused():
  with pytest.raises(ValueError, match=r"gate \(2, 3\) and up \(3, 2\): equal shapes"):
    swiglu_quantize(normal(2, 3), normal(3, 2), 128)


# GEMMs.


@EACH
@pytest.mark.parametrize("wgrad", [False, True])
@pytest.mark.parametrize("k", [128, 384, 1000])
@pytest.mark.quick(implementation="pallas_tpu", k=128, wgrad=True)
def test_product_of_the_same_operands(implementation, wgrad, k):
  a, b = operands(k, outliers=True, wgrad=wgrad)
  reference = float64(a) @ float64(b).T
  product = functools.partial(fp8_matmul, implementation=implementation)
  assert error(product(a, b), reference) < 1e-6
  rounded = product(a, b, out_dtype=jnp.bfloat16)
  assert rounded.dtype == jnp.bfloat16 and error(rounded, reference) < 2e-3


def test_the_reference_is_exact_where_jax_has_float64():
  a, b = operands()
  with jax.enable_x64(True):
    ours = fp8_matmul(a, b, out_dtype=jnp.float64, implementation="reference")
  assert error(ours, float64(a) @ float64(b).T) < 1e-14


@EACH
def test_tiles_keep_outliers_apart(implementation):
  """Against the product before quantization: fine tiles beat a scale a matrix, which rounds most to zero."""
  x, w = normal(ROWS, 2048, outliers=True), normal(N, 2048, seed=1)
  reference = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
  fine = fp8_matmul(quantize(x, (1, 128)), quantize(w, (128, 128)), implementation=implementation)
  coarse = fp8_matmul(quantize(x, (ROWS, 2048)), quantize(w, (N, 2048)), implementation="reference")
  assert error(fine, reference) < 0.033 < 0.036 < error(coarse, reference)


@EACH
def test_scaling_an_operand_by_a_power_of_two_scales_the_product_exactly(implementation):
  a, b = operands()
  larger = QTensor(a.values, a.scales * 2.0**30, a.tile)
  ours, scaled = (np.asarray(fp8_matmul(q, b, implementation=implementation)) for q in (a, larger))
  np.testing.assert_array_equal(ours * np.float32(2.0**30), scaled)


@EACH
def test_permuted_rows_are_the_permuted_product_bitwise(implementation):
  a, b = operands()
  order = np.random.default_rng(0).permutation(ROWS)
  permuted = QTensor(a.values[order], a.scales[order], a.tile)
  ours, theirs = (fp8_matmul(q, b, implementation=implementation) for q in (a, permuted))
  np.testing.assert_array_equal(np.asarray(ours)[order], theirs)


@EACH
@pytest.mark.parametrize("wgrad", [False, True])
@pytest.mark.quick(implementation="pallas_gpu")
@pytest.mark.quick(implementation="pallas_tpu", wgrad=False)
def test_every_scale_is_used_where_it_belongs(implementation, wgrad):
  a, b = operands(wgrad=wgrad)
  a, b = random_scales(a, 0), random_scales(b, 1)
  reference = float64(a) @ float64(b).T
  size = np.abs(float64(a)) @ np.abs(float64(b)).T
  assert np.max(np.abs(fp8_matmul(a, b, implementation=implementation) - reference) / size) < 1e-6
  swapped = QTensor(a.values, a.scales[:, ::-1], a.tile)
  assert np.max(np.abs(fp8_matmul(swapped, b, implementation=implementation) - reference) / size) > 0.1


@EACH
def test_what_is_not_finite_reaches_its_rows_and_no_others(implementation):
  x = normal(ROWS, K).at[5, 200].set(np.nan).at[9, 3].set(np.inf)
  y = fp8_matmul(quantize(x, (1, 128)), operands()[1], implementation=implementation)
  bad = ~np.isfinite(y)
  assert bad[[5, 9]].all() and bad.sum() == 2 * N


def test_operands_that_do_not_contract_are_refused():
  a, b = operands()
  with pytest.raises(ValueError, match="last dimension is contracted"):
    fp8_matmul(a, QTensor(b.values[:, :128], b.scales[:, :1], b.tile))
  with pytest.raises(ValueError, match=r"tiles \(128, 1\).*transpose with .T"):
    fp8_matmul(a.T, quantize(normal(N, ROWS), (128, 128)))


@pytest.mark.parametrize(
  "op",
  [lambda **options: quantize(normal(2, 2), (1, 128), **options), lambda **options: fp8_matmul(*operands(), **options)],
)
def test_an_implementation_that_does_not_exist_is_refused(op):
  with pytest.raises(ValueError, match="no implementation 'cuda': use auto, pallas, xla, reference"):
    op(implementation="cuda")


@pytest.mark.parametrize("implementation", ["pallas_tpu"])
@pytest.mark.quick(implementation="pallas_tpu")
def test_a_shape_that_kernels_for_tpus_do_not_support_is_refused(implementation):
  x = normal(64, 64)
  for op in (quantize, quantize_both, fp8_matmul):
    arguments = (
      (quantizers.quantize(x, (1, 64)),) * 2 if op is fp8_matmul else (x, 64 if op is quantize_both else (1, 64))
    )
    with pytest.raises(implementations.Unsupported, match=r"\(1, 64\).* block a multiple of 128"):
      op(*arguments, implementation=implementation)


# Groups.


def group_problem(name):
  sizes = SIZES[name]
  a = random_scales(quantize(normal(ROWS, K), (1, 128)), 0)
  b = random_scales(quantize(normal(len(sizes), N, K, seed=1), (128, 128)), 1)
  return a, b, jnp.asarray(sizes, jnp.int32)


def spans(name):
  ends = np.cumsum(SIZES[name])
  return [slice(end - size, end) for end, size in zip(ends, SIZES[name], strict=True)]


@EACH_WITH_STEPS
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.quick(implementation="pallas_gpu", name="several")
@pytest.mark.quick(implementation="pallas_tpu", name="empty groups", step=128)
def test_rows_times_the_matrix_of_their_group(implementation, name, step):
  a, b, sizes = group_problem(name)
  y = fp8_grouped_matmul(a, b, sizes, step=step, implementation=implementation)
  reference, size = np.zeros((ROWS, N)), np.full((ROWS, N), 1e-30)
  for group, span in enumerate(spans(name)):
    reference[span] = float64(a)[span] @ float64(b)[group].T
    size[span] = np.abs(float64(a)[span]) @ np.abs(float64(b)[group].T)
  assert np.max(np.abs(y - reference) / size) < 1e-6
  assert not np.asarray(y)[sum(SIZES[name]) :].any()


@EACH_WITH_STEPS
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.quick(implementation="pallas_gpu", name="several")
@pytest.mark.quick(implementation="pallas_tpu", name="empty groups", step=128)
def test_the_contraction_of_each_group(implementation, name, step):
  a, b = (random_scales(quantize(normal(n, ROWS, seed=n), (1, 128)), n) for n in (K, N))
  sizes = jnp.asarray(SIZES[name], jnp.int32)
  dw = fp8_grouped_wgrad(a, b, sizes, step=step, implementation=implementation)
  for group, span in enumerate(spans(name)):
    of_a, of_b = float64(a)[:, span], float64(b)[:, span]
    reference, size = of_a @ of_b.T, np.abs(of_a) @ np.abs(of_b).T
    assert np.max(np.abs(dw[group] - reference) / (size + 1e-30)) < 1e-6


@EACH
def test_one_group_is_the_dense_product_bitwise(implementation):
  a, b, sizes = group_problem("one group")
  ours = fp8_grouped_matmul(a, b, sizes, implementation=implementation)
  np.testing.assert_array_equal(ours, fp8_matmul(a, b[0], implementation=implementation))
  a, b = (quantize(normal(n, ROWS, seed=n), (1, 128)) for n in (K, N))
  ours = fp8_grouped_wgrad(a, b, sizes, implementation=implementation)
  np.testing.assert_array_equal(ours[0], fp8_matmul(a, b, implementation=implementation))


@EACH
def test_a_group_that_is_not_finite_leaves_the_others_alone(implementation):
  """Groups in different tiles: where a tile has rows of two groups, they share its scale."""
  sizes, x = jnp.asarray([128, 128], jnp.int32), normal(ROWS, K).at[130, 3].set(np.nan)
  w = quantize(normal(2, N, K), (128, 128))
  bad = ~np.isfinite(fp8_grouped_matmul(quantize(x, (1, 128)), w, sizes, implementation=implementation))
  assert bad[130].all() and bad.sum() == N
  down, dy = quantize(x.T, (1, 128)), quantize(normal(N, ROWS), (1, 128))
  bad = ~np.isfinite(fp8_grouped_wgrad(down, dy, sizes, step=64, implementation=implementation))
  assert bad[1, 3].all() and bad.sum() == N


def test_a_step_that_does_not_divide_a_tile_is_refused():
  a, b = (quantize(normal(n, ROWS), (1, 128)) for n in (K, N))
  with pytest.raises(ValueError, match="step=48 does not divide tiles of 128"):
    fp8_grouped_wgrad(a, b, jnp.asarray([ROWS], jnp.int32), step=48)


# Which implementation runs.


def on(device_kind):
  """A context in which programs are traced for such a device."""
  device = jax.sharding.AbstractDevice(device_kind, 1, "gpu" if "NVIDIA" in device_kind else "tpu")
  return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


@pytest.mark.parametrize(
  ("device_kind", "file"),
  [("cpu", "xla"), ("TPU v5", "pallas_tpu"), ("TPU7x", "pallas_tpu"), ("NVIDIA H200", "pallas_gpu"), ("NVIDIA GH200 480GB", "pallas_gpu"), ("NVIDIA A100-SXM4-80GB", "xla"), ("NVIDIA B200", "xla")],
)  # fmt: skip
def test_the_platform_chooses(device_kind, file, monkeypatch):
  monkeypatch.setattr(implementations, "load_function", lambda kernel, function, name: lambda *args: (name, *args))
  with on(device_kind):
    assert implementations.call_kernel("quantize", "quantize", "auto", 1) == (file, 1)
    assert implementations.call_kernel("quantize", "quantize", "reference", 1) == ("reference", 1)
    if file == "xla":
      with pytest.raises(ValueError, match=f"no Pallas kernel for {device_kind}: use auto or xla"):
        implementations.call_kernel("quantize", "quantize", "pallas", 1)
    else:
      assert implementations.call_kernel("quantize", "quantize", "pallas", 1) == (file, 1)


FUNCTIONS = {
  "quantize": ("quantize", "quantize_both"), "swiglu": ("swiglu_quantize",), "fp8_matmul": ("matmul",),
  "fp8_grouped_matmul": ("matmul", "wgrad"), "attention": ("attention", "attention_of_part"),
  "grouped_matmul": ("grouped_matmul",),
}  # fmt: skip


@pytest.mark.parametrize("device_kind", ["cpu", "TPU v5", "NVIDIA H200"])
@pytest.mark.parametrize("kernel", FUNCTIONS)
def test_the_chosen_file_has_the_functions(kernel, device_kind):
  with on(device_kind):
    file = implementations.resolve_implementation(kernel, "auto")
    assert all(callable(implementations.load_function(kernel, function, file)) for function in FUNCTIONS[kernel])
    if kernel == "attention":
      assert file == {"cpu": "xla", "TPU v5": "pallas_tpu", "NVIDIA H200": "pallas_gpu"}[device_kind]
      with pytest.raises(ValueError, match="attention has no implementation 'reference': use auto, pallas, xla"):
        implementations.resolve_implementation(kernel, "reference")


def test_an_unsupported_call_is_an_error_where_the_kernel_is_named_and_else_logged_once(monkeypatch, caplog):
  def function(kernel, function, name):
    if name == "supports":
      assert (kernel, function) == ("quantize", "pallas_tpu")
      return lambda function: implementations.Support("3 rows are not a multiple of 8")
    return lambda: name

  monkeypatch.setattr(implementations, "load_function", function)
  monkeypatch.setattr(implementations, "_fallbacks_logged", set())
  with on("TPU v5"):
    for name in ("quantize", "quantize_both"):
      assert implementations.call_kernel("quantize", name, "auto") == "xla"
      assert implementations.call_kernel("quantize", name, "auto", fallback=lambda: "other") == "other"
    assert [r.getMessage() for r in caplog.records] == ["quantize: falling back to XLA: 3 rows are not a multiple of 8"]
    with pytest.raises(implementations.Unsupported, match="3 rows"):
      implementations.call_kernel("quantize", "quantize", "pallas")
