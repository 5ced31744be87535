"""When the clock or a notice decides, in one process; tests/end_to_end/test_processes.py has two."""

import types

import jax
import numpy as np
import pytest

from deepseek_jax.config_sections import MeshConfig
from deepseek_jax.errors import Stopped
from deepseek_jax.mesh import make_mesh, make_process_max
from deepseek_jax.training import decisions
from deepseek_jax.training.decisions import StepDecisions
from deepseek_jax.training.signals import Notice, StopRequest


@pytest.fixture
def clock(monkeypatch):
  """[seconds], which tests move. There is no wall clock."""
  now = [1000.0]
  monkeypatch.setattr(decisions, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
  return now


@pytest.fixture
def mesh():
  return make_mesh(MeshConfig())


def decide(step):
  step.apply(jax.device_get(step.propose()))
  return step.save_is_due


def test_a_save_is_due_minutes_after_the_last_one(clock, mesh):
  step = StepDecisions(mesh, StopRequest(), minutes=2)
  due = []
  for seconds in (0, 119, 1, 5):
    clock[0] += seconds
    due.append(decide(step))
  assert due == [False, False, True, True]
  step.saved()
  assert not step.save_is_due and not decide(step)
  clock[0] += 119
  assert not decide(step)
  clock[0] += 1
  assert decide(step)


def test_zero_minutes_decide_nothing(clock, mesh):
  step = StepDecisions(mesh, StopRequest(), minutes=0)
  clock[0] += 1e9
  assert not decide(step)


def test_the_clocks_of_other_processes_decide_nothing(clock, mesh, monkeypatch):
  step = StepDecisions(mesh, StopRequest(), minutes=2)
  clock[0] += 1e9
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  assert not decide(step)


def test_a_notice_stops(mesh):
  request = StopRequest(at_once=False)
  step = StepDecisions(mesh, request, minutes=0)
  step.raise_stopped()
  request.receive(Notice.SIGUSR1)
  with pytest.raises(Stopped, match="stopped by SIGUSR1"):
    step.raise_stopped()


def test_the_maximum_over_processes_is_of_each_integer(mesh):
  result = make_process_max(mesh, 2)([7, 0])
  assert result.dtype == np.int32 and result.tolist() == [7, 0] and result.sharding.is_fully_replicated
