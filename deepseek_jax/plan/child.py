"""Work by a process of its own: libtpu ends the process that asks for a program at which one of its own checks fails."""

import multiprocessing
import re
import tempfile

from deepseek_jax.errors import ConfigError

ADVICE = "change the mesh or the microbatch a little, or plan with --analytic"


def in_child(function, *arguments):
  """`function(*arguments, log)` by a process of its own; `log` is the path of a file for what is said until it ends.

  Raises ConfigError: that of the function, or, where the process ended without an answer, one with what it said last.
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
      raise ConfigError(f"libtpu ended the compilation ({_last_words(log.read())}): {ADVICE}") from None
    finally:
      child.kill()
  if isinstance(answer, ConfigError):
    raise answer
  return answer


def _answer(send, function, *arguments):
  try:
    send.send(function(*arguments))
  except ConfigError as error:
    send.send(error)


def _last_words(text):
  failed = re.search(r"(?:Check failed|F\d{4} |Fatal).*", text)
  return (failed[0] if failed else text.strip()[-200:] or "it said nothing")[:300]
