"""From a request's prompts to the pieces of its answers, in both protocols."""

import dataclasses
from collections.abc import AsyncGenerator, Sequence

from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.generate.request import Output, Sampling, TokenLogprobs
from deepseek_jax.serve.client import EngineClient
from deepseek_jax.serve.detokenizer import Detokenizer, TextStream
from deepseek_jax.serve.metrics import ChoiceTimer
from deepseek_jax.serve.request_error import RequestError


@dataclasses.dataclass(frozen=True)
class Choice:
  """One answer that is asked for.

  Attributes:
    prompt: ids.
    sampling: for the engine.
    stop: strings that end the answer.
    echo: text that comes before the answer, that of the prompt; None: nothing does.
    hidden: the tokens that the engine gives are not shown: max_tokens=0.
    ends_at_eos: eos among the tokens, which the engine was told to ignore, ends the answer.
  """

  prompt: Sequence[int]
  sampling: Sampling
  stop: tuple[str, ...] = ()
  echo: str | None = None
  hidden: bool = False
  ends_at_eos: bool = False


@dataclasses.dataclass(frozen=True)
class TokenEntry:
  """A token of an answer or an echoed prompt.

  Attributes:
    offset: characters of the choice's text before it.
    logprobs: None for the first token of a prompt.
  """

  id: int
  offset: int
  logprobs: TokenLogprobs | None


@dataclasses.dataclass(frozen=True)
class Delta:
  """What became known of a choice.

  Attributes:
    index: of the choice.
    tokens: with log-probabilities, if these were asked for.
    finish_reason: "stop" or "length" in the last one.
  """

  index: int
  text: str
  tokens: tuple[TokenEntry, ...] = ()
  finish_reason: str | None = None


@dataclasses.dataclass
class Usage:
  """Tokens of a request so far."""

  prompt_tokens: int = 0
  completion_tokens: int = 0
  cached_tokens: int = 0

  def to_json(self) -> dict[str, object]:
    """OpenAI's usage object."""
    return {
      "prompt_tokens": self.prompt_tokens,
      "completion_tokens": self.completion_tokens,
      "total_tokens": self.prompt_tokens + self.completion_tokens,
      "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
    }


async def answer(
  client: EngineClient,
  tokenizer: Tokenizer,
  choices: Sequence[Choice],
  n: int,
  usage: Usage,
  timers: Sequence[ChoiceTimer],
) -> AsyncGenerator[Delta, None]:
  """Yields what becomes known of each of `choices`, n of each prompt in turn, until all are complete, and counts in `usage`.

  What ends it early cancels what the engine still does. Raises RequestError as `EngineClient.submit` and
  `Submission.get`.
  """
  answers = [_Answer(index, choice, tokenizer) for index, choice in enumerate(choices)]
  unfinished, end = set(range(len(choices))), "cancelled"
  with client.submit([(choice.prompt, choice.sampling) for choice in choices]) as submission:
    try:
      while unfinished:
        index, output = await submission.get()
        if index % n == 0:  # the others of a prompt have what this one computed, and the prompt is counted once
          usage.cached_tokens += output.cached_tokens
        delta, used = answers[index].add(output)
        usage.completion_tokens += 0 if choices[index].hidden else used
        timers[index].add_tokens(used)
        if delta.finish_reason is not None:
          unfinished.remove(index)
          submission.cancel(index)  # where a stop string ended it
          timers[index].finish(delta.finish_reason)
        if delta.text or delta.tokens or delta.finish_reason:
          yield delta
    except RequestError:
      end = "error"
      raise
    finally:
      for index in unfinished:
        timers[index].finish(end)


class _Answer:
  """The text and tokens of one choice."""

  def __init__(self, index: int, choice: Choice, tokenizer: Tokenizer):
    self._index, self._choice, self._tokenizer = index, choice, tokenizer
    self._stream = TextStream(tokenizer, choice.stop)
    self._waiting: list[TokenEntry] = []  # for their text
    self._base = len(choice.echo or "")
    self._first = True

  def add(self, output: Output) -> tuple[Delta, int]:
    """What `output` makes known, and how many of its tokens were used."""
    text, entries = "", []
    if self._first and self._choice.echo is not None:
      text, entries = self._choice.echo, self._prompt_entries(output)
    self._first = False
    finish_reason, used = output.finish_reason, 0
    for i, id in enumerate(output.tokens):
      used += 1
      if self._choice.hidden:
        continue
      if self._choice.ends_at_eos and id == self._tokenizer.eos:
        finish_reason = "stop"
      if output.logprobs:
        self._waiting.append(TokenEntry(id, self._base + self._stream.decoded, output.logprobs[i]))
      piece = self._stream.add(id)
      text += piece.text
      entries += self._due(piece.tokens)
      if piece.stopped:
        return Delta(self._index, text, tuple(entries), "stop"), used
    if finish_reason is not None:
      piece = self._stream.end()
      text += piece.text
      entries += self._due(piece.tokens)
      finish_reason = "stop" if piece.stopped else "length" if self._choice.hidden else finish_reason
    return Delta(self._index, text, tuple(entries), finish_reason), used

  def _due(self, count: int) -> list[TokenEntry]:
    due, self._waiting = self._waiting[:count], self._waiting[count:]
    return due

  def _prompt_entries(self, output: Output) -> list[TokenEntry]:
    if output.prompt_logprobs is None:
      return []
    detokenizer, offset, entries = Detokenizer(self._tokenizer), 0, []
    for id, logprobs in zip(self._choice.prompt, output.prompt_logprobs, strict=True):
      entries.append(TokenEntry(id, offset, logprobs))
      offset += len(detokenizer.add(id))
    return entries
