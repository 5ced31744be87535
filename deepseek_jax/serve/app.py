"""The routes of the server."""

import asyncio
import contextlib
import hmac
import time
from collections.abc import Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.serve import chat, completions
from deepseek_jax.serve.answers import Choice, Usage, answer
from deepseek_jax.serve.chat_template import ChatTemplate
from deepseek_jax.serve.client import EngineClient
from deepseek_jax.serve.messages import Settings
from deepseek_jax.serve.metrics import ChoiceTimer, Metrics
from deepseek_jax.serve.parameters import Parameters
from deepseek_jax.serve.request_body import BodyReader, parse_json
from deepseek_jax.serve.request_error import RequestError
from deepseek_jax.serve.responder import ErrorResponse, Responder, Shape, run_while_connected

ROUTES = ("/v1/models", "/v1/completions", "/v1/chat/completions", "/health", "/metrics")
CLIENT_LEFT = 499  # nginx's status for a client that did not wait
MOST_CHARACTERS_PER_TOKEN = 128  # of longer texts than max_length such tokens, none is encoded

Prepared = tuple[Parameters, Shape, list[Choice]]


class Service:
  """What the routes share."""

  def __init__(self, settings: Settings, tokenizer: Tokenizer, template: ChatTemplate, client: EngineClient):
    self.settings, self.tokenizer, self.template, self.client = settings, tokenizer, template, client
    self.metrics, self.bodies = Metrics(), BodyReader()

  async def health(self, request: Request) -> Response:
    """200 while the engine answers."""
    await self.client.stats()
    return JSONResponse({"status": "ok"})

  async def show_metrics(self, request: Request) -> Response:
    """Prometheus' text format."""
    stats = await self.client.stats()
    return Response(self.metrics.to_text(stats), media_type="text/plain; version=0.0.4")

  async def list_models(self, request: Request) -> Response:
    """The one model."""
    return JSONResponse({"object": "list", "data": [self._model()]})

  async def show_model(self, request: Request) -> Response:
    """The model of a name."""
    name = request.path_params["name"]
    if name != self.settings.model:
      raise RequestError(
        404, f"no model {name!r:.200} here; this server has {self.settings.model!r}", "model", "model_not_found"
      )
    return JSONResponse(self._model())

  def _model(self) -> dict[str, Any]:
    return {
      "id": self.settings.model,
      "object": "model",
      "created": self.settings.created,
      "owned_by": "deepseek_jax",
      "max_model_len": self.settings.max_length,
    }

  def complete(self, body: Any) -> Prepared:
    """What a body of /v1/completions asks for. Raises RequestError."""
    parsed = completions.parse_completion(body, self.settings)
    self._check_size([prompt for prompt in parsed.prompts if isinstance(prompt, str)], "prompt")
    choices = completions.make_choices(parsed, self.settings, self.tokenizer)
    return parsed.parameters, completions.CompletionShape(parsed.parameters, self.tokenizer), choices

  def chat(self, body: Any) -> Prepared:
    """What a body of /v1/chat/completions asks for. Raises RequestError."""
    parsed = chat.parse_chat(body, self.settings)
    self._check_size(["".join(message["content"] for message in parsed.messages)], "messages")
    choices = chat.make_choices(parsed, self.settings, self.tokenizer, self.template)
    return parsed.parameters, chat.ChatShape(parsed.parameters, self.tokenizer), choices

  def _check_size(self, texts: Sequence[str], name: str) -> None:
    most = self.settings.max_length * MOST_CHARACTERS_PER_TOKEN
    if (longest := max(map(len, texts), default=0)) > most:
      raise RequestError(
        400,
        f"a prompt of {longest} characters is too long: this server's limit is {self.settings.max_length} tokens for prompt "
        "and answer",
        name,
        "context_length_exceeded",
      )


class Generation:
  """An ASGI app that answers one protocol's requests.

  Args:
    prepare: `Service.complete` or `Service.chat`.
  """

  def __init__(self, service: Service, prepare: Callable[[Any], Prepared]):
    self._service, self._prepare = service, prepare

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """Reads the body, and sends the answers while the client listens. Raises RequestError before it sends anything."""
    started = time.monotonic()
    service = self._service
    try:
      async with service.bodies.read(Request(scope, receive)) as body:
        service.client.check_room(1)  # before work on a prompt that would be refused
        # In a thread: a large body takes long to check and to tokenize, and streams must go on.
        parameters, shape, choices = await asyncio.to_thread(lambda: self._prepare(parse_json(body)))
    except ClientDisconnect:
      scope["state"]["left"] = True
      return
    usage = Usage(sum(len(choice.prompt) for choice in choices[:: parameters.n]))
    timers = [ChoiceTimer(service.metrics, started) for _ in choices]
    deltas = answer(service.client, service.tokenizer, choices, parameters.n, usage, timers)
    responder = Responder(shape, parameters, service.settings.model, deltas, usage, len(choices))
    async with contextlib.aclosing(deltas):
      scope["state"]["left"] = not await run_while_connected(receive, responder.send(send))


class Gate:
  """ASGI middleware: who may ask, and a count of what they got."""

  def __init__(self, app: ASGIApp, service: Service):
    self._app, self._service = app, service
    key = service.settings.api_key
    self._key = None if key is None else key.encode()

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """Passes a request on, or answers it with an error."""
    status = CLIENT_LEFT

    async def counting_send(message: Message) -> None:
      nonlocal status
      if message["type"] == "http.response.start":
        status = message["status"]
      await send(message)

    route = scope["path"] if scope["path"] in ROUTES else "other"
    try:
      if refusal := self._refusal(scope):
        await ErrorResponse(refusal)(scope, receive, counting_send)
      else:
        await self._app(scope, receive, counting_send)
    except Exception:  # whose response is made outside of this
      status = 500
      raise
    finally:
      status = CLIENT_LEFT if scope.get("state", {}).get("left") else status
      self._service.metrics.responses.labels(route, str(status)).inc()

  def _refusal(self, scope: Scope) -> RequestError | None:
    headers = dict(scope["headers"])
    hosts = self._service.settings.local_hosts
    host = headers.get(b"host", b"").decode("latin-1").lower()
    if hosts is not None and (host.rpartition(":")[0] if _has_port(host) else host) not in hosts:
      # A page of another site, whose name its owner has pointed to 127.0.0.1, names that site.
      return RequestError(
        403, f"the header Host must name this machine: {', '.join(hosts)}, got {host[:200]!r}; with --api_key any name is served"
      )  # fmt: skip
    if self._key is not None and scope["path"].startswith("/v1"):
      scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
      is_bearer = scheme.lower() == b"bearer"  # RFC 9110: in any case
      if not (hmac.compare_digest(given.strip(), self._key) and is_bearer):
        message = "wrong API key" if is_bearer and given else "no API key"
        return RequestError(401, f"{message}: send the header Authorization: Bearer KEY", code="invalid_api_key")
    return None


def make_app(service: Service) -> Starlette:
  """The ASGI app. Errors have OpenAI's body."""
  routes = [
    Route("/v1/models", service.list_models),
    Route("/v1/models/{name:path}", service.show_model),
    Route("/v1/completions", Generation(service, service.complete), methods=["POST"]),
    Route("/v1/chat/completions", Generation(service, service.chat), methods=["POST"]),
    Route("/health", service.health),
    Route("/metrics", service.show_metrics),
  ]
  handlers: dict[Any, Any] = {RequestError: _request_error, HTTPException: _http_error, Exception: _server_error}
  app = Starlette(routes=routes, exception_handlers=handlers, middleware=[Middleware(Gate, service=service)])
  app.router.redirect_slashes = False
  return app


def _has_port(host: str) -> bool:
  """Whether a Host header ends with a port; an IPv6 address has brackets."""
  return host.rpartition(":")[2].isdecimal()


async def _request_error(request: Request, error: RequestError) -> Response:
  return ErrorResponse(error)


async def _http_error(request: Request, error: HTTPException) -> Response:
  """404 and 405 of the router."""
  message = f"{error.detail}: {request.method} {request.url.path[:200]}; routes are {', '.join(ROUTES)}"
  response = ErrorResponse(RequestError(error.status_code, message, code="unknown_url"))
  response.headers.update(error.headers or {})
  return response


async def _server_error(request: Request, error: Exception) -> Response:
  """The traceback is on the server's stderr."""
  return ErrorResponse(
    RequestError(500, "the server failed to answer this request; its log says why", code="internal_error")
  )
