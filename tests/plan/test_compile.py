"""What a compiler, in a process of its own, can do to a plan."""

import os
import signal

import pytest

from deepseek_jax.errors import ConfigError
from deepseek_jax.plan.compile import parse_required_bytes
from deepseek_jax.plan.subprocess_call import call_in_subprocess

GIB = 2**30


def works(value, log):
  return value, os.path.exists(log), os.getpid()


def refuses(log):
  raise ConfigError("no such topology")


def ends(log):
  with open(log, "w") as f:
    f.write("I0000 hello\nF0000 fusion.cc:1] Check failed: a == b\n*** stack ***\n")
  os.abort()


def is_killed(log):
  os.kill(os.getpid(), signal.SIGKILL)


def is_wrong(log):
  raise TypeError("a mistake of ours")


def test_a_child_answers():
  value, had_log, process = call_in_subprocess(works, 3)
  assert value == 3 and had_log and process != os.getpid()


def test_its_errors_are_ours():
  with pytest.raises(ConfigError, match="^no such topology$"):
    call_in_subprocess(refuses)


def test_its_end_is_an_error_with_its_last_words():
  with pytest.raises(ConfigError, match=r"SIGABRT .*Check failed: a == b.*--analytic"):
    call_in_subprocess(ends)
  with pytest.raises(ConfigError, match="SIGKILL.*memory"):
    call_in_subprocess(is_killed)


def test_a_mistake_is_no_ones_but_ours():
  with pytest.raises(RuntimeError, match="is_wrong(.|\n)*TypeError: a mistake of ours"):
    call_in_subprocess(is_wrong)


@pytest.mark.parametrize(
  ("message", "needed"),
  [
    ("Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded", 20.5 * GIB),
    ("Used 95.74G of 95.74G hbm.", 95.74 * GIB + 1),
    (
      "memory required for HLO temporaries (204.50G) exceeds available HBM (95.73G). HLO module: jit_step.",
      204.5 * GIB,
    ),
    ("INTERNAL: RET_CHECK failure", None),
  ],
)
def test_what_is_said_of_too_little_memory(message, needed):
  assert parse_required_bytes(message) == (needed and int(needed))
