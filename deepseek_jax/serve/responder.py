"""Sends the answers to a request, whole or as server-sent events, and stops the engine's work when the client leaves."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, Protocol

import orjson
from starlette.responses import Response
from starlette.types import Receive, Send

from deepseek_jax.serve.answers import Delta, Usage
from deepseek_jax.serve.parameters import Parameters
from deepseek_jax.serve.request_error import RequestError

EVENT_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]  # fmt: skip
DONE = b"data: [DONE]\n\n"
# Clients that split a stream into lines as Python does take these for ends of lines (httpx's iter_lines, guidellm).
LINE_ENDS = [(character.encode(), f"\\u{ord(character):04x}".encode()) for character in "\x85\u2028\u2029"]


class Shape(Protocol):
  """The JSON of a protocol's answers."""

  object_name: str
  chunk_object_name: str
  id_prefix: str

  def opening(self, index: int) -> list[dict[str, Any]]:
    """Choices of a stream's first chunk."""

  def chunk(self, delta: Delta) -> dict[str, Any]:
    """A choice of a chunk."""

  def choice(self, whole: Delta) -> dict[str, Any]:
    """A choice of a response that is no stream."""


class Responder:
  """One response.

  Args:
    shape: of the protocol.
    model: its name.
    deltas: by `answers.answer`. usage: which that counts in.
    choices: their number.
  """

  def __init__(
    self,
    shape: Shape,
    parameters: Parameters,
    model: str,
    deltas: AsyncIterator[Delta],
    usage: Usage,
    choices: int,
  ):
    self._shape, self._parameters, self._deltas, self._usage = shape, parameters, deltas, usage
    self._choices = choices
    self._head = {"id": f"{shape.id_prefix}{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

  async def send(self, send: Send) -> None:
    """Sends all. Raises RequestError before anything is sent."""
    if self._parameters.stream:
      await self._send_events(send)
    else:
      await self._send_whole(send)

  async def _send_whole(self, send: Send) -> None:
    parts: list[list[Delta]] = [[] for _ in range(self._choices)]
    async for delta in self._deltas:
      parts[delta.index].append(delta)
    choices = [self._shape.choice(_merge(deltas)) for deltas in parts]
    body = {**self._head, "object": self._shape.object_name, "choices": choices, "usage": self._usage.to_json()}
    content = orjson.dumps(body)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": content})

  async def _send_events(self, send: Send) -> None:
    first = await anext(self._deltas)  # an error before it has a status of its own
    await send({"type": "http.response.start", "status": 200, "headers": EVENT_HEADERS})
    openings = [choice for index in range(self._choices) for choice in self._shape.opening(index)]
    await self._send_body(send, b"".join(self._event([choice]) for choice in openings) + self._delta_event(first))
    try:
      async for delta in self._deltas:
        await self._send_body(send, self._delta_event(delta))
    except RequestError as error:
      await self._send_body(send, _data(error.to_json()), more=False)
      return
    last = self._event([], usage=True) if self._parameters.include_usage else b""
    await self._send_body(send, last + DONE, more=False)

  def _delta_event(self, delta: Delta) -> bytes:
    return self._event([self._shape.chunk(delta)])

  def _event(self, choices: Sequence[dict[str, Any]], usage: bool = False) -> bytes:
    event = {**self._head, "object": self._shape.chunk_object_name, "choices": choices}
    if usage or self._parameters.continuous_usage:
      event["usage"] = self._usage.to_json()
    elif self._parameters.include_usage:
      event["usage"] = None
    return _data(event)

  async def _send_body(self, send: Send, body: bytes, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


class ErrorResponse(Response):
  """A RequestError as a response."""

  media_type = "application/json"

  def __init__(self, error: RequestError):
    super().__init__(orjson.dumps(error.to_json()), error.status, error.headers)


async def run_while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> bool:
  """Runs `work`, and cancels it as soon as the client is gone. Returns whether it ran to its end.

  The body has to be read before. Raises what `work` raises.
  """
  task = asyncio.create_task(work)
  watcher = asyncio.create_task(_wait_for_disconnect(receive))
  try:
    await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
      task.result()
      return True
    return False
  finally:
    for other in (task, watcher):
      other.cancel()
    await asyncio.gather(task, watcher, return_exceptions=True)


def _merge(deltas: Sequence[Delta]) -> Delta:
  """One Delta of all that became known of a choice."""
  tokens = tuple(entry for delta in deltas for entry in delta.tokens)
  return Delta(deltas[0].index, "".join(delta.text for delta in deltas), tokens, deltas[-1].finish_reason)


def _data(event: dict[str, Any]) -> bytes:
  content = orjson.dumps(event)
  for character, escaped in LINE_ENDS:
    content = content.replace(character, escaped)
  return b"data: " + content + b"\n\n"


async def _wait_for_disconnect(receive: Receive) -> None:
  while (await receive())["type"] != "http.disconnect":
    pass
