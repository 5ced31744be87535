"""Runs of a table by compute budget, and the noise of a loss."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from deepseek_jax.errors import DataError
from deepseek_jax.scaling.table import RunTable

SAME_BUDGET = 0.05  # realised FLOPs this near to each other are of one budget


@dataclasses.dataclass(frozen=True)
class BudgetRuns:
  """The best loss of each model size at one budget.

  Attributes:
    flops: geometric mean.
    scales, tokens, losses: [sizes], by increasing scale.
    first_row: row of the table's file with the smallest loss, for messages.
  """

  flops: float
  scales: np.ndarray
  tokens: np.ndarray
  losses: np.ndarray
  first_row: int


def budget_indices(table: RunTable) -> list[np.ndarray]:
  """Indices of the rows of each budget, by increasing compute: by the column `budget`, or by FLOPs within SAME_BUDGET."""
  flops, budgets = table.flops(), table.optional("budget")
  # Other people's column of that name may be anything.
  if budgets is not None and (np.abs(np.log(flops / budgets)) < SAME_BUDGET).all():
    flops = budgets
  order = np.argsort(flops, kind="stable")
  starts = [0]
  for i in range(1, len(order)):
    if flops[order[i]] > flops[order[starts[-1]]] * (1 + SAME_BUDGET):
      starts.append(i)
  return np.split(order, starts[1:])


def best_of_each_run(table: RunTable, scale: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
  """(scales, tokens, losses, row numbers) of a table, with one row for the runs that differ by their settings alone.

  Such runs have the same scale and the same FLOPs within SAME_BUDGET, and other learning rates, batches or seeds. Seeds count
  as their mean, then the smallest counts: a run with a bad learning rate says nothing of its scale.
  """
  scales, tokens, losses = table.scale(scale), table.tokens(), table[table.loss_name()]
  if not any(name in table for name in ("lr", "batch_tokens", "seed")):
    return scales, tokens, losses, list(table.rows)
  settings, shapes = _settings(table), [_shape(table, i) for i in range(len(table))]
  kept: list[tuple[float, int]] = []
  for indices in budget_indices(table):
    best: dict[tuple[Any, ...], tuple[float, int]] = {}
    for (size, shape, _), group in _groups(indices, scales, shapes, settings).items():
      candidate = float(np.mean(losses[group])), group[0]
      best[size, shape] = min(best.get((size, shape), candidate), candidate)
    kept += best.values()
  kept.sort(key=lambda item: item[1])
  rows = [i for _, i in kept]
  return scales[rows], tokens[rows], np.array([loss for loss, _ in kept]), [table.rows[i] for i in rows]


def _shape(table: RunTable, i: int) -> tuple[str, ...]:
  """What tells models of one scale apart that are no settings of one run."""
  names = [name for name in ("params", "experts", "granularity", "n_layer", "d_model") if name in table]
  return tuple(table.cells[i][table.names[name]] for name in names)


def best_of_each_size(table: RunTable, scale: str, indices: np.ndarray, losses: np.ndarray) -> BudgetRuns:
  """The runs `indices` with one loss for each size: seeds of one setting count as their mean, then the smallest counts."""
  scales, tokens = table.scale(scale), table.tokens()
  best: dict[float, tuple[float, int]] = {}
  for (size, _), group in _groups(indices, scales, _settings(table)).items():
    loss = float(np.mean(losses[group]))
    if size not in best or loss < best[size][0]:
      best[size] = loss, group[0]
  sizes = sorted(best)
  rows = [best[size][1] for size in sizes]
  values = np.array([best[size][0] for size in sizes])
  flops = float(np.exp(np.log(table.flops()[indices]).mean()))
  return BudgetRuns(flops, np.array(sizes), tokens[rows], values, table.rows[rows[int(values.argmin())]])


def _settings(table: RunTable) -> list[tuple[str, ...]]:
  """What tells the runs of one size apart but the seed: learning rate and batch. Without seeds each run is its own setting."""
  if "seed" not in table:
    return [(str(row),) for row in table.rows]
  names = [name for name in ("lr", "batch_tokens", "experts", "granularity") if name in table]
  return [tuple(cells[table.names[name]] for name in names) for cells in table.cells]


def _groups(indices: np.ndarray, *keys: Sequence[Any] | np.ndarray) -> dict[tuple[Any, ...], list[int]]:
  """{values of the keys: those of `indices` that have them}, in order."""
  groups: dict[tuple[Any, ...], list[int]] = {}
  for i in indices.tolist():
    groups.setdefault(tuple(key[i] for key in keys), []).append(i)
  return groups


def seed_noise(table: RunTable, scale: str, losses: np.ndarray) -> float | None:
  """Standard deviation of log loss between seeds of one setting, pooled; None where no setting has two seeds."""
  if "seed" not in table:
    return None
  scales, settings = table.scale(scale), _settings(table)
  squares, freedom = 0.0, 0
  for indices in budget_indices(table):
    for group in _groups(indices, scales, settings).values():
      logs = np.log(losses[group])
      squares, freedom = squares + float(((logs - logs.mean()) ** 2).sum()), freedom + len(group) - 1
  return float(np.sqrt(squares / freedom)) if freedom else None


def check_budgets(table: RunTable, groups: list[np.ndarray], needed: int) -> None:
  """Raises DataError where a fit over budgets has too few of them."""
  if len(groups) < needed:
    raise DataError(
      f"{table.path}: {len(groups)} compute budgets (FLOPs within {SAME_BUDGET:.0%} are one), and {needed} are needed"
    )
