"""Trains with outlier channels or per-tensor scales:

  python -m benchmarks.fp8_controls --outliers --per_tensor --config=FILE

--outliers: scales NUM_OUTLIERS channels of the FP8 GEMMs' inputs, after the blocks' norms, by 2^EXPONENT, and the
  matching rows of the weights by its inverse. Powers of two are exact, so without FP8 the function and its gradients
  stay bitwise the same. Unlike outliers that a model learns, the factors are not in the parameters: Adam's step size
  does not depend on them.
--per_tensor: one scale per matrix (per expert, for experts) instead of one per tile.

The other flags are those of `deepseek_jax.train`. This module also measures the error of a single GEMM with outliers,
and with limited accumulation precision.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from deepseek_jax import train
from deepseek_jax.flags import define_config_flags, load_config, parse, run_program

if TYPE_CHECKING:  # imported after the flags are parsed
  import jax
  import numpy as np

  from deepseek_jax.kernels.qtensor import QTensor

# e4m3fn spans 18 powers of two: below 2^13 outliers cost nothing, as `outlier_errors` shows.
NUM_OUTLIERS, EXPONENT = 2, 16
INSTRUCTION_TERMS = 32  # e4m3fn terms that an instruction of Hopper's tensor cores adds


def main(argv: list[str]) -> int:
  values = flags.FlagValues()
  define_config_flags(values)
  flags.DEFINE_string("workdir", None, "as of deepseek_jax.train", flag_values=values)
  flags.DEFINE_boolean("outliers", False, "scale some input channels of FP8 GEMMs", flag_values=values)
  flags.DEFINE_boolean("per_tensor", False, "one scale per matrix", flag_values=values)
  overrides = parse(argv, values, __doc__)
  if values.outliers:
    add_outliers(load_config(values.config, overrides).model.embed)
  if values.per_tensor:
    scale_per_tensor()
  config_flags = (f"--config.{path}={value}" for path, value in overrides.items())
  return train.main([argv[0], f"--config={values.config}", f"--workdir={values.workdir}", *config_flags])


def add_outliers(embed: int) -> None:
  """Patches the FP8 linear functions of this process: inputs of width `embed` have outliers."""
  from deepseek_jax.model import linear

  for name in ("fp8_linear", "fp8_ragged_linear"):
    setattr(linear, name, functools.partial(with_outliers, getattr(linear, name), embed))


def with_outliers(linear: Callable, embed: int, x: Any, *weights: jax.Array, **options: Any) -> Any:
  """Calls `linear` with some channels scaled up in `x` and down in `weights`: the same function in exact arithmetic."""
  if not isinstance(x, tuple) and x.shape[-1] == embed:  # a pair (gate, up) does not come from a norm
    factors = outlier_factors(embed)
    # The inverse of a power of two is exact as well.
    x, weights = x * factors.astype(x.dtype), [w * (1 / factors)[:, None].astype(w.dtype) for w in weights]
  return linear(x, *weights, **options)


def outlier_factors(embed: int, exponent: int = EXPONENT) -> jax.Array:
  """[embed]: 2^exponent for the first NUM_OUTLIERS channels, which are in one tile, 1 for the others."""
  import jax.numpy as jnp

  return jnp.ones(embed).at[:NUM_OUTLIERS].set(2.0**exponent)


def scale_per_tensor() -> None:
  """Patches the XLA quantization of this process: one scale per matrix."""
  from deepseek_jax.kernels.quantize import xla

  xla.quantize = quantize_per_tensor


def quantize_per_tensor(x: jax.Array, tile: tuple[int, int], pow2_scales: bool) -> QTensor:
  """As `quantize`, but with the same scale for all tiles of a matrix."""
  import jax.numpy as jnp

  from deepseek_jax.kernels.qtensor import FP8, QTensor, compute_absmax, compute_scales, tile_counts

  scales = compute_scales(compute_absmax(x.astype(jnp.float32), (-2, -1)), pow2_scales)[..., None, None]
  tile_scales = jnp.broadcast_to(scales, (*x.shape[:-2], *tile_counts(x.shape, tile)))
  return QTensor((x / scales).astype(FP8), tile_scales, tile)


def outlier_errors(
  exponents: Sequence[int], rows: int = 1024, embed: int = 512, columns: int = 256
) -> dict[str, list[tuple[int, float]]]:
  """{what a scale is for: [(exponent, error)]} of an FP8 GEMM x w with outliers of 2^exponent.

  Operands are N(0, 1). The error is |y - x w| / |x w|.
  """
  import jax
  import jax.numpy as jnp

  from deepseek_jax.kernels.fp8_matmul.api import fp8_matmul
  from deepseek_jax.kernels.quantize import xla

  x, w = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(((rows, embed), (embed, columns))))
  exact = jnp.matmul(x, w, precision="highest")

  @functools.partial(jax.jit, static_argnums=0)
  def error(quantize, factors):
    y = fp8_matmul(quantize(x * factors, (1, 128), False), quantize(w / factors[:, None], (128, 128), False).T)
    return jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact)

  return {
    name: [(exponent, float(error(quantize, outlier_factors(embed, exponent)))) for exponent in exponents]
    for name, quantize in (("a tile", xla.quantize), ("a matrix", quantize_per_tensor))
  }


def accumulation_errors(lengths: Sequence[int], bits: int = 14, size: int = 64) -> dict[str, list[tuple[int, float]]]:
  """{accumulation: [(k, error)]} of FP8 dot products of length k, accumulated with `bits` significant bits.

  Operands are N(0, 1) as e4m3fn. The error is that of the sum alone: |y - exact| / |exact| over [size, size] results.
  The default of `bits` is what the V3 report (section 3.5.2) found of Hopper. This emulation adds the terms of an
  instruction exactly and then truncates the register. It was not compared with hardware.
  """
  import ml_dtypes
  import numpy as np

  rng = np.random.default_rng(0)
  errors: dict[str, list[tuple[int, float]]] = {"no promotion": [], "promotion every 128": []}
  for k in lengths:
    a, b = (rng.standard_normal((size, k)).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) for _ in range(2))
    exact = a @ b.T
    for curve, promotion_interval in zip(errors.values(), (k, 128), strict=True):
      y = np.zeros((size, size), np.float32)
      for start in range(0, k, promotion_interval):
        register = np.zeros((size, size))
        for first in range(start, start + promotion_interval, INSTRUCTION_TERMS):
          terms = slice(first, first + INSTRUCTION_TERMS)
          register = truncate(register + a[:, terms] @ b[:, terms].T, bits)
        y += register.astype(np.float32)
      curve.append((k, float(np.linalg.norm(y - exact) / np.linalg.norm(exact))))
  return errors


def truncate(x: np.ndarray, bits: int) -> np.ndarray:
  """`x`, float64, rounded toward zero to `bits` significant bits."""
  import numpy as np

  mantissa, exponent = np.frexp(x)
  return np.ldexp(np.trunc(np.ldexp(mantissa, bits)), exponent - bits)


if __name__ == "__main__":
  run_program(main)
