"""Bodies of requests, checked: what the two protocols have in common."""

import dataclasses
import difflib
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_jax.generate.request import BOUNDS, MAX_TOP_LOGPROBS
from deepseek_jax.serve.request_error import RequestError

MAX_CHOICES = 128  # of one request: prompts times n
MAX_STOPS, MAX_STOP_CHARACTERS = 16, 256
MAX_LOGPROBS = 1_000_000  # of one request: choices times tokens times those of a place; about 200 MB of objects

RULES = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}  # fmt: skip
COMMON_FIELDS = {
  "model", "n", "seed", "stop", "stream", "stream_options", "logprobs", "max_tokens", "top_k", "ignore_eos", *RULES
}  # fmt: skip
# They change nothing that a model says.
HARMLESS_FIELDS = {
  "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
  "parallel_tool_calls", "prediction", "priority", "request_id", "cache_salt",
}  # fmt: skip
# field -> values that ask for nothing; with another one the answer would not be what was asked for
NEUTRAL_VALUES: Mapping[str, tuple[Any, ...]] = {
  "logit_bias": ({},), "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"),
  "response_format": ({"type": "text"},), "modalities": (["text"],), "suffix": ("",), "audio": (), "reasoning_effort": (),
  "verbosity": (), "web_search_options": (), "min_tokens": (0,), "stop_token_ids": ([],), "bad_words": ([],),
  "allowed_token_ids": ([],), "use_beam_search": (False,), "length_penalty": (1, 1.0), "guided_json": (), "guided_regex": (),
  "guided_choice": (), "guided_grammar": (), "structured_outputs": (), "include_stop_str_in_output": (False,),
  "skip_special_tokens": (True,), "spaces_between_special_tokens": (True,), "truncate_prompt_tokens": (), "prompt_logprobs": (),
  "echo": (False,), "best_of": (1,), "top_logprobs": (0,), "return_token_ids": (False,), "prompt_embeds": (), "documents": ([],),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Parameters:
  """How a request wants its answers, in both protocols.

  Attributes:
    n: answers of each prompt.
    max_tokens: None: not given.
    rules: fields of Sampling, but max_tokens and seed and those of log-probabilities.
    seed: of the first answer of each prompt, below 2**32; None: any.
    logprobs: of each token, with so many likeliest ones; None: none.
    include_usage, continuous_usage: whether a stream ends with the number of tokens, and has it in each event.
  """

  n: int
  max_tokens: int | None
  rules: Mapping[str, Any]
  seed: int | None
  logprobs: int | None
  stop: tuple[str, ...]
  stream: bool
  include_usage: bool
  continuous_usage: bool


class Fields:
  """Typed reads of a JSON object. A field that is null counts as not given.

  Raises RequestError 400 for a value of another type, and for a field that is neither in `known` nor harmless.
  """

  def __init__(self, body: Any, known: set[str], path: str = ""):
    """path: in front of the names of fields in errors, where `body` is a part of another."""
    self._path = path
    if not isinstance(body, dict):
      raise RequestError(400, f"the body must be a JSON object, got {_describe(body)}")
    self._body = {name: value for name, value in body.items() if value is not None}
    for name, value in self._body.items():
      if name in known or name in HARMLESS_FIELDS or value in NEUTRAL_VALUES.get(name, ()):
        continue
      if name in NEUTRAL_VALUES:
        raise RequestError(400, f"{path}{name} is not supported: leave it out", path + name, "unsupported_parameter")
      field = path + name[:80]
      near = difflib.get_close_matches(name[:80], sorted(known), 1)
      advice = f"; did you mean {near[0]!r}?" if near else f": expected {', '.join(sorted(known))}"
      raise RequestError(400, f"unknown field {field!r}{advice}", field, "unknown_parameter")

  def get(self, name: str) -> Any:
    """The value as it came; None: not given."""
    return self._body.get(name)

  def boolean(self, name: str, default: bool = False) -> bool:
    """True or false."""
    value = self._body.get(name, default)
    if not isinstance(value, bool):
      raise wrong_type(self._path + name, "true or false", value)
    return value

  def integer(self, name: str, default: int | None, least: int, most: int | None = None) -> int | None:
    """A whole number from `least` to `most`."""
    value = self._body.get(name, default)
    if value is None:
      return None
    limits = f"at least {least}" if most is None else f"{least} to {most}"
    if isinstance(value, bool) or not isinstance(value, int):
      raise wrong_type(name, f"an integer, {limits}", value)
    if value < least or (most is not None and value > most):
      raise RequestError(400, f"{name} must be {limits}, got {value}", name, "invalid_value")
    return value

  def number(self, name: str, default: float) -> float:
    """A number within the bounds that Sampling has for it."""
    value, (smallest, largest) = self._body.get(name, default), BOUNDS[name]
    expected = f"a number of at least {smallest:g} and at most {largest:g}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
      raise wrong_type(name, expected, value)
    if not smallest <= value <= largest:
      raise RequestError(400, f"{name} must be {expected}, got {value:g}", name, "invalid_value")
    return float(value)

  def strings(self, name: str) -> tuple[str, ...]:
    """A string, or a list of strings."""
    value = self._body.get(name, [])
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
      raise wrong_type(name, "a string or a list of strings", value)
    return tuple(values)


def parse_parameters(fields: Fields, model: str, logprobs: int | None, max_tokens: int | None) -> Parameters:
  """What both protocols share; they read the fields of log-probabilities and of the length in their own way.

  Raises RequestError: 404 for another model than `model`, 400 for all else.
  """
  name = fields.get("model")
  if name is not None and not isinstance(name, str):
    raise wrong_type("model", "a string", name)
  if name not in (None, model):
    raise RequestError(404, f"no model {name[:200]!r} here; this server has {model!r}", "model", "model_not_found")
  n = fields.integer("n", 1, 1, MAX_CHOICES)
  seed = fields.get("seed")
  if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
    raise wrong_type("seed", "an integer", seed)
  rules: dict[str, Any] = {rule: fields.number(rule, default) for rule, default in RULES.items()}
  rules["top_k"] = _top_k(fields)
  rules["ignore_eos"] = fields.boolean("ignore_eos")
  stream, usage, continuous = _stream_options(fields)
  assert n is not None  # it has a default
  return Parameters(
    n,
    max_tokens,
    rules,
    None if seed is None else seed % 2**32,
    logprobs,
    _stops(fields),
    stream,
    usage,
    continuous,
  )


def derived_seed(seed: int | None, choice: int) -> int:
  """Seed of a prompt's answer: `seed` for the first, others by a step that is odd, so that 2**32 are distinct."""
  if seed is None:
    return secrets.randbits(32)
  return (seed + choice * 0x9E3779B9) % 2**32


def answer_length(
  prompt: Sequence[int], max_tokens: int | None, default: int | None, max_length: int, source: str = "prompt"
) -> int:
  """Tokens to generate after `prompt`. Not given: `default`, or what fits; None: what fits.

  source: the field that the prompt is made from. Raises RequestError 400 where the prompt, or it with max_tokens, does
  not fit.
  """
  room = max_length - len(prompt)
  if room < max(1, max_tokens or 0):
    asked = f" and max_tokens={max_tokens}" if max_tokens else ""
    problem = "leaves no room for an answer" if room == 0 and not asked else "is too long"
    raise RequestError(
      400,
      f"a prompt of {len(prompt)} tokens{asked} {problem}: this server's limit is {max_length} tokens for prompt and "
      "answer; send fewer",
      "max_tokens" if 0 < room else source,
      "context_length_exceeded",
    )
  return min(room, room if default is None else default) if max_tokens is None else max_tokens


def check_logprobs(choices: int, tokens: int, logprobs: int | None) -> None:
  """Raises RequestError 400 for an answer whose log-probabilities would take too much memory."""
  if logprobs is not None and (count := choices * tokens * (logprobs + 1)) > MAX_LOGPROBS:
    raise RequestError(
      400, f"{count} log-probabilities are too many, at most {MAX_LOGPROBS}: ask for fewer tokens, answers or logprobs", "logprobs"
    )  # fmt: skip


def top_logprobs(fields: Fields, name: str) -> int | None:
  """A number of likeliest tokens."""
  return fields.integer(name, None, 0, MAX_TOP_LOGPROBS)


def wrong_type(name: str, expected: str, value: Any) -> RequestError:
  """The error for a value of another type."""
  return RequestError(400, f"{name} must be {expected}, got {_describe(value)}", name, "invalid_type")


def _top_k(fields: Fields) -> int:
  """0 and -1, as other servers have it, both mean all tokens."""
  value = fields.integer("top_k", 0, -1, int(BOUNDS["top_k"][1]))
  return max(0, value or 0)


def _stops(fields: Fields) -> tuple[str, ...]:
  stops = fields.strings("stop")
  if len(stops) > MAX_STOPS:
    raise RequestError(400, f"stop may have {MAX_STOPS} strings, got {len(stops)}", "stop")
  if not all(0 < len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
    raise RequestError(400, f"each string of stop must have 1 to {MAX_STOP_CHARACTERS} characters", "stop")
  return tuple(dict.fromkeys(stops))


def _stream_options(fields: Fields) -> tuple[bool, bool, bool]:
  stream, options = fields.boolean("stream"), fields.get("stream_options")
  if options is None:
    return stream, False, False
  if not isinstance(options, dict):
    raise wrong_type("stream_options", "an object", options)
  if not stream:
    raise RequestError(400, "stream_options is for stream=true only", "stream_options")
  known = {"include_usage", "continuous_usage_stats", "include_obfuscation"}
  inner = Fields(options, known, "stream_options.")
  return stream, inner.boolean("include_usage"), inner.boolean("continuous_usage_stats")


def _describe(value: Any) -> str:
  kinds = {bool: "a boolean", int: "an integer", float: "a number", str: "a string", list: "a list", dict: "an object"}
  text = repr(value) if isinstance(value, (bool, int, float)) else ""
  return f"{kinds.get(type(value), 'null')} {text}".strip()[:80]
