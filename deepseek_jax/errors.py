"""User errors: the command line prints one line, without a traceback, and exits with code 2."""


class UserError(Exception):
  """Base of all user errors. The message says what was expected, what came, and what to do."""


class ConfigError(UserError):
  """A config field, file or combination of fields that cannot run."""


class DataError(UserError):
  """A data source, tokenizer or packed file that cannot be used."""


class CheckpointError(UserError):
  """A checkpoint that cannot be saved or restored, or not with this config."""


class WriteError(UserError):
  """A file of the run that cannot be written, as on a full disk."""


class StorageError(UserError):
  """A bucket that cannot be reached, or that denies access."""


class Stopped(KeyboardInterrupt):
  """A notice to stop, such as SIGTERM, at a moment at which a run has nothing to save.

  notice: its name. exit_code: that of the program.
  """

  def __init__(self, notice: str, exit_code: int):
    super().__init__(f"stopped by {notice}")
    self.notice, self.exit_code = notice, exit_code


def format_exception(error: BaseException) -> str:
  """The type of an exception and the first line of its message, at most 300 characters of it."""
  first_line = (str(error).strip().splitlines() or [""])[0]
  return f"{type(error).__name__}: {first_line:.300}"
