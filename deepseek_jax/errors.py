"""User errors: the command line prints one line of them and exits with code 2."""


class UserError(Exception):
  """Says what was expected, what came, and what to do. Shown without a traceback."""


class ConfigError(UserError):
  """A field, file or combination of fields that cannot be run."""


class DataError(UserError):
  """A source, tokenizer or packed file that cannot be trained on."""


class CheckpointError(UserError):
  """A checkpoint that cannot be restored, or not under this config."""


class StorageError(UserError):
  """A bucket that cannot be reached, or refuses."""
