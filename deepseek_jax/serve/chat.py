"""POST /v1/chat/completions: its body, and the shapes of its answers."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.generate.request import Sampling, TokenLogprobs
from deepseek_jax.serve.answers import Choice, Delta, TokenEntry
from deepseek_jax.serve.chat_template import ChatTemplate
from deepseek_jax.serve.messages import Settings
from deepseek_jax.serve.parameters import (
  COMMON_FIELDS,
  Fields,
  Parameters,
  answer_length,
  check_logprobs,
  derived_seed,
  parse_parameters,
  top_logprobs,
  wrong_type,
)  # fmt: skip
from deepseek_jax.serve.request_error import RequestError
from deepseek_jax.serve.token_text import listed_logprob, token_text

FIELDS = COMMON_FIELDS | {
  "messages", "max_completion_tokens", "top_logprobs", "chat_template_kwargs", "add_generation_prompt"
}  # fmt: skip
ROLES = ("system", "developer", "user", "assistant")
MESSAGE_FIELDS = {"role", "content", "name", "reasoning_content"}
ABSENT: tuple[Any, ...] = (None, [], "", {})  # values that clients send for what a message has not


@dataclasses.dataclass(frozen=True)
class ChatBody:
  """A checked body.

  Attributes:
    messages: {role, content, ...} with content as text.
    template_arguments: more variables for the chat template.
  """

  parameters: Parameters
  messages: tuple[dict[str, Any], ...]
  template_arguments: dict[str, Any]


def parse_chat(body: Any, settings: Settings) -> ChatBody:
  """Checks a body as far as that needs no tokenizer. Raises RequestError."""
  fields = Fields(body, FIELDS)
  likeliest = top_logprobs(fields, "top_logprobs")
  if not fields.boolean("logprobs"):
    if likeliest:
      raise RequestError(400, "top_logprobs needs logprobs=true", "top_logprobs", "invalid_value")
    likeliest = None
  else:
    likeliest = likeliest or 0
  max_tokens = fields.integer("max_completion_tokens", fields.integer("max_tokens", None, 1), 1)
  arguments = fields.get("chat_template_kwargs")
  arguments = {} if arguments is None else arguments
  if not isinstance(arguments, dict):
    raise wrong_type("chat_template_kwargs", "an object", arguments)
  return ChatBody(
    parse_parameters(fields, settings.model, likeliest, max_tokens),
    _messages(fields.get("messages"), settings.max_length),
    {"add_generation_prompt": fields.boolean("add_generation_prompt", True), **arguments},
  )


def make_choices(body: ChatBody, settings: Settings, tokenizer: Tokenizer, template: ChatTemplate) -> list[Choice]:
  """The n answers that `body` asks for. Raises RequestError for messages that the template refuses or that do not fit."""
  parameters = body.parameters
  ids = tokenizer.encode_with_special_tokens(template.render(body.messages, body.template_arguments))
  if not ids:
    raise RequestError(400, "the chat template makes no text of these messages", "messages", "empty_prompt")
  length = answer_length(ids, parameters.max_tokens, None, settings.max_length, "messages")
  check_logprobs(parameters.n, length, parameters.logprobs)
  return [
    Choice(
      ids,
      Sampling(
        max_tokens=length,
        seed=derived_seed(parameters.seed, index),
        logprobs=parameters.logprobs,
        **parameters.rules,
      ),
      parameters.stop,
    )
    for index in range(parameters.n)
  ]


class ChatShape:
  """The JSON of answers, as OpenAI's API has it."""

  object_name, chunk_object_name = "chat.completion", "chat.completion.chunk"
  id_prefix = "chatcmpl-"

  def __init__(self, parameters: Parameters, tokenizer: Tokenizer):
    self._logprobs, self._tokenizer = parameters.logprobs, tokenizer

  def opening(self, index: int) -> list[dict[str, Any]]:
    """Choices of a stream's first chunk: the role."""
    return [{"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}]

  def chunk(self, delta: Delta) -> dict[str, Any]:
    """A choice of a chunk."""
    content = {"content": delta.text} if delta.text or delta.tokens else {}
    return {
      "index": delta.index,
      "delta": content,
      "logprobs": self._logprobs_json(delta.tokens),
      "finish_reason": delta.finish_reason,
    }

  def choice(self, whole: Delta) -> dict[str, Any]:
    """A choice of a response that is no stream."""
    return {
      "index": whole.index,
      "message": {"role": "assistant", "content": whole.text, "refusal": None},
      "logprobs": self._logprobs_json(whole.tokens),
      "finish_reason": whole.finish_reason,
    }

  def _logprobs_json(self, entries: Sequence[TokenEntry]) -> dict[str, Any] | None:
    if self._logprobs is None:
      return None
    listed = [(entry.id, entry.logprobs) for entry in entries if entry.logprobs]
    return {"content": [self._entry(id, logprobs) for id, logprobs in listed], "refusal": None}

  def _entry(self, id: int, logprobs: TokenLogprobs) -> dict[str, Any]:
    top = [self._token(i, value) for i, value in logprobs.top[: self._logprobs]]
    return self._token(id, logprobs.logprob) | {"top_logprobs": top}

  def _token(self, id: int, logprob: float) -> dict[str, Any]:
    content = self._tokenizer.token_bytes(id)
    return {
      "token": token_text(self._tokenizer, id),
      "logprob": listed_logprob(logprob),
      "bytes": list(content) if content else None,
    }


def _messages(value: Any, most: int) -> tuple[dict[str, Any], ...]:
  if value is None:
    raise RequestError(
      400, "messages is missing: expected a list of messages", "messages", "missing_required_parameter"
    )
  if not isinstance(value, list):
    raise wrong_type("messages", "a list of messages", value)
  if not value:
    raise RequestError(400, "messages is empty: send at least one message", "messages", "empty_prompt")
  if len(value) > most:
    raise RequestError(
      400, f"{len(value)} messages do not fit {most} tokens: send fewer", "messages", "context_length_exceeded"
    )
  return tuple(_message(message, f"messages[{i}]") for i, message in enumerate(value))


def _message(message: Any, name: str) -> dict[str, Any]:
  """A message with its content as text. Raises RequestError for what a text model cannot read."""
  if not isinstance(message, dict):
    raise wrong_type(name, "an object with role and content", message)
  role = message.get("role")
  if role not in ROLES:
    shown = repr(role)[:80] if isinstance(role, str) else "none"
    raise RequestError(
      400, f"{name}.role must be one of {', '.join(ROLES)}, got {shown}", f"{name}.role", "invalid_value"
    )
  for field, content in message.items():
    if field not in MESSAGE_FIELDS and content not in ABSENT:
      raise RequestError(400, f"{name}.{field[:80]} is not supported", f"{name}.{field[:80]}", "unsupported_parameter")
  text = {
    "role": "system" if role == "developer" else role,
    "content": _text(message.get("content"), f"{name}.content"),
  }
  extra = {field: message[field] for field in ("name", "reasoning_content") if isinstance(message.get(field), str)}
  return text | extra


def _text(content: Any, name: str) -> str:
  """Content as text: a string, or a list of parts {"type": "text", "text": ...}, which are joined."""
  if isinstance(content, str):
    return content
  if not isinstance(content, list):
    raise wrong_type(name, "a string or a list of text parts", content)
  for i, part in enumerate(content):
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
      kind = part.get("type") if isinstance(part, dict) else None
      raise RequestError(
        400,
        f'{name}[{i}] must be {{"type": "text", "text": "..."}}, got type {kind!r:.80}: this server reads text only',
        f"{name}[{i}]",
        "invalid_value",
      )
  return "".join(part["text"] for part in content)
