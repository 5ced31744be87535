"""FLOP/s and bandwidth of the FP8 kernels on one GPU:  python -m benchmarks.fp8_matmul

Data are random normal, in enough copies that no operand is in the L2 cache. A time is the best of three rounds of calls
back to back. Beside each FP8 GEMM are a bfloat16 GEMM and, if torch is installed, torch's FP8 GEMM with one scale per
matrix, on the same GPU in the same run. The error of a GEMM is relative to the same operands in float32, on the first
128 rows. The error of quantization is the share of bytes that differ from XLA's.

--json=FILE saves the rows. The same command continues with those that are missing, and tries failed ones once more.
After --seconds no row starts. A row that takes longer than --row_seconds has failed. Exit codes: 0; 1 if a row failed;
3 if rows remain. --small: sizes of a test, on any platform.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from benchmarks.timing import CACHE_BYTES, Calls, Row, copies_beyond_l2, random_normal, run_table, torch_on_gpu
from deepseek_jax.flags import run_program

if TYPE_CHECKING:  # jax is imported after the flags are parsed
  import jax

  from deepseek_jax.kernels.qtensor import QTensor

# {(m, n, k): (goal, floor)} in TFLOP/s on an H200.
DENSE = {
  (4096, 7168, 16384): (1400, 1100), (4096, 4096, 7168): (1300, 1000), (4096, 7168, 2048): (1100, 800),
  (4096, 24576, 1536): (None, None), (4096, 2112, 7168): (None, None), (4096, 32768, 512): (None, None),
}  # fmt: skip
GROUPED = {(8, 4096, 4096, 7168): (1250, 950), (8, 4096, 7168, 2048): (None, None)}  # (groups, rows of each, n, k)
WGRAD = {(7168, 4096, 8192): (950, 700)}  # k is the number of tokens
QUANTIZE = {(8192, 7168): (0.8 * 4300, 0.6 * 4300)}  # (rows, k), GB/s
# Forward and backward pass of a linear layer, as a ratio to bfloat16.
LAYER = {(4096, 7168, 16384): (1.5, 1.25), (4096, 4096, 7168): (1.5, 1.25), (4096, 7168, 2048): (1.5, 1.25)}


def main(argv: list[str]) -> int:
  return run_table(argv, __doc__, make_rows, ("bf16", "torch", "goal", "floor"))


def make_rows(implementation: str, small: bool) -> Iterator[Row]:
  """The rows of the tables above, or with `small` one of each table, at small sizes without goals."""

  def sizes_of(table):
    for sizes, (goal, floor) in list(table.items())[: 1 if small else None]:
      yield (tuple(min(n, 128) for n in sizes), (None, None)) if small else (sizes, (goal, floor))

  for (m, n, k), goals in sizes_of(DENSE):
    make_calls = functools.partial(dense_calls, m, n, k, implementation)
    yield Row(f"forward or dgrad {m} x {n} x {k}", 2 * m * n * k, "TFLOP/s", *goals, make_calls, gemm_error)
  for (groups, m, n, k), goals in sizes_of(GROUPED):
    work, name = 2 * groups * m * n * k, f"{groups} x {m} x {n} x {k}"
    make_calls = functools.partial(grouped_calls, groups, m, n, k, implementation)
    first_error = lambda y, a, b, _: gemm_error(y, a, b[0])
    yield Row(f"grouped {name}", work, "TFLOP/s", *goals, make_calls, first_error)
    make_calls = functools.partial(grouped_wgrad_calls, groups, m, n, k, implementation)
    first_error = lambda dw, a, b, sizes, m=m: gemm_error(dw[0], first_columns(a, m), first_columns(b, m))
    yield Row(f"grouped wgrad {name}", work, "TFLOP/s", None, None, make_calls, first_error)
  for (m, n, k), goals in sizes_of(WGRAD):
    make_calls = functools.partial(dense_calls, m, n, k, implementation, wgrad=True)
    yield Row(f"wgrad {m} x {n} x {k}", 2 * m * n * k, "TFLOP/s", *goals, make_calls, gemm_error)
  for (m, k), goals in sizes_of(QUANTIZE):
    written_bytes = 2 * (1 + 4 / 128)  # per element: two FP8 copies with a float32 scale every 128
    make_calls = functools.partial(quantize_calls, m, k, implementation)
    error = functools.partial(differing_bytes, "quantize_both")
    yield Row(f"quantize both ways {m} x {k}", m * k * (2 + written_bytes), "GB/s", *goals, make_calls, error)
    make_calls = functools.partial(swiglu_calls, m, k, implementation)
    error = functools.partial(differing_bytes, "swiglu_quantize")
    yield Row(f"SwiGLU both ways {m} x {k}", m * k * (4 + written_bytes), "GB/s", None, None, make_calls, error)
  for (m, n, k), goals in sizes_of(LAYER):
    make_calls = functools.partial(layer_calls, m, n, k, implementation)
    yield Row(f"linear layer {m} x {n} x {k}", 1, "times bf16", *goals, make_calls)


def quantize_xla(x: jax.Array, tile: tuple[int, int]) -> QTensor:
  """`x` in FP8 with a scale for each tile."""
  from deepseek_jax.kernels.quantize.api import quantize

  return quantize(x, tile, implementation="xla")


def dense_calls(m: int, n: int, k: int, implementation: str, wgrad: bool = False) -> Calls:
  """GEMMs y = a b^T of a [m, k] and b [n, k]. `wgrad`: both operands have 1 x 128 tiles, and the result is float32."""
  import jax.numpy as jnp

  from deepseek_jax.kernels.fp8_matmul.api import fp8_matmul

  a, b, out = random_normal(m, k), random_normal(n, k, seed=1), jnp.float32 if wgrad else jnp.bfloat16
  calls: Calls = {
    "ours": (
      lambda a, b: fp8_matmul(a, b, out_dtype=out, implementation=implementation),
      copies_beyond_l2(quantize_xla(a, (1, 128)), quantize_xla(b, (1, 128) if wgrad else (128, 128))),
    ),
    "bf16": (lambda a, b: jnp.einsum("mk,nk->mn", a, b, preferred_element_type=out), copies_beyond_l2(a, b)),
  }
  return calls | torch_calls(m, n, k, wgrad)


def gemm_error(y: jax.Array, a: QTensor, b: QTensor) -> jax.Array:
  """Relative error of the first 128 rows of y = a b^T."""
  import jax
  import jax.numpy as jnp

  first = dataclasses.replace(a, values=a.values[:128], scales=a.scales[:128])
  exact = jnp.dot(first.dequantize(), b.dequantize().T, precision=jax.lax.Precision.HIGHEST)
  return jnp.linalg.norm(y[:128].astype(jnp.float32) - exact) / jnp.linalg.norm(exact)


def first_columns(q: QTensor, count: int) -> QTensor:
  """The first `count` columns, a multiple of the tile's width."""
  return dataclasses.replace(q, values=q.values[:, :count], scales=q.scales[:, : count // q.tile[1]])


def differing_bytes(function: str, ours: tuple[QTensor, ...], *arguments: jax.Array) -> jax.Array:
  """The share of bytes that differ from XLA's."""
  import jax
  import jax.numpy as jnp

  from deepseek_jax.kernels.quantize import xla as quantizers
  from deepseek_jax.kernels.swiglu import xla as swiglu

  module = swiglu if function == "swiglu_quantize" else quantizers
  reference = getattr(module, function)(*arguments, 128, False)
  as_bytes = lambda q: jax.lax.bitcast_convert_type(q.values, jnp.uint8)
  return jnp.mean(jnp.stack([jnp.mean(as_bytes(a) != as_bytes(b)) for a, b in zip(ours, reference, strict=True)]))


def torch_calls(m: int, n: int, k: int, wgrad: bool) -> Calls:
  """torch's FP8 GEMM with one scale per matrix. Empty without torch or a GPU for it."""
  torch = torch_on_gpu()
  if torch is None:
    return {}
  operand = lambda *shape: torch.randn(*shape, device="cuda").to(torch.float8_e4m3fn)
  one, dtype = torch.ones((), device="cuda"), torch.float32 if wgrad else torch.bfloat16
  count = min(CACHE_BYTES // ((m + n) * k), 8) + 1
  arguments = [(operand(m, k), operand(n, k).t()) for _ in range(count)]
  return {"torch": (lambda a, b: torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=dtype), arguments)}


def grouped_calls(groups: int, m: int, n: int, k: int, implementation: str) -> Calls:
  """Grouped GEMMs of [m, k] and [k, n] in each group."""
  import jax
  import jax.numpy as jnp

  from deepseek_jax.kernels.fp8_grouped_matmul.api import fp8_grouped_matmul

  x, w, sizes = random_normal(groups * m, k), random_normal(groups, n, k, seed=1), jnp.full((groups,), m, jnp.int32)
  ours = lambda a, b, sizes: fp8_grouped_matmul(a, b, sizes, out_dtype=jnp.bfloat16, implementation=implementation)
  return {
    "ours": (ours, copies_beyond_l2(quantize_xla(x, (1, 128)), quantize_xla(w, (128, 128)), sizes)),
    "bf16": (lambda x, w, sizes: jax.lax.ragged_dot(x, w, sizes), copies_beyond_l2(x, w.mT, sizes)),
  }


def grouped_wgrad_calls(groups: int, m: int, n: int, k: int, implementation: str) -> Calls:
  """Weight gradients of a grouped GEMM: [k, m] and [m, n] in each group."""
  import jax.numpy as jnp

  from deepseek_jax.kernels.fp8_grouped_matmul.api import fp8_grouped_wgrad

  a, b, sizes = random_normal(k, groups * m), random_normal(n, groups * m, seed=1), jnp.full((groups,), m, jnp.int32)
  ours = lambda a, b, sizes: fp8_grouped_wgrad(a, b, sizes, implementation=implementation)
  return {"ours": (ours, copies_beyond_l2(quantize_xla(a, (1, 128)), quantize_xla(b, (1, 128)), sizes))}


def quantize_calls(m: int, k: int, implementation: str) -> Calls:
  """Quantization of [m, k] along rows and along columns."""
  from deepseek_jax.kernels.quantize.api import quantize_both

  return {
    "ours": (lambda x: quantize_both(x, 128, implementation=implementation), copies_beyond_l2(random_normal(m, k)))
  }


def swiglu_calls(m: int, k: int, implementation: str) -> Calls:
  """SwiGLU of two [m, k], quantized along rows and along columns."""
  from deepseek_jax.kernels.swiglu.api import swiglu_quantize

  ours = lambda gate, up: swiglu_quantize(gate, up, 128, implementation=implementation)
  return {"ours": (ours, copies_beyond_l2(random_normal(m, k), random_normal(m, k, seed=1)))}


def layer_calls(m: int, n: int, k: int, implementation: str) -> Calls:
  """Forward and backward pass of a linear layer: three GEMMs, and in FP8 the quantization of x, w and dy."""
  import jax

  from deepseek_jax.kernels.fp8_linear import Recipe, fp8_linear

  def with_backward(forward):
    def forward_and_backward(x, w, dy):
      y, vjp = jax.vjp(forward, x, w)
      return y, vjp(dy)

    return forward_and_backward

  recipe = Recipe(implementation=implementation)
  arguments = copies_beyond_l2(random_normal(m, k), random_normal(k, n, seed=1), random_normal(m, n, seed=2))
  return {
    "ours": (with_backward(lambda x, w: fp8_linear(x, w, recipe=recipe)[0]), arguments),
    "bf16": (with_backward(lambda x, w: x @ w), arguments),
  }


if __name__ == "__main__":
  run_program(main)
