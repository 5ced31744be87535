"""What eight-bit kernels reach on one GPU:  python -m benchmarks.fp8_matmul

Random normal data, and enough copies of it that no operand waits in the L2 cache. A time is the best of three rounds of calls
back to back. Beside each product stand bfloat16's and, where torch is importable, its fp8 product with one scale a matrix, on
the same card in the same run. Errors of products are those against the same operands in float32, of the first 128 rows; of
quantisers, the share of bytes that are not XLA's.

--json=FILE keeps the rows: the same command goes on with those that are missing, and tries those that failed once more. What
is not reached in --seconds is left out, and said; a row that takes longer than --row_seconds has failed. Exit codes: 0; 1 if
a row failed; 3 if rows are left. --small: sizes of a test, on any platform.
"""

import dataclasses
import functools

from benchmarks.timing import CACHE_BYTES, Row, copies, normal, run_table, torch_on_gpu
from deepseek_jax.flags import run_program

# TFLOP/s on an H200: what would be well done, and the least that is accepted.
DENSE = {
  (4096, 7168, 16384): (1400, 1100), (4096, 4096, 7168): (1300, 1000), (4096, 7168, 2048): (1100, 800),
  (4096, 24576, 1536): (None, None), (4096, 2112, 7168): (None, None), (4096, 32768, 512): (None, None),
}  # fmt: skip
GROUPED = {(8, 4096, 4096, 7168): (1250, 950), (8, 4096, 7168, 2048): (None, None)}  # groups, rows of each, n, k
WGRAD = {(7168, 4096, 8192): (950, 700)}  # k is of tokens
QUANTIZE = {(8192, 7168): (0.8 * 4300, 0.6 * 4300)}  # GB/s
WHOLE = {(4096, 7168, 16384): (1.5, 1.25), (4096, 4096, 7168): (1.5, 1.25), (4096, 7168, 2048): (1.5, 1.25)}


def main(argv) -> int:
  return run_table(argv, __doc__, rows, ("bf16", "torch", "goal", "floor"))


def rows(implementation, small):
  """Every row of the tables above, or with `small` one a table, of no sizes that have goals."""

  def of(table):
    for sizes, marks in list(table.items())[: 1 if small else None]:
      yield (tuple(min(n, 128) for n in sizes), (None, None)) if small else (sizes, marks)

  for (m, n, k), marks in of(DENSE):
    make = functools.partial(dense, m, n, k, implementation)
    yield Row(f"forward or dgrad {m} x {n} x {k}", 2 * m * n * k, "TFLOP/s", *marks, make, product_error)
  for (groups, m, n, k), marks in of(GROUPED):
    work, name = 2 * groups * m * n * k, f"{groups} x {m} x {n} x {k}"
    make = functools.partial(grouped, groups, m, n, k, implementation)
    yield Row(f"grouped {name}", work, "TFLOP/s", *marks, make, lambda y, a, b, _: product_error(y, a, b[0]))
    make = functools.partial(grouped_wgrad, groups, m, n, k, implementation)
    of_first = lambda dw, a, b, sizes, m=m: product_error(dw[0], columns(a, m), columns(b, m))
    yield Row(f"grouped wgrad {name}", work, "TFLOP/s", None, None, make, of_first)
  for (m, n, k), marks in of(WGRAD):
    make = functools.partial(dense, m, n, k, implementation, wgrad=True)
    yield Row(f"wgrad {m} x {n} x {k}", 2 * m * n * k, "TFLOP/s", *marks, make, product_error)
  for (m, k), marks in of(QUANTIZE):
    written = 2 * (1 + 4 / 128)
    make = functools.partial(quantized, m, k, implementation)
    yield Row(
      f"quantise both ways {m} x {k}",
      m * k * (2 + written),
      "GB/s",
      *marks,
      make,
      functools.partial(differing, "quantize_both"),
    )
    make, error = functools.partial(activated, m, k, implementation), functools.partial(differing, "swiglu_quantize")
    yield Row(f"SwiGLU both ways {m} x {k}", m * k * (4 + written), "GB/s", None, None, make, error)
  for (m, n, k), marks in of(WHOLE):
    make = functools.partial(layer, m, n, k, implementation)
    yield Row(f"a layer's training {m} x {n} x {k}", 1, "times bf16", *marks, make)


def as_tiles(x, tile):
  from deepseek_jax.kernels.quantize.api import quantize

  return quantize(x, tile, implementation="xla")


def dense(m, n, k, implementation, wgrad=False):
  import jax.numpy as jnp

  from deepseek_jax.kernels.fp8_matmul.api import fp8_matmul

  a, b, out = normal(m, k), normal(n, k, seed=1), jnp.float32 if wgrad else jnp.bfloat16
  found = {
    "ours": (
      lambda a, b: fp8_matmul(a, b, out_dtype=out, implementation=implementation),
      copies(as_tiles(a, (1, 128)), as_tiles(b, (1, 128) if wgrad else (128, 128))),
    ),
    "bf16": (lambda a, b: jnp.einsum("mk,nk->mn", a, b, preferred_element_type=out), copies(a, b)),
  }
  return found | torch_product(m, n, k, wgrad)


def product_error(y, a, b):
  """Relative, of the first rows of a product of `a` and `b`."""
  import jax
  import jax.numpy as jnp

  first = dataclasses.replace(a, values=a.values[:128], scales=a.scales[:128])
  exact = jnp.dot(first.dequantized(), b.dequantized().T, precision=jax.lax.Precision.HIGHEST)
  return jnp.linalg.norm(y[:128].astype(jnp.float32) - exact) / jnp.linalg.norm(exact)


def columns(q, count):
  """The first `count` of an FP8 tensor, of whole tiles."""
  return dataclasses.replace(q, values=q.values[:, :count], scales=q.scales[:, : count // q.tile[1]])


def differing(function, ours, *arguments):
  """The share of bytes that differ from XLA's."""
  import jax
  import jax.numpy as jnp

  from deepseek_jax.kernels.quantize import xla as quantizers
  from deepseek_jax.kernels.swiglu import xla as swiglu

  module = swiglu if function == "swiglu_quantize" else quantizers
  theirs = getattr(module, function)(*arguments, 128, False)
  bits = lambda q: jax.lax.bitcast_convert_type(q.values, jnp.uint8)
  return jnp.mean(jnp.stack([jnp.mean(bits(a) != bits(b)) for a, b in zip(ours, theirs, strict=True)]))


def torch_product(m, n, k, wgrad):
  """torch's product with one scale a matrix, where torch and its GPU are at hand."""
  torch = torch_on_gpu()
  if torch is None:
    return {}
  make = lambda *shape: torch.randn(*shape, device="cuda").to(torch.float8_e4m3fn)
  one, dtype = torch.ones((), device="cuda"), torch.float32 if wgrad else torch.bfloat16
  count = min(CACHE_BYTES // ((m + n) * k), 8) + 1
  arguments = [(make(m, k), make(n, k).t()) for _ in range(count)]
  return {"torch": (lambda a, b: torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=dtype), arguments)}


def grouped(groups, m, n, k, implementation):
  import jax
  import jax.numpy as jnp

  from deepseek_jax.kernels.fp8_grouped_matmul.api import fp8_grouped_matmul

  x, w, sizes = normal(groups * m, k), normal(groups, n, k, seed=1), jnp.full((groups,), m, jnp.int32)
  ours = lambda a, b, sizes: fp8_grouped_matmul(a, b, sizes, out_dtype=jnp.bfloat16, implementation=implementation)
  return {
    "ours": (ours, copies(as_tiles(x, (1, 128)), as_tiles(w, (128, 128)), sizes)),
    "bf16": (lambda x, w, sizes: jax.lax.ragged_dot(x, w, sizes), copies(x, w.mT, sizes)),
  }


def grouped_wgrad(groups, m, n, k, implementation):
  import jax.numpy as jnp

  from deepseek_jax.kernels.fp8_grouped_matmul.api import fp8_grouped_wgrad

  a, b, sizes = normal(k, groups * m), normal(n, groups * m, seed=1), jnp.full((groups,), m, jnp.int32)
  ours = lambda a, b, sizes: fp8_grouped_wgrad(a, b, sizes, implementation=implementation)
  return {"ours": (ours, copies(as_tiles(a, (1, 128)), as_tiles(b, (1, 128)), sizes))}


def quantized(m, k, implementation):
  from deepseek_jax.kernels.quantize.api import quantize_both

  return {"ours": (lambda x: quantize_both(x, 128, implementation=implementation), copies(normal(m, k)))}


def activated(m, k, implementation):
  from deepseek_jax.kernels.swiglu.api import swiglu_quantize

  ours = lambda gate, up: swiglu_quantize(gate, up, 128, implementation=implementation)
  return {"ours": (ours, copies(normal(m, k), normal(m, k, seed=1)))}


def layer(m, n, k, implementation):
  """Forward and backward of one: three products, and with ours the quantisers of x, w and dy."""
  import jax

  from deepseek_jax.kernels.fp8_linear import Recipe, fp8_linear

  def trained(forward):
    def both(x, w, dy):
      y, pull = jax.vjp(forward, x, w)
      return y, pull(dy)

    return both

  recipe = Recipe(implementation=implementation)
  arguments = copies(normal(m, k), normal(k, n, seed=1), normal(m, n, seed=2))
  return {
    "ours": (trained(lambda x, w: fp8_linear(x, w, recipe=recipe)[0]), arguments),
    "bf16": (trained(lambda x, w: x @ w), arguments),
  }


if __name__ == "__main__":
  run_program(main)
