"""Reads bodies of requests, with bounds on their size, their time and the memory of all of them together."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import orjson
from starlette.requests import ClientDisconnect, Request

from deepseek_jax.serve.request_error import RequestError

MAX_BODY_BYTES = 8 * 2**20
MAX_BYTES_IN_FLIGHT = 64 * 2**20
BODY_SECONDS = 30


class BodyReader:
  """Reads bodies of JSON; those that are being read or checked may have MAX_BYTES_IN_FLIGHT together."""

  def __init__(self) -> None:
    self._in_flight = 0

  @contextlib.asynccontextmanager
  async def read(self, request: Request) -> AsyncIterator[bytes]:
    """Yields the body. Raises RequestError, and ClientDisconnect where the client left."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
      # Also because a browser lets any site send plain text here, but asks before it sends JSON.
      raise RequestError(400, "the header Content-Type must be application/json")
    if (
      request.headers.get("content-length", "").isdecimal() and int(request.headers["content-length"]) > MAX_BODY_BYTES
    ):
      raise _too_large()
    body = bytearray()
    try:
      async with asyncio.timeout(BODY_SECONDS):
        await self._read(request, body)
      yield bytes(body)
    except TimeoutError:
      raise RequestError(408, f"the body has not come within {BODY_SECONDS} s") from None
    finally:
      self._in_flight -= len(body)

  async def _read(self, request: Request, body: bytearray) -> None:
    """Appends the body to `body`."""
    more = True
    while more:
      message = await request.receive()
      if message["type"] == "http.disconnect":
        raise ClientDisconnect
      part, more = message.get("body", b""), message.get("more_body", False)
      if len(body) + len(part) > MAX_BODY_BYTES:
        raise _too_large()
      if self._in_flight + len(part) > MAX_BYTES_IN_FLIGHT:
        raise RequestError(429, "too many large requests at a time; try again later", code="busy", retry_after=1)
      body += part
      self._in_flight += len(part)


def parse_json(body: bytes) -> Any:
  """The value of a body. Raises RequestError 400 where it is no JSON."""
  try:
    return orjson.loads(body)
  except orjson.JSONDecodeError as error:
    raise RequestError(400, f"the body is no JSON: {error}", code="invalid_json") from None


def _too_large() -> RequestError:
  return RequestError(413, f"the body is larger than {MAX_BODY_BYTES} bytes", code="body_too_large")
