"""The HTTP process's side of the socket to the engine."""

import asyncio
import contextlib
import itertools
import socket
from collections.abc import Callable, Sequence

from deepseek_jax.generate.request import EngineStats, Output, Request, Sampling
from deepseek_jax.serve.messages import (
  ALIVE_SECONDS,
  LineReader,
  MessageError,
  Settings,
  decode_output,
  decode_settings,
  encode_request,
)
from deepseek_jax.serve.messages import encode as encode_message
from deepseek_jax.serve.request_error import RequestError

READ_BYTES = 2**18
STATS_SECONDS = 10  # an engine that compiles or prefills a long prompt answers late
RETRY_AFTER_SECONDS = 1
# For a busy engine, which reads between its steps. Requests whose clients left are not open any more, but wait here too.
MAX_UNSENT_BYTES = 16 * 2**20


class EngineClient:
  """Requests of this process at the engine.

  Args:
    reader, writer: of the socket; the settings have been read from it.
    limit: requests that may be open at a time.
    on_shutdown: called with the seconds that open requests have left.
  """

  def __init__(
    self,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    lines: LineReader,
    limit: int,
    on_shutdown: Callable[[float], None],
  ):
    self._reader, self._writer, self._lines = reader, writer, lines
    self._limit, self._on_shutdown = limit, on_shutdown
    self._ids = itertools.count()
    self._open: dict[int, asyncio.Queue[Output | RequestError]] = {}
    self._stats: asyncio.Future[EngineStats] | None = None  # while they are asked for
    self._closed: RequestError | None = None

  def check_room(self, count: int) -> None:
    """Raises RequestError 429 unless `count` more requests may be sent now, and 400 where they never may."""
    if count > self._limit:
      raise RequestError(
        400, f"this request asks for {count} answers; the server takes {self._limit} at a time, send fewer", "n"
      )
    if len(self._open) + count > self._limit:
      raise RequestError(
        429,
        f"the queue is full: {len(self._open)} requests are open and {self._limit} may be; try again later",
        code="queue_full",
        retry_after=RETRY_AFTER_SECONDS,
      )
    if (unsent := self._writer.transport.get_write_buffer_size()) > MAX_UNSENT_BYTES:
      raise RequestError(
        429,
        f"the engine is busy: {unsent} bytes of requests wait for it; try again later",
        code="engine_busy",
        retry_after=RETRY_AFTER_SECONDS,
      )

  def submit(self, requests: Sequence[tuple[Sequence[int], Sampling]]) -> "Submission":
    """Sends (prompt, sampling) pairs to the engine. Raises RequestError where there is no room or no engine."""
    if self._closed:
      raise self._closed
    self.check_room(len(requests))
    submission = Submission(self)
    for prompt, sampling in requests:
      request = Request(next(self._ids), tuple(prompt), sampling)
      self._writer.write(encode_request(request))
      self._open[request.id] = submission.queue
      submission.ids.append(request.id)
    return submission

  def cancel(self, id: int) -> None:
    """Tells the engine that nobody waits for the request `id`; does nothing where it is finished."""
    if self._open.pop(id, None) is not None and not self._closed:
      self._writer.write(encode_message({"type": "cancel", "id": id}))

  async def stats(self) -> EngineStats:
    """The engine's statistics now. Raises RequestError 503 where it does not answer."""
    if self._closed:
      raise self._closed
    if self._stats is None:
      self._stats = asyncio.get_running_loop().create_future()
      self._writer.write(encode_message({"type": "stats"}))
    try:
      return await asyncio.wait_for(asyncio.shield(self._stats), STATS_SECONDS)
    except TimeoutError:
      raise RequestError(503, f"the engine has not answered for {STATS_SECONDS} s", code="engine_busy") from None

  def ready(self) -> None:
    """Tells the engine process that HTTP is served."""
    self._writer.write(encode_message({"type": "ready"}))

  async def beat(self) -> None:
    """Tells the engine process every ALIVE_SECONDS that this one goes on."""
    while True:
      self._writer.write(encode_message({"type": "alive"}))
      await asyncio.sleep(ALIVE_SECONDS)

  def fail_all(self, message: str) -> None:
    """Ends all open requests with status 503, and refuses new ones."""
    self._closed = RequestError(503, message, code="shutting_down", retry_after=RETRY_AFTER_SECONDS)
    for queue in {id(queue): queue for queue in self._open.values()}.values():
      queue.put_nowait(self._closed)
    if self._stats and not self._stats.done():
      self._stats.set_exception(self._closed)
      self._stats.exception()  # nobody may be waiting

  async def read(self) -> None:
    """Hands out what the engine process says, until it closes the socket. Raises MessageError."""
    with contextlib.suppress(ConnectionError):  # as the end
      while data := await self._reader.read(READ_BYTES):
        for message in self._lines.feed(data):
          self._take(message)

  def _take(self, message: dict) -> None:
    match message["type"]:
      case "outputs":
        for fields in message["outputs"]:
          output = decode_output(fields)
          self._put(output.id, output, output.finish_reason is not None)
      case "rejected":
        self._put(message["id"], RequestError(400, message["message"]), True)
      case "stats":
        if self._stats and not self._stats.done():
          self._stats.set_result(EngineStats(**message["stats"]))
        self._stats = None
      case "shutdown":
        self._on_shutdown(message["seconds"])
      case other:
        raise MessageError(f"unknown message {other!r} from the engine")

  def _put(self, id: int, item: Output | RequestError, last: bool) -> None:
    if queue := self._open.get(id):  # else it was cancelled
      queue.put_nowait(item)
      if last:
        del self._open[id]


class Submission:
  """Requests that were sent together. As a context it cancels, at its end, those that are not finished."""

  def __init__(self, client: EngineClient):
    self._client = client
    self.queue: asyncio.Queue[Output | RequestError] = asyncio.Queue()
    self.ids: list[int] = []

  def __enter__(self) -> "Submission":
    return self

  def __exit__(self, *_: object) -> None:
    for index in range(len(self.ids)):
      self.cancel(index)

  async def get(self) -> tuple[int, Output]:
    """(index, the next output) of any request that is not cancelled.

    Raises RequestError where the engine rejects one or ends.
    """
    while True:
      output = await self.queue.get()
      if isinstance(output, RequestError):
        raise output
      if output.id in self.ids:
        return self.ids.index(output.id), output

  def cancel(self, index: int) -> None:
    """Frees the request at the engine, if it is not finished; `get` gives nothing of it any more."""
    self._client.cancel(self.ids[index])
    self.ids[index] = -1


async def read_settings(
  channel: socket.socket,
) -> tuple[Settings, LineReader, asyncio.StreamReader, asyncio.StreamWriter]:
  """Connects to `channel` and waits for the settings, which are the first message. Raises MessageError."""
  reader, writer = await asyncio.open_connection(sock=channel)
  lines = LineReader()
  messages: list[dict] = []
  while not messages:
    if not (data := await reader.read(READ_BYTES)):
      raise MessageError("the engine process closed the socket before it sent the settings")
    messages = lines.feed(data)
  if len(messages) > 1 or messages[0]["type"] != "settings":
    raise MessageError(f"expected the settings alone, got {[m['type'] for m in messages]}")
  return decode_settings(messages[0]["settings"]), lines, reader, writer
