"""How products are cut on Hopper GPUs: as benchmarks/tune_kernels.py measured, or else by an estimate. Nothing is tried out at run time.

Every host then makes the same program. tiles.json holds what was measured: operation -> chip -> sizes -> fields of Tiles.
"""

import dataclasses
import functools
import itertools
import json
import pathlib

import jax.numpy as jnp

from deepseek_jax.kernels.implementations import device_kind

TABLE = pathlib.Path(__file__).with_name("tiles.json")
MULTIPROCESSORS = 132  # of H100 and H200 SXM; thread blocks that find none wait for one
WARPGROUPS, WAVE = 2, 64  # that multiply, and rows of one wgmma
BLOCK = 128  # terms between promotions, which are the bytes of a swizzled row: the one size that is implemented
SHARED_BYTES = 232_448 - 2_048  # of a thread block, less room for barriers
# Bytes that a multiprocessor gets from the L2 cache in a cycle: an assumption, of the order that others measured on H100s.
L2_BYTES = 45


@dataclasses.dataclass(frozen=True)
class Tiles:
  """How a product is cut.

  waves: of 64 rows that each warpgroup holds: a tile has 128 rows a wave.
  n: columns of a tile, a multiple of 64.
  cluster: blocks, 1 or 2, with tiles below one another, which receive their common operand together.
  band: tiles down that are visited before the next tiles across: what is near in time shares the L2 cache.
  """

  waves: int = 1
  n: int = 128
  cluster: int = 1
  band: int = 8

  @property
  def m(self):
    return WARPGROUPS * WAVE * self.waves

  def stages(self, staging_bytes):
    """Of the ring of operands: as many as shared memory holds beside `staging_bytes`."""
    stage = (self.m + self.n) * (BLOCK + jnp.dtype(jnp.float32).itemsize)
    return min((SHARED_BYTES - staging_bytes) // stage, 8)


# Those whose registers suffice: tests/kernels/test_compiled_gpu.py compiles each.
CANDIDATES = {
  "fp8_matmul": [Tiles(n=n, cluster=cluster) for n, cluster in itertools.product((64, 128, 192), (1, 2))],
  "fp8_wgrad": [Tiles(waves, n, cluster) for (waves, n), cluster in itertools.product(((1, 64), (1, 128), (2, 128)), (1, 2))],
}  # fmt: skip


def tiles_for(operation, dtype, rows, n, k, groups=1):
  """Tiles of a product with `rows` rows of results in `dtype`, over all `groups`."""
  fields = table(TABLE).get(operation, {}).get(device_kind(), {}).get(key(dtype, rows, n, k, groups))
  if fields:
    return Tiles(**fields)
  kind = "fp8_wgrad" if "wgrad" in operation else "fp8_matmul"
  return min(CANDIDATES[kind], key=lambda tiles: estimate(tiles, rows, n, groups))


def key(dtype, rows, n, k, groups):
  """Under which results are found: rows and terms, which change with the batch, count by powers of two."""
  up = lambda size: 1 << (size - 1).bit_length()
  return f"{jnp.dtype(dtype)} {groups}x{up(rows)}x{n}x{up(k)}"


def estimate(tiles, rows, n, groups):
  """Cycles a block of the contraction: rounds over the multiprocessors, by what bounds a tile, wgmma or operands' bytes.

  A wgmma of 64 rows, n columns and 32 terms takes n / 2 cycles: that is the peak rate of FP8.
  """
  down = groups * -(-rows // (groups * tiles.m * tiles.cluster))
  rounds = -(-down * -(-n // tiles.n) // (MULTIPROCESSORS // tiles.cluster))
  multiplying = tiles.m // WAVE * BLOCK // 32 * tiles.n / 2
  return rounds * max(multiplying, (tiles.m + tiles.n / tiles.cluster) * BLOCK / L2_BYTES)


@functools.cache
def table(path):
  return json.loads(path.read_text())
