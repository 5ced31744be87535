"""What an engine is asked for, and what it answers. Nothing here needs jax."""

import dataclasses
import math
from typing import Any

from deepseek_jax.errors import ConfigError

MAX_TOP_LOGPROBS = 20  # of each token; a compiled program returns so many

# field -> (smallest, largest) value
BOUNDS: dict[str, tuple[float, float]] = {
  "max_tokens": (1, math.inf),
  "temperature": (0, 1e6),
  "top_k": (0, 2**31 - 1),  # an int32 of the compiled programs
  "top_p": (0, 1),
  "min_p": (0, 1),
  "repetition_penalty": (1e-38, 1e38),
  "presence_penalty": (-2, 2),
  "frequency_penalty": (-2, 2),
  "seed": (0, 2**32 - 1),
  "logprobs": (0, MAX_TOP_LOGPROBS),
  "prompt_logprobs": (0, MAX_TOP_LOGPROBS),
}


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the tokens after a prompt are chosen.

  Rules apply in this order: repetition, presence and frequency penalty, temperature, top_k, top_p, min_p. Defaults leave
  the model's own distribution as it is. Raises ConfigError for a value out of BOUNDS.

  Attributes:
    max_tokens: to generate at most.
    temperature: 0: the likeliest token.
    top_k: sample among the k likeliest; 0: all.
    top_p: sample among the fewest, likeliest tokens that together have this probability.
    min_p: sample among tokens with at least this share of the largest probability.
    repetition_penalty: divides positive logits of tokens of prompt and answer, and multiplies negative ones (Keskar et
      al. 2019); 1: none.
    presence_penalty, frequency_penalty: subtracted from the logits of tokens of the answer, once, and as often as they are
      there.
    seed: of the random numbers. The same seed, prompt and weights give the same tokens.
    logprobs: log-probabilities of each generated token and of so many likeliest ones. None: no log-probabilities.
    prompt_logprobs: as logprobs, of the prompt's tokens.
    ignore_eos: go on after the end of the document.
  """

  max_tokens: int
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0
  presence_penalty: float = 0.0
  frequency_penalty: float = 0.0
  seed: int = 0
  logprobs: int | None = None
  prompt_logprobs: int | None = None
  ignore_eos: bool = False

  def __post_init__(self):
    for name, (smallest, largest) in BOUNDS.items():
      value = getattr(self, name)
      if value is None and name in ("logprobs", "prompt_logprobs"):
        continue
      if not smallest <= value <= largest:  # also NaN
        most = "" if largest == math.inf else f" and at most {largest:g}"
        raise ConfigError(f"{name} must be at least {smallest:g}{most}, got {value}")


@dataclasses.dataclass(frozen=True)
class Request:
  """Token ids to continue.

  Attributes:
    id: chosen by the caller; no two requests of an engine may share one at a time.
    prompt: at least one id.
    sampling: as above.
  """

  id: int
  prompt: tuple[int, ...]
  sampling: Sampling


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
  """ln p of a token and of the likeliest tokens in its place, by the logits before all rules of sampling.

  Attributes:
    logprob: of the token.
    top: (id, ln p) of the likeliest, in descending order.
  """

  logprob: float
  top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Output:
  """What one step of an engine gave a request.

  Attributes:
    id: of the request.
    tokens: new ids. The one that ends the document is not among them.
    logprobs: of each of `tokens`; empty unless asked for.
    finish_reason: "stop" after the end of the document, "length" after the last token; None: more will follow.
    prompt_logprobs: of each id of the prompt, None for the first, which has none; with the first output, if asked for.
    cached_tokens: tokens of the prompt that the prefix cache had; with the first output, else 0.
  """

  id: int
  tokens: tuple[int, ...]
  logprobs: tuple[TokenLogprobs, ...] = ()
  finish_reason: str | None = None
  prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
  cached_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class EngineStats:
  """What an engine has done since it was made, and what it does now.

  Attributes:
    steps: of the engine.
    compilations: of XLA programs in this process; after the warm-up it stays as it is.
    running, waiting: requests.
    max_batch: requests that can run at a time.
    decode_steps, decoded_slots: steps that decoded, and requests that took part in them, added up: occupancy is
      decoded_slots / (decode_steps * max_batch).
    pages, free_pages, cached_pages: of the key-value cache: all; unused; unused but with a prefix that a request may hit.
    prompt_tokens: of all requests.
    cached_prompt_tokens, generated_tokens: of all requests that have answered.
    prefilled_tokens: prompt tokens that were computed, also of requests that were computed again.
    preemptions: requests that lost their pages and were computed again.
    drafted_tokens, accepted_tokens: of speculation.
    finished, cancelled: requests.
  """

  steps: int = 0
  compilations: int = 0
  running: int = 0
  waiting: int = 0
  max_batch: int = 0
  decode_steps: int = 0
  decoded_slots: int = 0
  pages: int = 0
  free_pages: int = 0
  cached_pages: int = 0
  prompt_tokens: int = 0
  cached_prompt_tokens: int = 0
  generated_tokens: int = 0
  prefilled_tokens: int = 0
  preemptions: int = 0
  drafted_tokens: int = 0
  accepted_tokens: int = 0
  finished: int = 0
  cancelled: int = 0

  def to_json(self) -> dict[str, Any]:
    """As a plain dict."""
    return dataclasses.asdict(self)
