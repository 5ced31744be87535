import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("openai")


@pytest.fixture(scope="session")
def server():
  """A server of the fake engine with four slots, a queue of four, and 400 tokens."""
  from tests.serve.servers import serving

  with serving() as running:
    yield running
