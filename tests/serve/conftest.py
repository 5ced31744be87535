import pytest

from tests.serve.servers import serving


@pytest.fixture(scope="session")
def server():
  """A server of the fake engine with four slots, a queue of four, and 400 tokens."""
  with serving() as running:
    yield running
