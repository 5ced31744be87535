"""POST /v1/completions: its body, and the shapes of its answers."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.generate.request import Sampling
from deepseek_jax.serve.answers import Choice, Delta, TokenEntry
from deepseek_jax.serve.messages import Settings
from deepseek_jax.serve.parameters import (
  COMMON_FIELDS,
  MAX_CHOICES,
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

DEFAULT_MAX_TOKENS = 16
FIELDS = COMMON_FIELDS | {"prompt", "echo", "best_of", "add_special_tokens"}


@dataclasses.dataclass(frozen=True)
class CompletionBody:
  """A checked body.

  Attributes:
    prompts: texts, or ids.
    add_bos: before texts.
  """

  parameters: Parameters
  prompts: tuple[str | tuple[int, ...], ...]
  echo: bool
  add_bos: bool


def parse_completion(body: Any, settings: Settings) -> CompletionBody:
  """Checks a body as far as that needs no tokenizer. Raises RequestError."""
  fields = Fields(body, FIELDS)
  parameters = parse_parameters(
    fields, settings.model, top_logprobs(fields, "logprobs"), fields.integer("max_tokens", None, 0)
  )
  if fields.integer("best_of", parameters.n, 1) != parameters.n:
    raise RequestError(
      400, "best_of is supported only where it equals n: leave it out", "best_of", "unsupported_parameter"
    )
  prompts = _prompts(fields.get("prompt"), settings)
  if len(prompts) * parameters.n > MAX_CHOICES:
    raise RequestError(
      400, f"{len(prompts)} prompts with n={parameters.n}: one request may ask for {MAX_CHOICES} answers", "n"
    )
  return CompletionBody(
    parameters, prompts, fields.boolean("echo"), fields.boolean("add_special_tokens", settings.add_bos)
  )


def make_choices(body: CompletionBody, settings: Settings, tokenizer: Tokenizer) -> list[Choice]:
  """The answers that `body` asks for, n of each prompt in turn. Raises RequestError for a prompt that does not fit."""
  parameters = body.parameters
  choices: list[Choice] = []
  for prompt in body.prompts:
    if isinstance(prompt, str):
      ids: Sequence[int] = [tokenizer.bos] * body.add_bos + tokenizer.encode(prompt)
    else:
      ids = prompt
    echo = None if not body.echo else prompt if isinstance(prompt, str) else tokenizer.decode(ids)
    length = answer_length(ids, parameters.max_tokens, DEFAULT_MAX_TOKENS, settings.max_length)
    tokens = length + (len(ids) if body.echo else 0)
    check_logprobs(len(body.prompts) * parameters.n, tokens, parameters.logprobs)
    seeds = [derived_seed(parameters.seed, i) for i in range(parameters.n)]
    choices += [_choice(parameters, ids, length, echo, seed) for seed in seeds]
  return choices


def _choice(parameters: Parameters, ids: Sequence[int], length: int, echo: str | None, seed: int) -> Choice:
  # Harnesses that score a prompt by its echo ask for one token and drop it: it has to be there also where it ends the
  # document, which an engine's output leaves out.
  one_token = echo is not None and parameters.logprobs is not None and length <= 1
  rules = {**parameters.rules, **({"ignore_eos": True} if one_token else {})}
  sampling = Sampling(
    max_tokens=max(1, length),
    seed=seed,
    logprobs=parameters.logprobs,
    prompt_logprobs=None if echo is None else parameters.logprobs,
    **rules,
  )
  ends_at_eos = one_token and not parameters.rules["ignore_eos"]
  return Choice(ids, sampling, parameters.stop, echo, hidden=length == 0, ends_at_eos=ends_at_eos)


class CompletionShape:
  """The JSON of answers, as OpenAI's API has it."""

  object_name = chunk_object_name = "text_completion"
  id_prefix = "cmpl-"

  def __init__(self, parameters: Parameters, tokenizer: Tokenizer):
    self._logprobs, self._tokenizer = parameters.logprobs, tokenizer

  def opening(self, index: int) -> list[dict[str, Any]]:
    """Choices of a stream's first chunk."""
    return []

  def chunk(self, delta: Delta) -> dict[str, Any]:
    """A choice of a chunk."""
    return {
      "index": delta.index,
      "text": delta.text,
      "logprobs": None if self._logprobs is None else self._logprobs_json(delta.tokens),
      "finish_reason": delta.finish_reason,
    }

  def choice(self, whole: Delta) -> dict[str, Any]:
    """A choice of a response that is no stream."""
    return self.chunk(whole)

  def _logprobs_json(self, entries: Sequence[TokenEntry]) -> dict[str, Any]:
    texts = [token_text(self._tokenizer, entry.id) for entry in entries]
    return {
      "tokens": texts,
      "token_logprobs": [entry.logprobs and listed_logprob(entry.logprobs.logprob) for entry in entries],
      "top_logprobs": [self._top(entry, text) for entry, text in zip(entries, texts, strict=True)],
      "text_offset": [entry.offset for entry in entries],
    }

  def _top(self, entry: TokenEntry, text: str) -> dict[str, float] | None:
    """The likeliest tokens, and the token itself, by their texts; of two of one text the likelier one."""
    if entry.logprobs is None:
      return None
    top: dict[str, float] = {}
    for id, logprob in entry.logprobs.top[: self._logprobs]:
      top.setdefault(token_text(self._tokenizer, id), listed_logprob(logprob))
    top.setdefault(text, listed_logprob(entry.logprobs.logprob))
    return top


def _prompts(value: Any, settings: Settings) -> tuple[str | tuple[int, ...], ...]:
  """The four forms of `prompt` as texts or tuples of ids."""
  expected = "a string, a list of strings, a list of token ids, or a list of such lists"
  if value is None:
    raise RequestError(400, f"prompt is missing: expected {expected}", "prompt", "missing_required_parameter")
  is_ids = lambda value: isinstance(value, list) and all(type(id) is int for id in value[: settings.max_length])
  prompts = [value] if isinstance(value, str) or (value and is_ids(value)) else value
  if not isinstance(prompts, list) or not all(isinstance(p, str) or is_ids(p) for p in prompts[: MAX_CHOICES + 1]):
    raise wrong_type("prompt", expected, value)
  if not prompts or not all(prompts):
    raise RequestError(
      400, "a prompt is empty: send at least one token, as the id of bos alone", "prompt", "empty_prompt"
    )
  if len(prompts) > MAX_CHOICES:
    raise RequestError(400, f"{len(prompts)} prompts are too many, at most {MAX_CHOICES}", "prompt")
  for prompt in prompts:
    if isinstance(prompt, str):
      continue
    answer_length(prompt, None, DEFAULT_MAX_TOKENS, settings.max_length)  # before each id of a long list is looked at
    if (outside := next((id for id in prompt if not 0 <= id < settings.vocab), None)) is not None:
      raise RequestError(
        400, f"prompt has the token id {outside}; ids are 0 to {settings.vocab - 1}", "prompt", "invalid_value"
      )
  return tuple(p if isinstance(p, str) else tuple(p) for p in prompts)
