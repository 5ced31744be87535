"""Calls a function in a process of its own: libtpu aborts the whole process where one of its internal checks fails."""

import multiprocessing
import re
import signal
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from deepseek_jax.errors import ConfigError

ADVICE = "change the mesh or the microbatch a little, or plan with --analytic"


def call_in_subprocess(function: Callable, *arguments: Any) -> Any:
  """Returns `function(*arguments, log)`, called in a spawned process.

  `log` is the path of a file. What the function writes there is quoted in the error message if the process dies. The
  function, its arguments and its result must be picklable.

  Raises:
    ConfigError: raised by the function, or the process was ended by a signal.
    RuntimeError: any other error of the function, with its traceback as the message.
  """
  context = multiprocessing.get_context("spawn")
  receiver, sender = context.Pipe(duplex=False)
  with tempfile.NamedTemporaryFile("r", errors="replace") as log:
    process = context.Process(target=_send_result, args=(sender, function, *arguments, log.name), daemon=True)
    process.start()
    sender.close()
    try:
      result = receiver.recv()
    except EOFError:
      process.join()
      result = _exit_error(process.exitcode, log.read())
    finally:
      process.kill()
  if isinstance(result, Exception):
    raise result
  return result


def _send_result(sender: Connection, function: Callable, *arguments: Any) -> None:
  try:
    sender.send(function(*arguments))
  except ConfigError as error:
    sender.send(error)
  except Exception:
    sender.send(RuntimeError(traceback.format_exc()))


def _exit_error(exit_code: int | None, log: str) -> Exception:
  """The error for a process that ended without a result."""
  if exit_code is None or exit_code >= 0:  # it ended before the call: its traceback is on stderr
    return RuntimeError(f"the compiler process ended with exit code {exit_code}; its error is printed above")
  if -exit_code == signal.SIGKILL:
    return ConfigError(
      "the compiler was killed by SIGKILL, perhaps for lack of memory on this machine: plan with --analytic"
    )
  check = re.search(r"(?:Check failed|F\d{4} |Fatal).*", log)
  reason = check[0] if check else log.strip()[-200:] or "no message"
  return ConfigError(f"libtpu aborted with {signal.Signals(-exit_code).name} ({reason[:300]}): {ADVICE}")
