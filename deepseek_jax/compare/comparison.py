"""Comparisons of runs: read them, group them, and show them as text, JSON or a page."""

import dataclasses
import html
import os
from collections.abc import Sequence
from typing import Any

from deepseek_jax.compare import page, text
from deepseek_jax.compare.find import PassedOver, find_runs, short_names
from deepseek_jax.compare.groups import FieldDifference, Group, differing_fields, group_runs, make_groups
from deepseek_jax.compare.runs import METRIC, X_AXES, ComparedRun, read_compared_run
from deepseek_jax.compare.verdict import SMALLEST, Verdict, judge
from deepseek_jax.errors import ConfigError, DataError, StorageError

METRICS = (METRIC, "loss")


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Runs side by side.

  Attributes:
    groups: of runs that differ in the seed alone.
    differences: config fields that differ between the groups.
    verdict: on two groups, if it was asked for.
    passed_over: (path, why) of what could not be read.
    x_axis: one of X_AXES, that of the text and the first of the page.
    metrics: whose curves are shown.
  """

  groups: tuple[Group, ...]
  differences: tuple[FieldDifference, ...]
  verdict: Verdict | None
  passed_over: tuple[PassedOver, ...]
  x_axis: str
  metrics: tuple[str, ...]

  @property
  def runs(self) -> list[ComparedRun]:
    """All runs, by group."""
    return [run for group in self.groups for run in group.runs]

  def text(self, width: int = 80) -> str:
    """For a terminal of `width` columns."""
    return text.format_comparison(self, width)

  def to_json(self) -> dict[str, Any]:
    """All that the text has, for programs."""
    curves = text.sparkline_values(self)
    return {
      "x": self.x_axis,
      "differences": [
        {"field": row.path, "values": {g.letter: v for g, v in zip(self.groups, row.values, strict=True)}}
        for row in self.differences
      ],
      "groups": [_group_json(group, self.metrics, curves[group.letter]) for group in self.groups],
      "verdict": self.verdict.to_json() if self.verdict else None,
      "passed_over": [{"path": path, "reason": reason} for path, reason in self.passed_over],
    }

  def html(self) -> str:
    """One page that needs no network."""
    return page.format_page(self)

  def save(self, path: str) -> None:
    """Writes the page, in one step. Raises ConfigError where it cannot."""
    try:
      with open(f"{path}.partial", "w", encoding="utf-8", errors="replace") as file:
        file.write(self.html())
      os.replace(file.name, path)
    except OSError as error:
      raise ConfigError(f"{path} cannot be written: {error.strerror}; name another file") from None

  def _repr_html_(self) -> str:
    return f'<iframe srcdoc="{html.escape(self.html())}" width="100%" height="900" style="border:0"></iframe>'

  def __repr__(self) -> str:
    return self.text()


def compare_runs(
  runs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], x_axis: str = "steps",
  metrics: Sequence[str] = METRICS, verdict: bool = False, smallest: float = SMALLEST,
) -> Comparison:  # fmt: skip
  """Reads runs, also ones that go on, and compares them.

  Args:
    runs: folders of runs, folders that hold runs, globs of these, or their URLs (gs://, s3://).
    x_axis: one of X_AXES: what the curves of the text are over.
    metrics: names of metrics.jsonl whose curves are shown; held-out evaluations join those that they have.
    verdict: judge two groups: what the two of `runs` hold, or else the two groups that all runs form.
    smallest: the smallest relative difference in bits per byte that matters to the verdict.

  Raises:
    ConfigError: another axis, a metric that no run has, or a verdict on other than two groups.
    DataError: no run that can be read.
  """
  places = [os.fspath(runs)] if isinstance(runs, (str, os.PathLike)) else [os.fspath(run) for run in runs]
  if x_axis not in X_AXES:
    raise ConfigError(f"x={x_axis}: expected one of {', '.join(X_AXES)}")
  if not 0 < smallest < 1:
    raise ConfigError(f"smallest={smallest}: expected a fraction between 0 and 1, as {SMALLEST}")
  found, passed_over = _read(places)
  read = [run for runs in found for run in runs]
  if not read:
    reasons = "; ".join(f"{path}: {reason}" for path, reason in passed_over[:3])
    raise DataError(f"expected at least one run, got none: {reasons or 'name folders of runs, as runs/*'}")
  _check_metrics(read, metrics)
  groups = make_groups(_two_groups(places, found, passed_over) if verdict else group_runs(read))
  return Comparison(
    tuple(groups), tuple(differing_fields([group.fields for group in groups])),
    judge(groups[0], groups[1], smallest) if verdict else None,
    tuple(passed_over), x_axis, tuple(metrics),
  )  # fmt: skip


def _read(places: Sequence[str]) -> tuple[list[list[ComparedRun]], list[PassedOver]]:
  """(the runs at each of `places`, what was passed over). A run that is named twice is read once."""
  passed_over: list[PassedOver] = []
  found: list[list[str]] = []
  known: set[str] = set()
  for place in places:
    try:
      paths, passed = find_runs(place)
    except (OSError, StorageError) as error:
      paths, passed = [], [(place, str(error))]
    passed_over += passed
    new = {_identity(path): path for path in paths if _identity(path) not in known}
    known |= set(new)
    found.append(list(new.values()))
  names = dict(zip(sum(found, []), short_names(sum(found, [])), strict=True)) if known else {}
  runs: list[list[ComparedRun]] = []
  for paths in found:
    runs.append([])
    for path in paths:
      try:
        runs[-1].append(read_compared_run(path, names[path]))
      except (DataError, StorageError) as error:
        passed_over.append((path, str(error)))
  return runs, passed_over


def _identity(path: str) -> str:
  return path if "://" in path else os.path.realpath(path)


def _two_groups(
  places: Sequence[str], found: list[list[ComparedRun]], passed_over: Sequence[PassedOver]
) -> list[list[ComparedRun]]:
  """The runs of the two groups of a verdict. Raises ConfigError where there are not two."""
  if len(places) != 2:
    groups = group_runs([run for runs in found for run in runs])
    if len(groups) != 2:
      raise ConfigError(
        f"a verdict is on two groups of seeds, got runs of {len(groups)} setting{'s' if len(groups) != 1 else ''} at "
        f"{len(places)} place{'s' if len(places) != 1 else ''}: give two places, each a run, a folder of seeds or a quoted "
        "glob, as --verdict 'runs/a-*' 'runs/b-*'"
      )
    return groups
  for place, runs in zip(places, found, strict=True):
    settings = group_runs(runs)
    if not settings:
      reason = next((f": {reason}" for path, reason in passed_over if path.startswith(place)), "")
      raise ConfigError(f"{place}: expected a run that the other side of the verdict has not, got none{reason}")
    if len(settings) != 1:
      differing = [row.path for row in differing_fields([group[0].fields for group in settings])]
      more = f", which differ in {', '.join(differing[:3])}" if differing else ""
      raise ConfigError(
        f"{place}: expected runs of one setting that differ in the seed, got {len(settings)} settings{more}: name fewer runs"
      )
  return found


def _check_metrics(runs: Sequence[ComparedRun], metrics: Sequence[str]) -> None:
  known = sorted({name for run in runs for name in run.records.columns})
  for metric in metrics:
    if metric not in known and metric not in METRICS:
      shown = ", ".join(name for name in known if "/" not in name)
      raise ConfigError(
        f"metric={metric}: expected one that these runs logged: {shown}, or of layers, GROUP/LAYER/NAME"
      )


def _group_json(group: Group, metrics: Sequence[str], curve: dict[str, Any]) -> dict[str, Any]:
  finals = {name: group.final(name) for name in METRICS}
  return {
    "letter": group.letter,
    "label": group.label,
    "fields": dict(group.fields),
    "final": {name: dataclasses.asdict(value) if value else None for name, value in finals.items()},
    "curve": curve,
    "not_counted": group.not_counted,
    "runs": [
      {
        "name": run.name, "path": run.place, "seed": run.seed, **dataclasses.asdict(run.numbers),
        "last": {metric: run.last_value(metric) for metric in metrics},
      }
      for run in group.runs
    ],
  }  # fmt: skip
