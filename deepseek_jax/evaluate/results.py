"""What is known of text after its evaluation, and tables of results."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

TOTAL = "total"  # the name of all sources together


@dataclasses.dataclass
class TextResult:
  """Sums over tokens that were scored.

  loss_sum: -ln p, in nats. tokens, bytes: how many were scored, and the UTF-8 bytes that they stand for. items: documents
  or windows.
  """

  loss_sum: float = 0.0
  tokens: int = 0
  bytes: int = 0
  items: int = 0

  @classmethod
  def total(cls, results: Iterable["TextResult"]) -> "TextResult":
    """Their sum."""
    rows = list(map(dataclasses.astuple, results))
    return cls(*(sum(column) for column in zip(*rows, strict=True))) if rows else cls()

  def as_dict(self, items: str) -> dict[str, float | int]:
    """loss (nats per token), perplexity (per token), bits_per_byte, tokens, bytes, and the number of `items`."""
    loss = self.loss_sum / self.tokens
    return {
      "loss": loss,
      "perplexity": math.inf if loss > math.log(1e300) else math.exp(loss),
      "bits_per_byte": self.loss_sum / math.log(2) / self.bytes,
      "tokens": self.tokens,
      "bytes": self.bytes,
      items: self.items,
    }


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float | None]:
  """(mean, its standard error: the sample's deviation over the root of their number). One value has no error: None."""
  count, mean = len(values), math.fsum(values) / len(values)
  if count < 2:
    return mean, None
  return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)


def format_table(rows: Sequence[dict[str, Any]]) -> str:
  """`rows`, {column: value}, as aligned text: the first column to the left, numbers to the right. None is empty."""
  columns = list(dict.fromkeys(column for row in rows for column in row))
  cells = [[format_value(row.get(column)) for column in columns] for row in rows]
  widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
  lines = []
  for line in (columns, *cells):
    padded = [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
    lines.append("  ".join(padded).rstrip())
  return "\n".join(lines)


def format_value(value: Any) -> str:
  """A number with thousands separators or 4 decimals; text as it is; None as nothing."""
  if value is None:
    return ""
  if isinstance(value, bool | str):
    return str(value)
  return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"
