"""Tables of runs that papers have published, which are part of the package: to refit, and to test fits against."""

import csv
import dataclasses
import pathlib

from deepseek_jax.errors import DataError
from deepseek_jax.scaling.table import RunTable, read_table

FOLDER = pathlib.Path(__file__).with_name("data")  # its README.md has sources and licenses


@dataclasses.dataclass(frozen=True)
class PublishedTable:
  """A table of FOLDER.

  Attributes:
    columns: names of its columns, as the flag --columns.
    source: paper, repository, license.
    fits: file of the exponents that the repository fitted; "" where it has none.
  """

  file: str
  columns: str
  source: str
  fits: str = ""


PUBLISHED_TABLES = {
  "porian2024": PublishedTable(
    "porian_isoflop.csv", "params=n,tokens=t",
    "Porian et al., arXiv 2406.19146; github.com/formll/resolving-scaling-law-discrepancies, MIT license", "porian_fits.csv",
  ),
  "gadre2024": PublishedTable(
    "gadre2024.csv", "loss=loss_c4_val", "Gadre et al., arXiv 2403.08540; github.com/mlfoundations/scaling, MIT license"
  ),
}  # fmt: skip
FITTED = "basic.n_exponent"  # the column of a file of fits; the others name the setting


def read_published(name: str, where: str = "") -> RunTable:
  """A published table of runs, whose scale is N, parameters.

  Args:
    name: a key of PUBLISHED_TABLES. porian2024: IsoFLOP profiles on RefinedWeb in ten settings, of which each has a key of
      `published_exponents`. gadre2024: runs on three data sets (`where="dataset=rpj"`), far beyond 20 tokens per parameter.
    where: only rows with these values, as the flag --where.

  Raises DataError for another name, and for a `where` that leaves too few rows.
  """
  table = _published(name)
  return read_table(FOLDER / table.file, table.columns, where)


def published_exponents(name: str) -> dict[str, float]:
  """{setting: a of N_opt ~ C^a that the authors fitted to it}; a setting is a `where` of `read_published`.

  Raises DataError for a table without published exponents.
  """
  table = _published(name)
  if not table.fits:
    raise DataError(
      f"{name!r} has no published exponents; {', '.join(n for n, t in PUBLISHED_TABLES.items() if t.fits)} has"
    )
  with open(FOLDER / table.fits, encoding="utf-8", newline="") as file:
    rows = list(csv.DictReader(file))
  return {
    ",".join(f"{column}={value}" for column, value in row.items() if column != FITTED): float(row[FITTED])
    for row in rows
  }


def _published(name: str) -> PublishedTable:
  if name not in PUBLISHED_TABLES:
    raise DataError(f"no published table {name!r}: expected one of {', '.join(PUBLISHED_TABLES)}")
  return PUBLISHED_TABLES[name]
