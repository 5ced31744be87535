"""Parts of an offline HTML page: tables, sections, and numbers and times as text. Every text is escaped."""

import datetime
import html
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from deepseek_jax.training.run_records import is_number

# Control characters are not allowed in HTML, but a byte-level model may write any of them: show their Unicode pictures.
_CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}


def document(title: str, parts: Iterable[str], style: str = "", refresh_seconds: int = 0) -> str:
  """The page `title` of the HTML `parts`. Its content security policy forbids it to load or run anything.

  Args:
    style: CSS after that of a run's report.
    refresh_seconds: after which a browser loads it again; 0: never.
  """
  style = pathlib.Path(__file__).with_name("report.css").read_text(encoding="utf-8") + style
  refresh = f'<meta http-equiv="refresh" content="{refresh_seconds}">' if refresh_seconds else ""
  policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    f'<meta http-equiv="Content-Security-Policy" content="{policy}">{refresh}'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    '<meta name="color-scheme" content="light dark">'
    f"<title>{escape(title)}</title><style>{style}</style></head>\n<body>"
    + "\n".join(filter(None, parts))
    + "</body></html>\n"
  )


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
  """A table of `rows` of texts under the names of `columns`; no head without these."""
  head = f"<thead><tr>{''.join(f'<th>{escape(name)}</th>' for name in columns)}</tr></thead>" if columns else ""
  body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
  return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def section(title: str, body: str) -> str:
  """The HTML `body` under a title; nothing without a body."""
  return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def format_fixed(value: Any) -> str:
  """A number with four decimals; a dash for what is none."""
  return f"{value:.4f}" if is_number(value) else "–"


def format_duration(duration: float) -> str:
  """`duration` in seconds as "1 h 2 min", "2 min 3 s" or "3.14 s"."""
  minutes, seconds = divmod(round(duration), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours} h {minutes} min"
  return f"{minutes} min {seconds} s" if minutes else f"{duration:.3g} s"


def format_time(seconds: Any) -> str:
  """Unix `seconds` as a date and a time."""
  if not is_number(seconds):
    return "at an unknown time"
  return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def format_json(value: Any) -> str:
  """`value` as JSON, escaped."""
  return escape(json.dumps(value, ensure_ascii=False))


def escape(value: Any) -> str:
  """The text of `value` for HTML."""
  return html.escape(str(value).translate(_CONTROL_PICTURES))
