"""Work by a process of its own: libtpu ends the process that asks for a program at which one of its own checks fails."""

import multiprocessing
import re
import signal
import tempfile
import traceback

from deepseek_jax.errors import ConfigError

ADVICE = "change the mesh or the microbatch a little, or plan with --analytic"


def in_child(function, *arguments):
  """`function(*arguments, log)` by a process of its own; `log` is the path of a file for what is said until it ends.

  Raises:
    ConfigError: that of the function, or, where a signal ended the process, one with what it said last.
    RuntimeError: with the traceback of any other error of the function.
  """
  context = multiprocessing.get_context("spawn")
  receive, send = context.Pipe(duplex=False)
  with tempfile.NamedTemporaryFile("r", errors="replace") as log:
    child = context.Process(target=_answer, args=(send, function, *arguments, log.name), daemon=True)
    child.start()
    send.close()
    try:
      answer = receive.recv()
    except EOFError:
      child.join()
      answer = _ended(child.exitcode, log.read())
    finally:
      child.kill()
  if isinstance(answer, Exception):
    raise answer
  return answer


def _answer(send, function, *arguments):
  try:
    send.send(function(*arguments))
  except ConfigError as error:
    send.send(error)
  except Exception:
    send.send(RuntimeError(traceback.format_exc()))


def _ended(code, text):
  """The error of a process that gave no answer, by its exit code and what it said."""
  if code >= 0:  # it never came to the function: its traceback is on stderr
    return RuntimeError(f"the process that was to compile ended with exit code {code}, see above")
  if -code == signal.SIGKILL:
    return ConfigError(
      "the compiler was killed by SIGKILL, perhaps for lack of memory on this machine: plan with --analytic"
    )
  failed = re.search(r"(?:Check failed|F\d{4} |Fatal).*", text)
  words = (failed[0] if failed else text.strip()[-200:] or "it said nothing")[:300]
  return ConfigError(f"libtpu ended the compilation by {signal.Signals(-code).name} ({words}): {ADVICE}")
