"""Functions called in a process of their own, and how that process may end."""

import os
import signal

import pytest

from deepseek_jax.errors import ConfigError
from deepseek_jax.plan.subprocess_call import call_in_subprocess


def return_value(value, log):
  return value, os.path.exists(log), os.getpid()


def raise_config_error(log):
  raise ConfigError("no such topology")


def abort(log):
  with open(log, "w") as f:
    f.write("I0000 hello\nF0000 fusion.cc:1] Check failed: a == b\n*** stack ***\n")
  os.abort()


def kill_self(log):
  os.kill(os.getpid(), signal.SIGKILL)


def raise_type_error(log):
  raise TypeError("a bug")


def test_the_result_of_the_process_is_returned():
  value, has_log, process = call_in_subprocess(return_value, 3)
  assert value == 3 and has_log and process != os.getpid()


def test_a_config_error_is_raised_as_it_is():
  with pytest.raises(ConfigError, match="^no such topology$"):
    call_in_subprocess(raise_config_error)


def test_a_process_that_is_ended_by_a_signal_is_an_error_with_its_log():
  with pytest.raises(ConfigError, match=r"SIGABRT .*Check failed: a == b.*--analytic"):
    call_in_subprocess(abort)
  with pytest.raises(ConfigError, match="SIGKILL.*memory"):
    call_in_subprocess(kill_self)


def test_any_other_error_is_raised_with_its_traceback():
  with pytest.raises(RuntimeError, match="raise_type_error(.|\n)*TypeError: a bug"):
    call_in_subprocess(raise_type_error)
