"""Tile sizes of FP8 GEMMs on Hopper GPUs: measured by benchmarks/tune_kernels.py, or else estimated.

There is no autotuning at run time, so that every host makes the same program. tiles.json holds what was measured:
operation -> chip -> sizes -> fields of TileConfig.
"""

import dataclasses
import functools
import itertools
import json
import pathlib

import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.kernels.implementations import device_kind

TABLE = pathlib.Path(__file__).with_name("tiles.json")
MULTIPROCESSORS = 132  # of H100 and H200 SXM; further thread blocks wait for one
MMA_WARPGROUPS = 2  # warpgroups that multiply
WGMMA_ROWS = 64  # rows of one wgmma instruction
BLOCK = 128  # k between promotions to float32, and bytes of a swizzled row: the one size that is implemented
SHARED_BYTES = 232_448 - 2_048  # of a thread block, less room for barriers
# Bytes that a multiprocessor gets from the L2 cache in a cycle: an assumption, of the order that others measured on
# H100s.
L2_BYTES_PER_CYCLE = 45


@dataclasses.dataclass(frozen=True)
class TileConfig:
  """How a GEMM is tiled. Fields are keys of tiles.json.

  waves: wgmma tiles of 64 rows that each of the two warpgroups holds: a tile has 128 rows a wave.
  n: columns of a tile, a multiple of 64.
  cluster: thread blocks, 1 or 2, of a cluster; their tiles are below one another, and the tile of b is multicast to
  them.
  band: tiles down that are visited before the next tiles across, so that neighbors in time share the L2 cache.
  """

  waves: int = 1
  n: int = 128
  cluster: int = 1
  band: int = 8

  @property
  def m(self) -> int:
    """Rows of a tile."""
    return MMA_WARPGROUPS * WGMMA_ROWS * self.waves

  def stages(self, staging_bytes: int) -> int:
    """Stages of the operands' ring buffer: as many as shared memory holds in addition to `staging_bytes`, at most 8."""
    stage_bytes = (self.m + self.n) * (BLOCK + jnp.dtype(jnp.float32).itemsize)
    return min((SHARED_BYTES - staging_bytes) // stage_bytes, 8)


# Those that spill no registers: tests/kernels/test_compiled_gpu.py compiles each.
CANDIDATES = {
  "fp8_matmul": [TileConfig(n=n, cluster=cluster) for n, cluster in itertools.product((64, 128, 192), (1, 2))],
  "fp8_wgrad": [
    TileConfig(waves, n, cluster) for (waves, n), cluster in itertools.product(((1, 64), (1, 128), (2, 128)), (1, 2))
  ],
}


def select_tile_config(operation: str, dtype: DTypeLike, rows: int, n: int, k: int, groups: int = 1) -> TileConfig:
  """The tiles of a GEMM: from tiles.json, or else the candidate with the fewest estimated cycles.

  Args:
    operation: "fp8_matmul", "fp8_wgrad", "fp8_grouped_matmul" or "fp8_grouped_wgrad".
    dtype: of the result.
    rows: of the result, over all `groups`.
  """
  fields = read_table(TABLE).get(operation, {}).get(device_kind(), {}).get(table_key(dtype, rows, n, k, groups))
  if fields:
    return TileConfig(**fields)
  kind = "fp8_wgrad" if "wgrad" in operation else "fp8_matmul"
  return min(CANDIDATES[kind], key=lambda tiles: estimate_cycles(tiles, rows, n, groups))


def table_key(dtype: DTypeLike, rows: int, n: int, k: int, groups: int) -> str:
  """The key of sizes in tiles.json. Rows and k, which change with the batch, are rounded up to powers of two."""

  def next_power_of_two(size):
    return 1 << (size - 1).bit_length()

  return f"{jnp.dtype(dtype)} {groups}x{next_power_of_two(rows)}x{n}x{next_power_of_two(k)}"


def estimate_cycles(tiles: TileConfig, rows: int, n: int, groups: int) -> float:
  """Cycles of a block of the contraction: rounds over the multiprocessors, times what bounds a tile, wgmma or L2 bytes.

  A wgmma of 64 rows, n columns and 32 of k takes n / 2 cycles: that is the peak rate of FP8.
  """
  tiles_down = groups * -(-rows // (groups * tiles.m * tiles.cluster))
  rounds = -(-tiles_down * -(-n // tiles.n) // (MULTIPROCESSORS // tiles.cluster))
  mma_cycles = tiles.m // WGMMA_ROWS * BLOCK // 32 * tiles.n / 2
  return rounds * max(mma_cycles, (tiles.m + tiles.n / tiles.cluster) * BLOCK / L2_BYTES_PER_CYCLE)


@functools.cache
def read_table(path: pathlib.Path) -> dict[str, dict[str, dict[str, dict[str, int]]]]:
  """tiles.json: operation -> chip -> `table_key` -> fields of TileConfig."""
  return json.loads(path.read_text())
