import io
import logging
import os
import threading

import pytest

from deepseek_jax import console
from deepseek_jax.console import (
  Console,
  SilentConsole,
  current_console,
  format_bytes,
  format_gib,
  log_to_console,
  printable,
  set_console,
)


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.fixture(autouse=True)
def terminal_type(monkeypatch):
  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.setenv("COLUMNS", "80")


def test_lines_go_to_stdout_and_stderr_of_the_moment(capsys):
  shown = Console()
  shown.print("a\nb")
  shown.print("c", err=True)
  assert capsys.readouterr() == ("a\nb\n", "c\n")


def test_a_reader_that_has_gone_ends_no_run():
  reader, writer = os.pipe()
  os.close(reader)
  with open(writer, "w") as out:
    shown = Console(out)
    for _ in range(2):
      shown.print("a line")


def test_streams_take_what_is_shown_of_them(capsys):
  out, err = io.StringIO(), io.StringIO()
  shown = Console(out, err)
  with shown.step_progress(0, 2) as update:
    update(1, "loss 1")
    shown.print("between")
    update(2, "loss 0.5")
  with shown.byte_progress("data: packing x", 2_000_000) as update_bytes:
    update_bytes(1)
  assert out.getvalue().splitlines()[:2] == ["step 1/2  loss 1  -:--:-- left", "between"]
  assert out.getvalue().splitlines()[2].startswith("step 2/2  loss 0.5  0:00:0")
  assert err.getvalue() == "data: packing x (1.91 MiB)\n"
  assert capsys.readouterr() == ("", "")


def test_lines_of_progress_are_seconds_apart_but_for_the_last(monkeypatch):
  now, out = [0.0], io.StringIO()
  monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
  with Console(out).step_progress(10, 110) as update:
    for step in range(11, 111):
      update(step, "fast")
      now[0] += 1
  steps = [line.split("/")[0] for line in out.getvalue().splitlines()]
  assert steps == [f"step {step}" for step in (*range(11, 111, 5), 110)]
  assert "step 61/110  fast  0:00:49 left" in out.getvalue()


def test_a_terminal_has_a_bar_and_lines_above_it():
  out = Terminal()
  shown = Console(out, Terminal())
  with shown.step_progress(0, 2) as update:
    update(1, "loss 1")
    shown.print("above [bold]it[/bold]")
    update(2, "loss 0.5")
  assert "━" in out.getvalue() and "loss 0.5" in out.getvalue() and "above [bold]it[/bold]" in out.getvalue()
  shown.print("after")
  assert out.getvalue().endswith("after\n")
  with shown.byte_progress("data: packing x", 100) as update_bytes:
    update_bytes(100)
  assert "100/100 bytes" in shown._err.getvalue()


def test_a_subclass_without_bars_gets_every_line():
  class Lines(Console):
    def __init__(self):
      super().__init__(Terminal(), Terminal(), bars=False)
      self.lines = []

    def print(self, text, err=False):
      self.lines.append((text.split("  ")[0], err))

  shown = Lines()
  shown.print("a")
  with shown.step_progress(0, 1) as update, shown.byte_progress("data", 1):
    update(1, "loss 1")
  assert shown.lines == [("a", False), ("data (1 B)", True), ("step 1/1", False)]


def test_what_the_package_logs_goes_to_the_console_alone(caplog):
  class Lines(Console):
    def print(self, text, err=False):
      lines.append((text, err))

  lines, logger = [], logging.getLogger("deepseek_jax.kernels.implementations")
  with set_console(Lines()), log_to_console():
    logger.warning("%s: falling back to XLA", "quantize")
    logger.info("not shown")
  assert lines == [("quantize: falling back to XLA", True)] and not caplog.records
  logger.warning("as before")
  assert len(lines) == 1 and [record.getMessage() for record in caplog.records] == ["as before"]


def test_a_silent_console_prints_nothing(capsys):
  shown = SilentConsole()
  shown.print("a")
  shown.print("b", err=True)
  with shown.step_progress(0, 1) as update, shown.byte_progress("data", 1) as update_bytes:
    update(1, "loss 1")
    update_bytes(1)
  assert capsys.readouterr() == ("", "")


def test_the_current_console_is_set_for_a_block_in_one_thread():
  first, second, elsewhere = current_console(), SilentConsole(), []
  with set_console(second):
    assert current_console() is second
    thread = threading.Thread(target=lambda: elsewhere.append(current_console()))
    thread.start()
    thread.join()
  assert current_console() is first and elsewhere == [first]


@pytest.mark.parametrize(
  ("size", "text", "gib"),
  [
    (0, "0 B", "0.0"), (1, "1 B", "1 B"), (1023, "1023 B", "1023 B"), (1024, "1.00 KiB", "1.00 KiB"),
    (1.5 * 2**20, "1.50 MiB", "1.50 MiB"), (2**30, "1.00 GiB", "1.0"), (65.84 * 2**30, "65.8 GiB", "65.8"),
    (0.04 * 2**30, "41.0 MiB", "41.0 MiB"), (0.1 * 2**30, "102 MiB", "0.1"), (2374.8 * 2**30, "2,375 GiB", "2,374.8"),
  ],
)  # fmt: skip
def test_sizes_never_read_as_nothing(size, text, gib):
  assert (format_bytes(size), format_gib(size, 1)) == (text, gib)


def test_printable_text_has_nothing_that_a_terminal_obeys():
  assert printable("a\x1b[31m\nb\x7f\x9bé") == "a␛[31m␊b␡\ufffdé"
