"""An FP8 matrix with a scale a tile: the operands of DeepSeek-V3's products (arXiv 2412.19437, section 3.3)."""

import dataclasses

import jax
import jax.numpy as jnp

FP8 = jnp.float8_e4m3fn  # the report's one format, also of gradients: fine tiles make up for its short exponent
FP8_MAX = 448.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor:
  """values * scales, a scale a tile: `values` [..., rows, columns], `scales` [..., tiles down, tiles across] float32.

  tile: (rows, columns) of a tile. Tiles start at row and column 0; those at the far edges hold what is left.
  """

  values: jax.Array
  scales: jax.Array
  tile: tuple[int, int] = dataclasses.field(metadata={"static": True})

  @property
  def shape(self):
    return self.values.shape

  @property
  def T(self):
    """The transpose of the last two dimensions."""
    return QTensor(self.values.mT, self.scales.mT, self.tile[::-1])

  def __getitem__(self, index):
    """The matrix at `index` of the leading dimension."""
    return QTensor(self.values[index], self.scales[index], self.tile)

  def dequantized(self, dtype=jnp.float32):
    """[..., rows, columns] in `dtype`."""
    return self.values.astype(dtype) * self.scales_of_elements().astype(dtype)

  def scales_of_elements(self):
    """The scale of every element, [..., rows, columns]."""
    scales = jnp.repeat(jnp.repeat(self.scales, self.tile[0], -2), self.tile[1], -1)
    return scales[..., : self.shape[-2], : self.shape[-1]]


def unquantized(x, tile):
  """`x` as it is, as an operand of the same products."""
  return QTensor(x, jnp.ones((*x.shape[:-2], *tiles_of(x.shape, tile)), jnp.float32), tile)


def tiles_of(shape, tile):
  """(tiles down, tiles across) of the last two dimensions of `shape`."""
  return -(-shape[-2] // tile[0]), -(-shape[-1] // tile[1])


def greatest_of(x, axis):
  """The greatest magnitude of `x`, float32, over `axis`; NaN if there is one.

  As whole numbers, whose order is that of magnitudes with NaN last: XLA's maximum of floats on CPUs passes over NaN
  (jax 0.10.2 and 0.12.0).
  """
  return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32).max(axis), jnp.float32)


def scales_of(greatest, pow2_scales):
  """Scales of tiles whose greatest magnitudes are `greatest`, float32, so that those become 448.

  pow2_scales: the least powers of two that keep every value within 448, which 8 exponent bits (UE8M0) hold.
  A tile with a NaN or an infinity has such a scale, and is NaN throughout. The least scale is 2^-126: a tile of zeros has it.
  """
  if pow2_scales:
    # By bits, which every kernel can: 448 is 1.75 of 2^8. 255 is the exponent of what is not finite.
    bits = jax.lax.bitcast_convert_type(greatest, jnp.int32)
    exponent = bits >> 23
    least = jnp.maximum(exponent - 8 + (bits & 0x7FFFFF > 0x600000).astype(jnp.int32), 1)
    return jnp.where(exponent < 255, jax.lax.bitcast_convert_type(least << 23, jnp.float32), greatest)
  # Not a division, which compilers may turn into this product, and then give other bits than where they do not.
  return jnp.maximum(greatest * jnp.float32(1 / FP8_MAX), jnp.finfo(jnp.float32).tiny)
