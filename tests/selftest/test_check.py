"""One kernel compared with XLA in this process: what is an error and what is not, and which shapes are tested."""

import contextlib
import dataclasses
import importlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.flags import load_config
from deepseek_jax.kernels.implementations import Call
from deepseek_jax.kernels.qtensor import FP8, QTensor, tile_counts
from deepseek_jax.mesh import min_devices, resolve_mesh
from deepseek_jax.selftest import check
from deepseek_jax.selftest.cases import Case, make_cases, program_calls
from deepseek_jax.selftest.operations import KERNEL_SPECS, MAX_GROUPS, MAX_ROWS, draw_normal, make_inputs, uneven_groups

BF16, F32 = jnp.bfloat16, jnp.float32


def array(*shape, dtype=BF16):
  return jax.ShapeDtypeStruct(shape, dtype)


def fp8(tile, *shape):
  return QTensor(array(*shape, dtype=FP8), array(*shape[:-2], *tile_counts(shape, tile), dtype=F32), tile)


IDS = array(2, 256, dtype=jnp.int32)
POSITIONS = np.arange(256, dtype=np.int32).reshape(2, 128)
HEADS = array(2, 256, 4, 24), array(2, 256, 2, 24), array(2, 256, 2, 16)
SIZES = array(4, dtype=jnp.int32)
# Arguments of small calls.
CALLS = {
  "attention.attention": [(*HEADS, None, 0.2, 0), (*HEADS, IDS, 0.2, 100)],
  "attention.attention_of_part": [
    (array(2, 128, 4, 24), *HEADS[1:], (array(2, 128, dtype=jnp.int32), IDS), 0.2, 0, POSITIONS, array(dtype=jnp.int32))
  ],
  "grouped_matmul.grouped_matmul": [(array(256, 24), array(4, 24, 40), SIZES, 8)],
  "fp8_matmul.matmul": [
    (fp8((1, 128), 256, 200), fp8((128, 128), 136, 200), BF16), (fp8((1, 128), 136, 256), fp8((1, 128), 72, 256), F32)
  ],
  "fp8_grouped_matmul.matmul": [(fp8((1, 128), 256, 200), fp8((128, 128), 4, 136, 200), SIZES, 16, BF16)],
  "fp8_grouped_matmul.wgrad": [(fp8((1, 128), 72, 256), fp8((1, 128), 40, 256), SIZES, 16, F32)],
  "quantize.quantize": [(array(200, 256), (1, 128), False), (array(2, 256, 200), (128, 128), True)],
  "quantize.quantize_both": [(array(256, 200), 128, False)],
  "swiglu.swiglu_quantize": [(array(256, 200), array(256, 200), 128, False)],
}  # fmt: skip


def call(name, arguments, file="xla"):
  return Call(*name.split("."), file, arguments)


def outcome(call):
  case = Case(call, (call.key,))
  return check.check_case(case, check.compile_case(case, contextlib.nullcontext))


@pytest.mark.parametrize(("name", "arguments"), [(name, arguments) for name in CALLS for arguments in CALLS[name]])
def test_xla_s_form_passes_beside_itself(name, arguments, monkeypatch):
  monkeypatch.setattr(check, "seconds_per_call", lambda *_: 1.0)
  result = outcome(call(name, arguments))
  assert (result.verdict, result.message) == ("ok", "")
  assert result.error <= 1e-7
  assert result.rate == KERNEL_SPECS[name].work(*arguments) / check.UNITS[result.unit] > 0


def test_every_function_of_the_kernels_is_known():
  for name in KERNEL_SPECS:
    kernel, function = name.split(".")
    assert callable(getattr(importlib.import_module(f"deepseek_jax.kernels.{kernel}.xla"), function))
  assert set(CALLS) == set(KERNEL_SPECS)


PRODUCT = CALLS["fp8_matmul.matmul"][0]
FAULTS = {
  "a scale of one row in one tile": lambda y: y.at[130, :128].multiply(2),
  "a value": lambda y: y.at[100, 100].add(3 * jnp.abs(y).max().astype(y.dtype)),
  "rows in another order": lambda y: y[::-1],
  "a scale that is a hundredth too large": lambda y: (y * 1.01).astype(y.dtype),
}


def with_fault(monkeypatch, fault):
  """The outcome of a call whose file is "pallas_gpu", which is here XLA's implementation with a fault."""
  load = check.load_function

  def load_faulty(kernel, function, file):
    xla = load(kernel, function, "xla")
    return xla if file == "xla" else lambda *arguments: fault(xla(*arguments))

  monkeypatch.setattr(check, "load_function", load_faulty)
  return outcome(call("fp8_matmul.matmul", PRODUCT, "pallas_gpu"))


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_value_is_an_error(name, monkeypatch):
  result = with_fault(monkeypatch, FAULTS[name])
  assert result.verdict == "wrong" and result.error > result.bound == 2.0**-8 and "above 0.0039" in result.message


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_an_error(value, monkeypatch):
  result = with_fault(monkeypatch, lambda y: y.at[3, 5].set(value))
  assert (result.verdict, result.message) == ("wrong", "results are not finite")


def test_another_rounding_is_no_error(monkeypatch):
  """To the other neighbor in bfloat16 at one value of sixteen."""

  def fault(y):
    up = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(y, jnp.uint16) + 1, y.dtype)
    return jnp.where(jnp.arange(y.size).reshape(y.shape) % 16 == 0, up, y)

  monkeypatch.setattr(check, "seconds_per_call", lambda *_: 1.0)
  result = with_fault(monkeypatch, fault)
  assert result.verdict == "ok" and 1e-4 < result.error < result.bound


def test_an_exception_is_a_verdict(monkeypatch):
  def fault(y):
    raise KeyError("a mistake in the kernel")

  result = with_fault(monkeypatch, fault)
  assert (result.verdict, result.message) == ("failed", "KeyError: 'a mistake in the kernel'")


def test_a_kernel_whose_reference_fails_is_not_compared_but_run(monkeypatch):
  case = Case(call("fp8_matmul.matmul", PRODUCT), ())
  programs = dataclasses.replace(check.compile_case(case, contextlib.nullcontext), xla=MemoryError("too large"))
  result = check.check_case(case, programs)
  assert (result.verdict, result.message) == ("no reference", "XLA: MemoryError: too large")
  programs.kernel = lambda *arrays: jnp.full((4, 4), jnp.nan)
  assert check.check_case(case, programs).verdict == "wrong"


@pytest.mark.parametrize(
  ("ratios", "verdict"), [((1.05, None), "ok"), ((1.2, 1.0), "ok"), ((1.2, 1.2), "slow"), ((0.3, None), "ok")]
)
def test_a_kernel_is_slow_where_two_measurements_say_so(monkeypatch, ratios, verdict):
  times = iter(t for ratio in ratios for t in (ratio, 1.0))
  monkeypatch.setattr(check, "seconds_per_call", lambda *_: next(times))
  result = outcome(call("fp8_matmul.matmul", PRODUCT))
  assert result.verdict == verdict and (verdict == "ok" or result.message == "1.20 times as long as XLA")


def test_seconds_are_those_of_a_call():
  def call(x):
    time.sleep(0.01)
    return x

  assert 0.01 <= check.seconds_per_call(call, [(1,)], lambda x: x, 0.02, 2) < 0.05


def test_inputs_are_what_kernels_take():
  for name, every in CALLS.items():
    for arguments in every:
      for leaf in jax.tree.leaves(make_inputs(call(name, arguments)), is_leaf=lambda x: isinstance(x, QTensor)):
        if isinstance(leaf, QTensor):
          values = np.abs(leaf.values.astype(np.float32))
          assert (leaf.scales > 0).all() and values.max() > 224 and np.isfinite(values).all()
  a, b = draw_normal(array(512, 128)).astype(np.float32), draw_normal(array(128, 512)).astype(np.float32)
  assert np.unique(a, axis=0).shape == a.shape and np.unique(b, axis=0).shape == b.shape
  sizes = uneven_groups(8, 4096)
  assert sizes.sum() < 4096 and 0 in sizes and len(set(sizes)) > 4 and not (sizes % 8).any()


def test_large_shapes_are_cut_and_equal_ones_tested_once():
  """Rows of tokens are cut, widths are not; quantization is tested at the largest, with and without partial tiles."""
  wide = [
    call("fp8_matmul.matmul", (fp8((1, 128), rows, 7168), fp8((128, 128), 576, 7168), BF16))
    for rows in (65_536, 16_384)
  ]
  wgrad = call("fp8_matmul.matmul", (fp8((1, 128), 576, 65_536), fp8((1, 128), 7168, 65_536), BF16))
  grouped = call(
    "fp8_grouped_matmul.matmul",
    (fp8((1, 128), 131_200, 512), fp8((128, 128), 32, 256, 512), array(32, dtype=jnp.int32), 128, BF16),
  )
  long = call(
    "attention.attention",
    (array(4, 131_072, 128, 192), array(4, 131_072, 8, 192), array(4, 131_072, 8, 128), None, 0.1, 0),
  )
  rounding = [
    call("quantize.quantize", (array(rows, width), (1, 128), False))
    for rows, width in ((8192, 7168), (8192, 1536), (65_536, 576))
  ]
  cases = {case.key: case for case in make_cases([*wide, wgrad, grouped, long, *rounding])}
  assert len(cases) == 6

  def shapes(name, count):
    return [tuple(x.shape for x in case.call.arguments[:count]) for case in cases.values() if case.name == name]

  assert shapes("fp8_matmul.matmul", 2) == [((MAX_ROWS, 7168), (576, 7168)), ((576, MAX_ROWS), (7168, MAX_ROWS))]
  assert shapes("fp8_grouped_matmul.matmul", 2) == [((MAX_ROWS, 512), (MAX_GROUPS, 256, 512))]
  assert shapes("attention.attention", 1) == [((1, 4096, 16, 192),)]
  assert shapes("quantize.quantize", 1) == [((8192, 7168),), ((MAX_ROWS, 576),)]
  assert sorted(len(case.covers) for case in cases.values()) == [1, 1, 1, 1, 2, 2]


@pytest.mark.parametrize(
  ("device", "platform", "expected"),
  [
    ("TPU v6 lite", "tpu", {"attention.attention_of_part", "grouped_matmul.grouped_matmul"}),
    ("TPU v5", "tpu", {"attention.attention_of_part"}),
    ("NVIDIA A100-SXM4-80GB", "gpu", set()),
  ],
)
def test_the_cases_are_those_of_the_config_s_own_step(device, platform, expected):
  """At the shapes that a device of the mesh has: two sequences of 4096 positions, of which it holds half."""
  config = load_config("configs/v2_lite.py", {"mesh.context": 2, "train.microbatch": 4, "mesh.fsdp": 2, "mesh.data": 1})
  config = resolve_mesh(config, min_devices(config.mesh))
  calls = program_calls(config, jax.sharding.AbstractDevice(device, 1, platform))
  assert {c.name for c in calls} == expected
  for c in calls:
    if c.kernel == "attention":
      assert c.arguments[0].shape == (2, 2048, 16, 192) and c.arguments[1].shape == (2, 4096, 16, 192)
