"""QTensor: an FP8 matrix with a scale a tile, the operand of DeepSeek-V3's FP8 GEMMs (V3 report, section 3.3)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

FP8 = jnp.float8_e4m3fn  # the report's one format, also of gradients: fine tiles make up for its short exponent
FP8_MAX = 448.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor:
  """values * scales, a scale a tile: `values` [..., rows, columns], `scales` [..., tiles down, tiles across] float32.

  tile: (rows, columns) of a tile. Tiles start at row and column 0; those at the far edges are partial.
  """

  values: jax.Array
  scales: jax.Array
  tile: tuple[int, int] = dataclasses.field(metadata={"static": True})

  @property
  def shape(self) -> tuple[int, ...]:
    return self.values.shape

  @property
  def T(self) -> "QTensor":
    """The transpose of the last two dimensions."""
    rows, columns = self.tile
    return QTensor(self.values.mT, self.scales.mT, (columns, rows))

  def __getitem__(self, index: Any) -> "QTensor":
    """The matrix at `index` of the leading dimension."""
    return QTensor(self.values[index], self.scales[index], self.tile)

  def dequantize(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """[..., rows, columns] in `dtype`."""
    return self.values.astype(dtype) * self.broadcast_scales().astype(dtype)

  def broadcast_scales(self) -> jax.Array:
    """The scale of every element, [..., rows, columns]."""
    scales = jnp.repeat(jnp.repeat(self.scales, self.tile[0], -2), self.tile[1], -1)
    return scales[..., : self.shape[-2], : self.shape[-1]]


def with_unit_scales(x: jax.Array, tile: tuple[int, int]) -> QTensor:
  """`x` in its own dtype as a QTensor whose scales are 1: an operand of the same GEMMs that is not quantized."""
  return QTensor(x, jnp.ones((*x.shape[:-2], *tile_counts(x.shape, tile)), jnp.float32), tile)


def tile_counts(shape: tuple[int, ...], tile: tuple[int, int]) -> tuple[int, int]:
  """(tiles down, tiles across) of the last two dimensions of `shape`."""
  return -(-shape[-2] // tile[0]), -(-shape[-1] // tile[1])


def compute_absmax(x: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
  """The largest magnitude (amax) of `x`, float32, over `axis`; NaN if there is one.

  Compares bits as integers, whose order is that of magnitudes with NaN last. XLA's maximum of floats on CPUs ignores
  NaN (jax 0.10.2 and 0.12.0).
  """
  return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32).max(axis), jnp.float32)


def compute_scales(absmax: jax.Array, pow2_scales: bool) -> jax.Array:
  """Scales, float32, of tiles whose largest magnitudes are `absmax`, so that `absmax` / scale is 448.

  pow2_scales: the least powers of two that keep every value within 448, as 8 exponent bits (UE8M0) hold them.
  A tile with a NaN or an infinity has such a scale, and dequantizes to NaN. The least scale is 2^-126, that of a tile
  of zeros.
  """
  if pow2_scales:
    # By bits, which every kernel can do: 448 is 1.75 * 2^8. The exponent 255 is that of NaN and infinity.
    bits = jax.lax.bitcast_convert_type(absmax, jnp.int32)
    exponent = bits >> 23
    scale_exponent = jnp.maximum(exponent - 8 + (bits & 0x7FFFFF > 0x600000).astype(jnp.int32), 1)
    return jnp.where(exponent < 255, jax.lax.bitcast_convert_type(scale_exponent << 23, jnp.float32), absmax)
  # A product with 1 / 448. Compilers may turn a division into it, and results would then differ in bits between them.
  return jnp.maximum(absmax * jnp.float32(1 / FP8_MAX), jnp.finfo(jnp.float32).tiny)
