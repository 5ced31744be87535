"""Tiles of Hopper kernels: the table that was measured comes first, and the estimate follows what bounds a kernel."""

import functools
import json

import jax
import jax.numpy as jnp
import pytest

from deepseek_jax.kernels import tiles
from deepseek_jax.kernels.tiles import CANDIDATES, TABLE, Tiles, estimate, key, tiles_for


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("dtype_bytes", [2, 4])
@pytest.mark.parametrize(
  "tile", sorted({tile for candidates in CANDIDATES.values() for tile in candidates}, key=str), ids=str
)
def test_candidates_have_rings_of_some_stages(tile, dtype_bytes, ragged):
  """Ragged results stage 128 bytes of each row beside all of them."""
  stages = tile.stages(tiles.WARPGROUPS * tiles.WAVE * (tile.n * dtype_bytes + 128 * ragged))
  assert stages >= 3 or (ragged and dtype_bytes == 4 and tile.n == 192 and stages == 2)


def test_the_table_holds_tiles():
  for operation, chips in json.loads(TABLE.read_text()).items():
    assert operation in ("fp8_matmul", "fp8_wgrad", "fp8_grouped_matmul", "fp8_grouped_wgrad")
    for sizes in chips.values():
      assert all(Tiles(**fields) for fields in sizes.values())


def test_what_was_measured_for_the_chip_and_the_sizes_is_taken(monkeypatch, tmp_path):
  table, chip = tmp_path / "tiles.json", jax.devices()[0].device_kind
  measured = Tiles(n=64, band=16)
  table.write_text(json.dumps({"fp8_matmul": {chip: {"bfloat16 1x4096x7168x2048": vars(measured)}, "NVIDIA H200": {}}}))
  monkeypatch.setattr(tiles, "TABLE", table)
  assert tiles_for("fp8_matmul", jnp.bfloat16, 3000, 7168, 2048) == measured
  for operation, *sizes in (
    ("fp8_matmul", 3000, 7168, 4096),
    ("fp8_wgrad", 3000, 7168, 2048),
    ("fp8_matmul", 5000, 7168, 2048),
  ):
    assert tiles_for(operation, jnp.bfloat16, *sizes) != measured
  assert tiles_for("fp8_matmul", jnp.float32, 3000, 7168, 2048) != measured


def test_sizes_that_follow_the_batch_count_by_powers_of_two():
  name = functools.partial(key, jnp.float32)
  assert name(4096, 7168, 2048, 1) == name(2049, 7168, 1025, 1) == "float32 1x4096x7168x2048"
  assert name(4097, 7168, 2048, 1) != name(4096, 7168, 2048, 1)


def test_few_rows_are_cut_fine_and_many_shared_by_clusters():
  assert (
    tiles_for("fp8_matmul", jnp.bfloat16, 128, 2112, 7168).n == 64
  )  # 17 tiles of 128 would leave most multiprocessors idle
  assert tiles_for("fp8_matmul", jnp.bfloat16, 4096, 7168, 16384).cluster == 2


def test_an_estimate_counts_whole_rounds():
  tile = Tiles()
  one = estimate(tile, 132 * 128, 128, 1)
  assert estimate(tile, 132 * 128 + 1, 128, 1) == 2 * one == estimate(tile, 128, 133 * 128, 1)
