"""One thread that calls the metric writers of a run, in order, so that a step waits for none of them."""

import contextvars
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

from deepseek_jax.training.metrics import Histograms, MetricsWriter

MAX_PENDING = 64  # lines: a loop that is faster than its writers waits for them, instead of filling the memory
Line = tuple[dict[str, Any], Histograms]


class WriterThread:
  """Writes lines and events to `writers` in the order of the calls.

  After an error what was handed over before the error is raised is dropped. Whatever comes next raises it: a line, an
  event, or `drain`.
  """

  def __init__(self, writers: Sequence[MetricsWriter]):
    self._writers = writers
    self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(MAX_PENDING)
    self._error: Exception | None = None
    # In a copy of the context: a warning goes to the console that is set.
    self._thread = threading.Thread(target=contextvars.copy_context().run, args=[self._run], daemon=True)
    self._thread.start()

  def write(self, step: int, make_line: Callable[[], Line]) -> None:
    """Writes what `make_line` returns, which is called in the thread: (scalars, histograms) of `step`."""

    def call():
      values, histograms = make_line()
      for writer in self._writers:
        writer.write(step, values, histograms)

    self._submit(call)

  def event(self, name: str, step: int, **values: Any) -> None:
    """Writes an event, see MetricsWriter."""

    def call():
      for writer in self._writers:
        writer.event(name, step, **values)

    self._submit(call)

  def drain(self) -> None:
    """Returns once all is written. Raises what a writer raised."""
    self._calls.join()
    self._raise_error()

  def close(self) -> None:
    """Ends the thread once all is written. An error that no call has raised yet is lost: call `drain` before."""
    self._calls.put(None)
    self._thread.join()

  def _submit(self, call: Callable[[], None]) -> None:
    self._raise_error()
    self._calls.put(call)

  def _raise_error(self) -> None:
    error, self._error = self._error, None
    if error:
      raise error

  def _run(self) -> None:
    while call := self._calls.get():
      try:
        if not self._error:
          call()
      except Exception as error:
        self._error = error
      finally:
        self._calls.task_done()
