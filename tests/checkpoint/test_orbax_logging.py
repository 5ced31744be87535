import asyncio
import gc
import logging

import pytest

from deepseek_jax.checkpoint import manager  # noqa: F401  (importing it silences Orbax)


@pytest.mark.parametrize(
  ("text", "logged"),
  [
    ('OUT_OF_RANGE: Error writing "params.2/0" in OCDBT database at local file "x"', False),
    ("another program's", True),
  ],
)
def test_of_futures_that_fail_unseen_only_those_of_checkpoints_are_silent(caplog, text, logged):
  loop = asyncio.new_event_loop()
  future = loop.create_future()
  future.set_exception(ValueError(text))
  with caplog.at_level(logging.ERROR, "asyncio"):
    del future
    gc.collect()
  loop.close()
  assert ["never retrieved" in message for message in caplog.messages] == ([True] if logged else [])
