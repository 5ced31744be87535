"""`deepseek_jax.train` under what no config says:  python -m benchmarks.fp8_controls --outliers --per_tensor --config=FILE

--outliers: in what the blocks' norms give to FP8 GEMMs, OUTLIERS channels are 2^EXPONENT times as large, and the
  rows of the weights that meet them as much smaller. Powers of two are exact: in exact products the function and its
  gradients are the same bits. Factors of norm and weights, as a model may grow them, would do the same, but for Adam, whose
  steps have one size whatever the factor: here it sees the parameters without it.
--per_tensor: operands of products have one scale a matrix (of experts: each its own) instead of one a tile.

The other flags are those of `deepseek_jax.train`. Below them, what the two and what few bits in sums do to one product.
"""

import functools

from absl import flags

from deepseek_jax import train
from deepseek_jax.flags import define_config_flags, load_config, parse, run_program

OUTLIERS, EXPONENT = 2, 16  # e4m3fn has 18 powers of two: fewer than 2^13 would cost nothing, as `outlier_errors` shows
INSTRUCTION = 32  # terms of e4m3fn that Hopper's tensor cores add in one go


def main(argv) -> int:
  values = flags.FlagValues()
  define_config_flags(values)
  flags.DEFINE_string("workdir", None, "as of deepseek_jax.train", flag_values=values)
  flags.DEFINE_boolean("outliers", False, "channels of great magnitude", flag_values=values)
  flags.DEFINE_boolean("per_tensor", False, "one scale a matrix", flag_values=values)
  overrides = parse(argv, values, __doc__)
  if values.outliers:
    add_outliers(load_config(values.config, overrides).model.embed)
  if values.per_tensor:
    scale_per_tensor()
  settings = (f"--config.{path}={value}" for path, value in overrides.items())
  return train.main([argv[0], f"--config={values.config}", f"--workdir={values.workdir}", *settings])


def add_outliers(embed):
  """From now on all models of this process have outliers in what is `embed` wide."""
  from deepseek_jax.model import linear

  for name in ("fp8_linear", "fp8_ragged_linear"):
    setattr(linear, name, functools.partial(with_outliers, getattr(linear, name), embed))


def with_outliers(product, embed, x, *weights, **settings):
  """`product` of the same operands, in exact arithmetic, some of whose channels are large in `x` and small in `weights`."""
  if not isinstance(x, tuple) and x.shape[-1] == embed:  # a pair is what a SwiGLU is made of, and no norm's
    factors = outlier_factors(embed)
    # Multiplied, since an inverse is exact as well.
    x, weights = x * factors.astype(x.dtype), [w * (1 / factors)[:, None].astype(w.dtype) for w in weights]
  return product(x, *weights, **settings)


def outlier_factors(embed, exponent=EXPONENT):
  """[embed]: 2^exponent for the first OUTLIERS channels, which are in one tile, 1 for the others."""
  import jax.numpy as jnp

  return jnp.ones(embed).at[:OUTLIERS].set(2.0**exponent)


def scale_per_tensor():
  """From now on the quantisation of this process, in XLA's implementation, has one scale a matrix."""
  from deepseek_jax.kernels.quantize import xla

  xla.quantize = quantize_per_tensor


def quantize_per_tensor(x, tile, pow2_scales):
  """As `quantize`, the scale of each tile being that of the whole matrix."""
  import jax.numpy as jnp

  from deepseek_jax.kernels.qtensor import FP8, QTensor, greatest_of, scales_of, tiles_of

  scales = scales_of(greatest_of(x.astype(jnp.float32), (-2, -1)), pow2_scales)[..., None, None]
  of_tiles = jnp.broadcast_to(scales, (*x.shape[:-2], *tiles_of(x.shape, tile)))
  return QTensor((x / scales).astype(FP8), of_tiles, tile)


def outlier_errors(exponents, rows=1024, embed=512, columns=256):
  """{what has a scale: [(exponent, error)]} of x w, N(0, 1) each, with outliers of 2^exponent: |y - x w| / |x w|."""
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


def accumulation_errors(lengths, bits=14, size=64):
  """{name of an accumulation: [(k, error)]} of products of length k, in registers of `bits` that drop what does not fit.

  Operands are N(0, 1) as e4m3fn; the error is that of the sum alone, |y - exact| / |exact| over [size, size] results.
  `bits` is what the V3 report (section 3.5.2) found of Hopper's; this emulation of it adds the terms of an instruction
  exactly and then truncates the register, which no hardware was here to confirm.
  """
  import ml_dtypes
  import numpy as np

  rng, found = np.random.default_rng(0), {"no promotion": [], "promotion every 128": []}
  for k in lengths:
    a, b = (rng.standard_normal((size, k)).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) for _ in range(2))
    exact = a @ b.T
    for errors, promoted in zip(found.values(), (k, 128), strict=True):
      y = np.zeros((size, size), np.float32)
      for start in range(0, k, promoted):
        register = np.zeros((size, size))
        for first in range(start, start + promoted, INSTRUCTION):
          terms = slice(first, first + INSTRUCTION)
          register = truncated(register + a[:, terms] @ b[:, terms].T, bits)
        y += register.astype(np.float32)
      errors.append((k, float(np.linalg.norm(y - exact) / np.linalg.norm(exact))))
  return found


def truncated(x, bits):
  """`x`, float64, in `bits` significant bits, towards zero."""
  import numpy as np

  mantissa, exponent = np.frexp(x)
  return np.ldexp(np.trunc(np.ldexp(mantissa, bits)), exponent - bits)


if __name__ == "__main__":
  run_program(main)
