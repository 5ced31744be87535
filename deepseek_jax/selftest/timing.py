"""How long a call takes."""

import time
from collections.abc import Callable, Sequence
from typing import Any


def seconds_a_call(
  function: Callable, arguments: Sequence[Sequence], wait: Callable[[Any], Any], least: float = 0.05, rounds: int = 3
) -> float:
  """Of calls with each of `arguments` in turn, back to back: the best of `rounds` rounds that take `least` seconds or more.

  wait: blocks until the result that it gets is there.
  """
  calls, times = len(arguments), []
  wait(function(*arguments[0]))
  while len(times) < rounds:
    started = time.perf_counter()
    for i in range(calls):
      result = function(*arguments[i % len(arguments)])
    wait(result)
    took = time.perf_counter() - started
    if took < least:
      calls = int(calls * min(max(1.2 * least / took, 1.5), 100)) + 1
    else:
      times.append(took / calls)
  return min(times)
