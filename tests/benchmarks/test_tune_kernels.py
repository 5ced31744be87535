"""Tuning of tiles goes on where it was."""

import json

from deepseek_jax.kernels import tiles
from tests.benchmarks.programs import benchmark
from tests.kernels.marks import NEEDS_JAX_0_11


@NEEDS_JAX_0_11
def test_tune_kernels_goes_on_where_it_was(tmp_path):
  table = tmp_path / "tiles.json"
  out, _ = benchmark("tune_kernels", "--small", f"--table={table}")
  assert "fp8_matmul bfloat16 1x128x128x128: TileConfig(" in out
  (fields,) = json.loads(table.read_text())["fp8_matmul"]["cpu"].values()
  assert tiles.TileConfig(**fields) in tiles.CANDIDATES["fp8_matmul"]
  assert benchmark("tune_kernels", "--small", f"--table={table}")[0] == ""
