"""Made tables for the tests of fits."""

import pathlib

import numpy as np

from deepseek_jax.scaling.parametric import Surface
from deepseek_jax.scaling.table import format_csv, read_table

DATA = pathlib.Path(__file__).parent / "data"
S1 = str(DATA / "s1_surface_noisefree.csv")
S3 = str(DATA / "s3_deepseek_isoflop.csv")
S3_COLUMNS = "M=nonemb_flops_per_token,loss=bpb"
CHINCHILLA = Surface(1.69, 406.4, 410.7, 0.34, 0.28)


def write_table(path, columns):
  """Writes {column: values} as a CSV with run_ids, and returns its path as a string."""
  count = len(next(iter(columns.values())))
  rows = [{"run_id": f"r{i}", "status": "finished", **{k: v[i] for k, v in columns.items()}} for i in range(count)]
  names = ["run_id", "status", *columns]
  path.write_text(format_csv(rows, names))
  return str(path)


def made_table(path, columns):
  """`write_table`, read again."""
  return read_table(write_table(path, columns))


def isoflop_runs(budgets, sizes=7, noise=0.0, seed=0, span=4.0, surface=CHINCHILLA):
  """Columns of IsoFLOP profiles of a surface in M: C = M D."""
  generator = np.random.default_rng(seed)
  flops = np.repeat(budgets, sizes)
  optimum = surface.coefficient(1.0) * flops**surface.a
  scale = optimum * np.tile(np.geomspace(1 / span, span, sizes), len(budgets))
  tokens = flops / scale
  loss = surface.loss(scale, tokens) * np.exp(noise * generator.standard_normal(len(flops)))
  return {"flops": flops, "M": scale, "tokens": tokens, "val_loss": loss}
