"""The kernel of kernels/hopper.py, with tiles of the result in bands."""

import jax.numpy as jnp

from deepseek_jax.kernels import hopper
from deepseek_jax.kernels.implementations import vary
from deepseek_jax.kernels.tiles import BLOCK, tiles_for


def matmul(a, b, out_dtype, tiles=None):
  (m, k), n = a.shape, b.shape[0]
  a, b = vary(hopper.operand(a, "a", hopper.ROWS), hopper.operand(b, "b", hopper.COLUMNS, (1, BLOCK)))
  tiles = tiles or tiles_for("fp8_wgrad" if b.tile[0] == 1 else "fp8_matmul", out_dtype, m, n, k)
  height = tiles.m * tiles.cluster
  down, across, steps = -(-m // height), -(-n // tiles.n), a.scales.shape[1]

  def tile(i):
    row, column = hopper.banded(i, down, across, tiles.band)
    return hopper.Tile(row * height, column * tiles.n, jnp.int32(0), jnp.int32(steps))

  schedule = hopper.Schedule(lambda: down * across, tile, down * across)
  out = hopper.result((a.shape[0], b.shape[0]), out_dtype)
  return hopper.product((), a, b, out, schedule, tiles, "whole")[:m, :n]
