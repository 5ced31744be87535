"""What all processes of a run do at the same step although one alone has a reason: stop for a notice, save by the clock."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from deepseek_jax.mesh import make_process_max
from deepseek_jax.training.signals import StopRequest


class StepDecisions:
  """Decisions after each step. They cost a run of several processes one collective of two integers a step.

  Args:
    minutes: between checkpoints, counted by process 0 from the last one or the start; 0: the clock decides nothing.

  save_is_due: whether `minutes` have passed, as of the last decision.
  """

  def __init__(self, mesh: Mesh, request: StopRequest, minutes: float):
    self._request, self._seconds = request, 60 * minutes
    self._process_max: Callable[[Sequence[int]], Any] = np.asarray
    if jax.process_count() > 1:
      self._process_max = make_process_max(mesh, 2)
    self.saved()

  def saved(self) -> None:
    """Counts the time from now on."""
    self._saved_at, self.save_is_due = time.monotonic(), False

  def propose(self) -> Any:
    """Starts the decision, of what this process knows now, and returns it as an array int32 [2]. Waits for no process."""
    save_is_due = self._seconds and jax.process_index() == 0 and time.monotonic() >= self._saved_at + self._seconds
    return self._process_max([self._request.encode(), int(save_is_due)])

  def apply(self, decision: np.ndarray) -> None:
    """Sets `save_is_due`, and what the request says to stop for, by what `propose` returned."""
    notice, save_is_due = decision.tolist()
    self.save_is_due = bool(save_is_due)
    self._request.decode(notice)

  def agree(self) -> None:
    """Proposes and applies a decision. Waits for all processes, which have to call this."""
    self.apply(np.asarray(self.propose()))

  def raise_stopped(self) -> None:
    """As `agree`; raises Stopped, in all processes, once one of them has received a notice."""
    self.agree()
    if self._request.stop:
      raise self._request.stopped()
