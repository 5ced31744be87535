import asyncio
import contextlib
import socket

import pytest

from deepseek_jax.generate.request import Sampling
from deepseek_jax.serve import client
from deepseek_jax.serve.messages import LineReader
from deepseek_jax.serve.request_error import RequestError


def test_requests_that_leave_again_do_not_pile_up_before_an_engine_that_is_busy():
  async def submit_and_leave():
    ours, engine = socket.socketpair()
    with engine:
      reader, writer = await asyncio.open_connection(sock=ours)
      made = client.EngineClient(reader, writer, LineReader(), 4, lambda seconds: None)
      try:
        for _ in range(4 * client.MAX_UNSENT_BYTES // 200_000):
          with made.submit([((1,) * 100_000, Sampling(max_tokens=1))]):
            await asyncio.sleep(0)
      finally:
        assert writer.transport.get_write_buffer_size() < client.MAX_UNSENT_BYTES + 300_000
        writer.transport.abort()
        with contextlib.suppress(ConnectionError):
          await writer.wait_closed()

  with pytest.raises(RequestError, match="try again later") as refused:
    asyncio.run(submit_and_leave())
  assert refused.value.status == 429 and refused.value.retry_after
