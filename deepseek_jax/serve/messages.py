"""What the engine process and the HTTP process tell each other over a socket: one JSON object a line.

To the engine: add, cancel, stats, and ready once HTTP is served. From it: settings, which come first; outputs, rejected,
stats; and shutdown.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import orjson

from deepseek_jax.errors import UserError
from deepseek_jax.generate.request import Output, Request, Sampling, TokenLogprobs

ALIVE_SECONDS = 5.0  # between two signs of life of the HTTP process
MAX_LINE_BYTES = 64 * 2**20
OUTPUTS_LINE_BYTES = 2**20  # a longer step is several lines


class MessageError(UserError):
  """What came over the socket is not of this protocol: the other process cannot be relied on."""


@dataclasses.dataclass(frozen=True)
class Settings:
  """What the HTTP process has to know of the model and of the flags.

  Attributes:
    model: its name in requests.
    tokenizer: as data.tokenizer.
    vocab: one past the largest id of the tokenizer; the rows of the embedding after it are padding.
    add_bos: whether bos is put before a prompt of text.
    max_length: tokens of prompt and answer that fit.
    max_batch, max_queue: requests that run, and that may wait.
    chat_template: Jinja. template_tokens: {bos_token, eos_token, ...: text}, its variables.
    api_key: None: everybody is served.
    local_hosts: names that the header Host may have, in lower case; None: any.
    created: Unix time of the model, which /v1/models gives.
  """

  model: str
  tokenizer: str
  vocab: int
  add_bos: bool
  max_length: int
  max_batch: int
  max_queue: int
  chat_template: str
  template_tokens: Mapping[str, str]
  api_key: str | None
  local_hosts: tuple[str, ...] | None
  created: int


class LineReader:
  """Puts the bytes of a stream together to lines."""

  def __init__(self, max_bytes: int = MAX_LINE_BYTES):
    self._max_bytes, self._partial = max_bytes, bytearray()

  def feed(self, data: bytes) -> list[dict[str, Any]]:
    """The messages that `data` completes. Raises MessageError for a line that is too long or no JSON object."""
    start = len(self._partial)
    self._partial += data
    if b"\n" not in data:
      lines: list[bytes] = []
    else:
      end = self._partial.rindex(b"\n", start)
      lines = bytes(self._partial[:end]).split(b"\n")
      del self._partial[: end + 1]
    if max(map(len, lines), default=0) > self._max_bytes or len(self._partial) > self._max_bytes:
      raise MessageError(f"a message is longer than {self._max_bytes} bytes")
    return [_decode(line) for line in lines]


def encode(message: Mapping[str, Any]) -> bytes:
  """A line. Raises MessageError for one that a `LineReader` would refuse."""
  line = orjson.dumps(message)
  if len(line) > MAX_LINE_BYTES:
    raise MessageError(f"a message of {len(line)} bytes is longer than {MAX_LINE_BYTES}")
  return line + b"\n"


def encode_outputs(outputs: Iterable[Output]) -> Iterator[bytes]:
  """The outputs of a step: one line, or several of about OUTPUTS_LINE_BYTES."""
  parts: list[bytes] = []
  size = 0
  for output in outputs:
    part = orjson.dumps(output)  # also of dataclasses; infinities become null
    if parts and size + len(part) > OUTPUTS_LINE_BYTES:
      yield _outputs_line(parts)
      parts, size = [], 0
    parts.append(part)
    size += len(part)
  if parts:
    yield _outputs_line(parts)


def decode_output(fields: Mapping[str, Any]) -> Output:
  """The Output that `encode_outputs` wrote."""
  prompt = fields["prompt_logprobs"]
  return Output(
    fields["id"],
    tuple(fields["tokens"]),
    tuple(_decode_logprobs(entry) for entry in fields["logprobs"]),
    fields["finish_reason"],
    None if prompt is None else tuple(None if entry is None else _decode_logprobs(entry) for entry in prompt),
    fields["cached_tokens"],
  )


def encode_request(request: Request) -> bytes:
  """The line that adds `request`."""
  return encode(
    {"type": "add", "id": request.id, "prompt": request.prompt, "sampling": dataclasses.asdict(request.sampling)}
  )


def decode_request(message: Mapping[str, Any]) -> Request:
  """The Request of a message of type add. Raises ConfigError for a value that Sampling refuses, and MessageError."""
  try:
    return Request(message["id"], tuple(message["prompt"]), Sampling(**message["sampling"]))
  except (KeyError, TypeError) as error:
    raise MessageError(f"a message of type add lacks something: {error}") from None


def decode_settings(fields: Mapping[str, Any]) -> Settings:
  """The Settings of a message of type settings."""
  hosts = fields["local_hosts"]
  return Settings(**{**fields, "local_hosts": None if hosts is None else tuple(hosts)})


def _outputs_line(parts: Sequence[bytes]) -> bytes:
  return b'{"type":"outputs","outputs":[' + b",".join(parts) + b"]}\n"


def _decode_logprobs(entry: Mapping[str, Any]) -> TokenLogprobs:
  return TokenLogprobs(_finite(entry["logprob"]), tuple((id, _finite(value)) for id, value in entry["top"]))


def _finite(value: float | None) -> float:
  return float("-inf") if value is None else value


def _decode(line: bytes) -> dict[str, Any]:
  try:
    message = orjson.loads(line)
  except orjson.JSONDecodeError as error:
    raise MessageError(f"a message is no JSON: {error}") from None
  if not isinstance(message, dict) or not isinstance(message.get("type"), str):
    raise MessageError(f"a message must be a JSON object with a type, got {line[:80]!r}")
  return message
