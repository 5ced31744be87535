"""How long a call takes."""

import time
from collections.abc import Callable, Sequence
from typing import Any


def seconds_per_call(
  function: Callable,
  arguments: Sequence[Sequence],
  wait: Callable[[Any], Any],
  min_seconds: float = 0.05,
  rounds: int = 3,
) -> float:
  """Seconds of a call of `function`, with each of `arguments` in turn, back to back: the best of some rounds.

  Args:
    arguments: one or more tuples of arguments.
    wait: blocks until the result that it gets is computed.
    min_seconds: a round has as many calls as take this long.
    rounds: how many.
  """
  calls = len(arguments)
  times: list[float] = []
  wait(function(*arguments[0]))
  while len(times) < rounds:
    started = time.perf_counter()
    for i in range(calls):
      result = function(*arguments[i % len(arguments)])
    wait(result)
    seconds = time.perf_counter() - started
    if seconds < min_seconds:
      calls = int(calls * min(max(1.2 * min_seconds / seconds, 1.5), 100)) + 1
    else:
      times.append(seconds / calls)
  return min(times)
