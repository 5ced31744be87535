"""Tokens to text as they come: never half a character, and nothing that may belong to a stop string."""

import codecs
import collections
import dataclasses
from collections.abc import Sequence

from deepseek_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Piece:
  """What one more token, or the end, makes known.

  Attributes:
    text: to append to what was given before.
    tokens: how many more tokens begin within the text so far; what belongs to each token is due now.
    stopped: a stop string was found; neither it nor what follows is in `text`.
  """

  text: str
  tokens: int
  stopped: bool = False


class Detokenizer:
  """The text of a growing list of ids; invalid UTF-8 is replaced.

  All text that it returns, joined, is `tokenizer.decode` of all ids, for tokenizers whose tokens are bytes.
  """

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer
    self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

  def add(self, id: int) -> str:
    """The characters that `id` completes. bos and eos have none."""
    if id in (self._tokenizer.bos, self._tokenizer.eos):
      return ""
    return self._decoder.decode(self._tokenizer.token_bytes(id))

  def end(self) -> str:
    """What is left of a character that was not completed."""
    return self._decoder.decode(b"", final=True)


class StopMatcher:
  """Finds stop strings in text that comes in parts.

  The first character at which a stop string is complete decides, whatever the parts; of several that end there, the
  longest. Each has an automaton (Knuth, Morris and Pratt), so that a character costs O(1).
  """

  def __init__(self, stops: Sequence[str]):
    self._stops = stops
    self._tables = [_failure_table(stop) for stop in stops]
    self._states = [0] * len(stops)

  def add(self, character: str) -> int:
    """Characters of the stop string that this one completes; 0: none."""
    for i, (stop, table) in enumerate(zip(self._stops, self._tables, strict=True)):
      state = self._states[i]
      while state and stop[state] != character:
        state = table[state]
      self._states[i] = state + (stop[state] == character)
    return max((len(s) for s, state in zip(self._stops, self._states, strict=True) if state == len(s)), default=0)

  @property
  def held(self) -> int:
    """Characters at the end of the text that a stop string may begin with."""
    return max(self._states, default=0)


class TextStream:
  """Turns the tokens of an answer into pieces of text that are final.

  Args:
    stops: strings that end the answer; none may be empty.
  """

  def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
    self._detokenizer, self._matcher = Detokenizer(tokenizer), StopMatcher(stops)
    self._held = ""  # decoded, not given
    self._given = 0  # characters
    self._starts: collections.deque[int] = collections.deque()  # of tokens that are not due
    self._stopped = False

  @property
  def decoded(self) -> int:
    """Characters so far, held ones included: where the next token begins."""
    return self._given + len(self._held)

  def add(self, id: int) -> Piece:
    """What `id` makes known; nothing after a stop string."""
    if self._stopped:
      return Piece("", 0, True)
    self._starts.append(self.decoded)
    return self._take(self._detokenizer.add(id), final=False)

  def end(self) -> Piece:
    """What was held, once the answer is complete."""
    if self._stopped:
      return Piece("", 0, True)
    return self._take(self._detokenizer.end(), final=True)

  def _take(self, text: str, final: bool) -> Piece:
    for character in text:
      self._held += character
      if length := self._matcher.add(character):
        self._stopped = True
        self._held = self._held[: len(self._held) - length]
        return self._give(len(self._held))
    return self._give(len(self._held) - (0 if final else self._matcher.held), final)

  def _give(self, length: int, final: bool = False) -> Piece:
    text, self._held = self._held[:length], self._held[length:]
    self._given += length
    tokens = 0
    while self._starts and (final or self._starts[0] < self._given):
      self._starts.popleft()
      tokens += 1
    return Piece(text, tokens, self._stopped)


def _failure_table(stop: str) -> list[int]:
  """table[i]: characters of the longest proper suffix of stop[:i] that `stop` begins with; for i = len(stop) too."""
  table = [0, 0]
  for i in range(1, len(stop)):
    state = table[i]
    while state and stop[state] != stop[i]:
      state = table[state]
    table.append(state + (stop[state] == stop[i]))
  return table
