"""Groups: runs that differ in the seed alone. Their differences in the config, short labels, and their mean results."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deepseek_jax.compare.intervals import Estimate, estimate
from deepseek_jax.compare.runs import METRIC, ComparedRun, Curve
from deepseek_jax.config import Config
from deepseek_jax.console import printable
from deepseek_jax.schema import leaf_paths

LABEL_CHARACTERS = 24  # of a value


@dataclasses.dataclass(frozen=True)
class Group:
  """Runs that differ in the seed alone.

  Attributes:
    letter: A, B, ... in a comparison.
    label: what differs from the other groups.
    fields: the config fields that have an effect.
  """

  letter: str
  label: str
  runs: tuple[ComparedRun, ...]
  fields: Mapping[str, Any]

  @functools.cached_property
  def counted(self) -> tuple[ComparedRun, ...]:
    """The runs whose last evaluation counts: a finite one at the last step that any of them reached."""
    last = max((run.numbers.evaluated_step or 0 for run in self.runs), default=0)
    return tuple(r for r in self.runs if r.numbers.evaluated_step == last and r.numbers.bits_per_byte is not None)

  @property
  def averaged(self) -> tuple[ComparedRun, ...]:
    """The runs whose curves are averaged: those that count, or all where none does."""
    return self.counted or self.runs

  @property
  def not_counted(self) -> dict[str, str]:
    """{name of a run whose last evaluation does not count: why}."""
    counted, reasons = {run.name for run in self.counted}, {}
    for run in (run for run in self.runs if run.name not in counted):
      step, end = run.numbers.evaluated_step, run.numbers.end
      reason = "was not evaluated" if step is None else f"was last evaluated at step {step:,}"
      if step is not None and run.numbers.bits_per_byte is None:
        reason = f"has no finite held-out loss at step {step:,}"
      reasons[run.name] = f"{reason} ({'no end was recorded' if end is None else end})"
    return reasons

  def by_seed(self, name: str = METRIC) -> dict[int, float]:
    """{seed: one of the final numbers} of the runs that count; the mean of runs with the same seed."""
    values: dict[int, list[float]] = {}
    for run in self.counted:
      value = getattr(run.numbers, name)
      if value is not None:
        values.setdefault(run.seed, []).append(value)
    return {seed: float(np.mean(items)) for seed, items in sorted(values.items())}

  def final(self, name: str = METRIC) -> Estimate | None:
    """The mean of a final number over seeds; None where no run has it."""
    values = list(self.by_seed(name).values())
    return estimate(values) if values else None

  def mean_curve(self, metric: str, x_axis: str, heldout: bool = False) -> Curve:
    """The mean of the curves of `averaged`, over the part of the axis that all of them with a curve have."""
    all_curves = [(run.heldout_curve if heldout else run.curve)(metric, x_axis) for run in self.averaged]
    curves = [curve for curve in all_curves if len(curve)]
    if len(curves) < 2:
      return curves[0] if curves else all_curves[0]
    low, high = max(curve.x[0] for curve in curves), min(curve.x[-1] for curve in curves)
    x = np.unique(np.concatenate([curve.x for curve in curves]))
    x = x[(x >= low) & (x <= high)]
    return Curve(x, np.mean([np.interp(x, curve.x, curve.y) for curve in curves], axis=0)) if len(x) else curves[0]


@dataclasses.dataclass(frozen=True)
class FieldDifference:
  """A config field that differs: its value in each group, None where it has no effect."""

  path: str
  values: tuple[Any, ...]


def group_runs(runs: Sequence[ComparedRun]) -> list[list[ComparedRun]]:
  """Runs that differ in the seed alone, together, in the order in which they come."""
  groups: dict[Any, list[ComparedRun]] = {}
  for run in runs:
    groups.setdefault(frozenset(run.fields.items()), []).append(run)
  return list(groups.values())


def make_groups(members: Sequence[Sequence[ComparedRun]]) -> list[Group]:
  """Groups with letters and labels, of the runs of each."""
  fields = [runs[0].fields for runs in members]
  labels = label_groups(differing_fields(fields), [_common_name(runs) for runs in members])
  return [
    Group(letter(i), label, tuple(runs), runs[0].fields)
    for i, (label, runs) in enumerate(zip(labels, members, strict=True))
  ]


def letter(index: int) -> str:
  """A to Z, AA, AB, ..."""
  name = ""
  while index >= 0:
    name = chr(ord("A") + index % 26) + name
    index = index // 26 - 1
  return name


def differing_fields(fields: Sequence[Mapping[str, Any]]) -> list[FieldDifference]:
  """The fields that have different values in some of `fields`, or have an effect in some alone; in the config's order."""
  known = [path for path in leaf_paths(Config) if any(path in f for f in fields)]
  paths = [*known, *sorted({path for f in fields for path in f} - set(known))]
  rows = [FieldDifference(path, tuple(f.get(path) for f in fields)) for path in paths]
  # 0, false and empty mean "off", as it is where a field has no effect: a dense model and one without shared experts.
  off = lambda row: None in row.values and not any(row.values)
  return [row for row in rows if any(value != row.values[0] for value in row.values) and not off(row)]


def label_groups(differences: Sequence[FieldDifference], names: Sequence[str]) -> list[str]:
  """A short label for each group: the fewest differing fields that tell them apart, found greedily.

  Fields that have an effect in all groups come first, and of these kinds. names: of the groups, for those that no field tells apart.
  """
  chosen: list[FieldDifference] = []
  left = sorted(differences, key=lambda row: (None in row.values, not row.path.endswith(".kind")))
  count = lambda rows: len(set(zip(*(row.values for row in rows), strict=True))) if rows else 1
  while left and count(chosen) < len(names):
    best = max(left, key=lambda row: count([*chosen, row]))
    if count([*chosen, best]) == count(chosen):
      break
    chosen.append(best)
    left.remove(best)
  labels = [
    ", ".join(f"{short_path(r.path)}={format_value(r.values[i])}" for r in chosen if r.values[i] is not None)
    for i in range(len(names))
  ]
  repeated = Counter(labels)
  return [
    label if repeated[label] == 1 and label else f"{label} ({name})" if label else name
    for label, name in zip(labels, names, strict=True)
  ]


@functools.cache
def short_path(path: str) -> str:
  """The last name of a field's path, with the section before it where other fields have that name too."""
  names = Counter(leaf.rpartition(".")[2] for leaf in leaf_paths(Config))
  parts = path.split(".")
  return parts[-1] if names[parts[-1]] == 1 else ".".join(parts[-2:])


def format_value(value: Any) -> str:
  """A config value as text, long ones without their beginning."""
  if value is None:
    return "–"
  if value == () or value == "":
    return "none"
  if isinstance(value, tuple):
    text = ",".join(map(format_value, value))
  elif isinstance(value, float):
    text = f"{value:.10g}"  # 0.009 where arithmetic gave 0.009000000000000001
  else:
    text = str(value).lower() if isinstance(value, bool) else str(value)
  text = printable(text)
  return text if len(text) <= LABEL_CHARACTERS else f"…{text[1 - LABEL_CHARACTERS :]}"


def _common_name(runs: Sequence[ComparedRun]) -> str:
  return runs[0].name if len(runs) == 1 else f"{runs[0].name} to {runs[-1].name}"
