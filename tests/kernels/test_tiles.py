"""Tile configs of Hopper kernels: measured ones come first, and the estimate follows what bounds a kernel."""

import functools
import json

import jax
import jax.numpy as jnp
import pytest

from deepseek_jax.kernels import tiles
from deepseek_jax.kernels.tiles import CANDIDATES, TABLE, TileConfig, estimate_cycles, select_tile_config, table_key


@pytest.mark.parametrize("dtype_bytes", [2, 4])
@pytest.mark.parametrize(("operation", "ragged"), [("fp8_matmul", False), ("fp8_matmul", True), ("fp8_wgrad", False)])
def test_candidates_have_rings_of_some_stages(operation, ragged, dtype_bytes):
  """Ragged results stage 128 bytes of each row beside all of them."""
  for tile in CANDIDATES[operation]:
    stages = tile.stages(tiles.MMA_WARPGROUPS * tiles.WGMMA_ROWS * (tile.n * dtype_bytes + 128 * ragged))
    assert stages >= (2 if ragged and dtype_bytes == 4 and tile.n == 192 else 3), tile


def test_the_table_holds_tiles():
  for operation, chips in json.loads(TABLE.read_text()).items():
    assert operation in ("fp8_matmul", "fp8_wgrad", "fp8_grouped_matmul", "fp8_grouped_wgrad")
    for sizes in chips.values():
      assert all(TileConfig(**fields) for fields in sizes.values())


def test_a_measured_tile_config_of_the_chip_and_the_sizes_is_used(monkeypatch, tmp_path):
  table, chip = tmp_path / "tiles.json", jax.devices()[0].device_kind
  measured = TileConfig(n=64, band=16)
  table.write_text(json.dumps({"fp8_matmul": {chip: {"bfloat16 1x4096x7168x2048": vars(measured)}, "NVIDIA H200": {}}}))
  monkeypatch.setattr(tiles, "TABLE", table)
  assert select_tile_config("fp8_matmul", jnp.bfloat16, 3000, 7168, 2048) == measured
  for operation, *sizes in (
    ("fp8_matmul", 3000, 7168, 4096),
    ("fp8_wgrad", 3000, 7168, 2048),
    ("fp8_matmul", 5000, 7168, 2048),
  ):
    assert select_tile_config(operation, jnp.bfloat16, *sizes) != measured
  assert select_tile_config("fp8_matmul", jnp.float32, 3000, 7168, 2048) != measured


def test_sizes_that_follow_the_batch_count_by_powers_of_two():
  name = functools.partial(table_key, jnp.float32)
  assert name(4096, 7168, 2048, 1) == name(2049, 7168, 1025, 1) == "float32 1x4096x7168x2048"
  assert name(4097, 7168, 2048, 1) != name(4096, 7168, 2048, 1)


def test_few_rows_have_small_tiles_and_many_have_clusters():
  assert (
    select_tile_config("fp8_matmul", jnp.bfloat16, 128, 2112, 7168).n == 64
  )  # 17 tiles of 128 would leave most multiprocessors idle
  assert select_tile_config("fp8_matmul", jnp.bfloat16, 4096, 7168, 16384).cluster == 2


def test_an_estimate_counts_whole_rounds():
  tile = TileConfig()
  one = estimate_cycles(tile, 132 * 128, 128, 1)
  assert estimate_cycles(tile, 132 * 128 + 1, 128, 1) == 2 * one == estimate_cycles(tile, 128, 133 * 128, 1)
