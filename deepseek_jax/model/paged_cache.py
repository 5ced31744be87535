"""The key-value cache of decoding: pages of positions, of which each sequence has a table (Kwon et al. 2023).

A page belongs to one sequence, or to all that begin with the same tokens. What decides who has which page is in
`generate/pages.py`; here they are arrays.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.sharding import num_batch_shards, spec

# Shapes of what attention caches of one token in one layer, each with the logical axes of its dimensions.
TokenShapes = tuple[tuple[tuple[int, ...], tuple[str | None, ...]], ...]
# Of all layers of a stack: arrays [layers, pages, page size, *shape of a token].
CacheArrays = tuple[jax.Array, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CachePositions:
  """Which positions of their sequences the new tokens of a batch have, and which pages those are in.

  Attributes:
    start: int [batch], position of the first new token.
    length: int [batch], of the new tokens those that count, from the first on; the others are padding.
    table: int [batch, pages of a sequence], page numbers of its positions in order. Those that it does not have may be
      any page.
  """

  start: jax.Array
  length: jax.Array
  table: jax.Array

  def positions(self, new: int) -> jax.Array:
    """int [batch, new]."""
    return self.start[:, None] + jnp.arange(new)

  def is_token(self, new: int) -> jax.Array:
    """bool [batch, new]: False for padding."""
    return jnp.arange(new) < self.length[:, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
  """The cache of one layer, in the arrays of its stack, which a loop over layers updates in place.

  Attributes:
    arrays: of the stack.
    layer: int [], the layer.
    where: of the new tokens.
  """

  arrays: CacheArrays
  layer: jax.Array
  where: CachePositions

  def append(self, *new: jax.Array) -> "LayerCache":
    """With the `new` tokens' values, each [batch, new, *shape of a token], at their positions. Padding is dropped."""
    num_pages, page_size = self.arrays[0].shape[1:3]
    positions = self.where.positions(new[0].shape[1])
    page = jnp.take_along_axis(self.where.table, positions // page_size, 1, mode="clip")
    page = jnp.where(self.where.is_token(new[0].shape[1]), page, num_pages)  # out of range: dropped
    # A NaN must not reach the next sequence that gets the page, whose mask multiplies it by 0.
    return dataclasses.replace(
      self,
      arrays=tuple(
        array.at[self.layer, page, positions % page_size].set(jnp.nan_to_num(values.astype(array.dtype)), mode="drop")
        for array, values in zip(self.arrays, new, strict=True)
      ),
    )

  def gather(self) -> CacheArrays:
    """The values of all positions of each sequence: arrays [batch, length, *shape of a token]."""
    return tuple(
      jax.lax.collapse(array[self.layer, self.where.table], 1, 3)  # of [batch, pages, page size, ...]
      for array in self.arrays
    )

  def mask(self, new: int, window: int) -> jax.Array:
    """bool [batch, 1, new, length]: which cached positions the new tokens see: up to their own, or a window of them."""
    queries = self.where.positions(new)[:, None, :, None]
    keys = jnp.arange(self.where.table.shape[1] * self.arrays[0].shape[2])
    seen = keys <= queries
    return seen & (keys > queries - window) if window else seen


def token_elements(shapes: TokenShapes) -> int:
  """Elements that one token has in the cache of one layer."""
  return sum(math.prod(shape) for shape, _ in shapes)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def zeros(shapes: TokenShapes, layers: int, pages: int, page_size: int, dtype: DTypeLike) -> CacheArrays:
  """An empty cache of `layers`, on the mesh that is set: `pages` in all, a multiple of the shards of the batch."""
  assert pages % num_batch_shards(jax.sharding.get_abstract_mesh()) == 0
  return tuple(
    jnp.zeros((layers, pages, page_size, *shape), dtype, out_sharding=spec(None, "batch", None, *axes))
    for shape, axes in shapes
  )
