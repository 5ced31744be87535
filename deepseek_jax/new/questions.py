"""The questions that make a config: asked at a terminal until the answer can be used, or answered by flags."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from deepseek_jax.config import Config
from deepseek_jax.config_sections import TOKENIZER_SIZES
from deepseek_jax.console import current_console
from deepseek_jax.data import key_value_retrieval
from deepseek_jax.data.sources import find_source
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.errors import ConfigError, DataError
from deepseek_jax.new.hardware import Hardware, find_hardware
from deepseek_jax.storage import is_url

NO_DATA = "none"
MOST_TOKENS, MOST_HOURS = 1e16, 1e6  # a thousand times V3's tokens, and a century: the laws say nothing of more
_SUFFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


@dataclasses.dataclass(frozen=True)
class Length:
  """How long to train: tokens, or hours. The other one is 0."""

  tokens: float = 0.0
  hours: float = 0.0


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """name: of data.tokenizer. ids: how many it has."""

  name: str
  ids: int


@dataclasses.dataclass(frozen=True)
class Answers:
  """What the user wants. sources: none yet where empty."""

  model: str
  topology: Hardware
  length: Length
  data: tuple[str, ...]
  tokenizer: Tokenizer
  seq: int
  name: str


@dataclasses.dataclass(frozen=True)
class Question:
  """A question.

  Attributes:
    key: the field of Answers. flag: the flag that answers it, or two.
    text: one line. help: lines that are shown before it at a terminal.
    default: the answer to an empty line, given the answers so far.
    parse: text -> answer. Raises ConfigError with the reason for text that is none.
  """

  key: str
  flag: str
  text: str
  help: tuple[str, ...]
  default: Callable[[Mapping[str, Any]], str]
  parse: Callable[[str], Any]


def parse_model(text: str) -> str:
  """dense or moe. Raises ConfigError."""
  if text.lower() not in ("dense", "moe"):
    raise ConfigError(f"expected dense or moe, got {text!r:.60}")
  return text.lower()


def parse_amount(text: str, unit: str, most: float, examples: str = "2e9, 500M or 1.5B") -> float:
  """A positive number up to `most`: "2e9", "2_000", "1.5B" (k, M, B, T). Raises ConfigError."""
  match = re.fullmatch(r"\s*([\d._]+(?:e[+-]?\d+)?)\s*([kmbt]?)\s*", text.lower())
  try:
    number = float(match[1]) * _SUFFIXES[match[2]] if match else math.nan
  except ValueError:
    number = math.nan
  if not 0 < number < math.inf:
    raise ConfigError(f"expected a positive number of {unit}, as {examples}, got {text!r:.60}")
  if number > most:
    raise ConfigError(f"expected at most {most:.0e} {unit}, got {text!r:.60}")
  return number


def parse_tokens(text: str) -> Length:
  """A number of tokens. Raises ConfigError."""
  return Length(tokens=parse_amount(text, "tokens", MOST_TOKENS))


def parse_hours(text: str) -> Length:
  """A number of hours. Raises ConfigError."""
  return Length(hours=parse_amount(text, "hours", MOST_HOURS, "12 or 0.5"))


def parse_length(text: str) -> Length:
  """Tokens ("2e9"), or hours ("12h"). Raises ConfigError."""
  return parse_hours(text.strip()[:-1]) if text.strip().lower().endswith("h") else parse_tokens(text)


def parse_data(text: str) -> tuple[str, ...]:
  """Sources with commas between; () for "none". Those on this machine must have files. Raises ConfigError."""
  if text.lower() == NO_DATA:
    return ()
  sources = tuple(part.strip() for part in text.split(",") if part.strip())
  if not sources or not text.isprintable():
    raise ConfigError(f"expected files, folders or globs with commas between, or {NO_DATA}, got {text!r:.60}")
  for source in sources:
    if not is_url(source) and source != key_value_retrieval.NAME:  # which is made when a run starts
      try:
        find_source(source)
      except (DataError, OSError) as error:
        raise ConfigError(f"{str(error).removeprefix('data.sources: ')}; or {NO_DATA}, to name it later") from None
  return sources


def parse_tokenizer(text: str) -> Tokenizer:
  """A tokenizer by its name, or the path of a tokenizer.json, which is read. Raises ConfigError."""
  if text in TOKENIZER_SIZES:
    return Tokenizer(text, TOKENIZER_SIZES[text])
  if not text.isprintable():
    raise ConfigError(f"expected a name or a path of printable characters, got {text!r:.60}")
  try:
    return Tokenizer(text, load_tokenizer(text).vocab)
  except DataError as error:
    raise ConfigError(str(error).removeprefix("data.tokenizer: ")) from None


def parse_seq(text: str) -> int:
  """Tokens of a sequence. Raises ConfigError."""
  seq = parse_amount(text, "tokens", MOST_TOKENS, "256 or 4096")
  if seq % 1 or not 2 <= seq <= 2**20:
    raise ConfigError(f"expected a whole number from 2 to {2**20:,}, got {text!r:.60}")
  return int(seq)


def parse_name(text: str) -> str:
  """The name of an experiment. Raises ConfigError."""
  try:
    return Config(name=text).name
  except ConfigError as error:
    raise ConfigError(str(error).removeprefix("name ")) from None


def is_cpu(answers: Mapping[str, Any]) -> bool:
  """Whether the answered hardware is a CPU."""
  return answers["topology"].is_cpu


QUESTIONS = (
  Question(
    "model", "model", "Which kind of model, dense or moe?",
    ("dense  as DeepSeek LLM: every token uses all parameters. Simple, and the scaling laws were measured on it.",
     "moe    as DeepSeek-V3: a mixture of experts of which a token uses a few, latent attention (MLA) with a small cache, a",
     "       sigmoid router balanced by biases, multi-token prediction (MTP). Lower loss per FLOP, more memory."),
    lambda answers: "dense", parse_model,
  ),
  Question(
    "topology", "topology", "On which hardware?",
    ("here, or a topology: v5p:8x8x8 (TPU chips), 2*v5p:8x8x8 (slices), h100:4x8 (nodes x GPUs), h200 (one GPU)",),
    lambda answers: "here", find_hardware,
  ),
  Question(
    "length", "tokens or --hours", "How many tokens, or hours?",
    ("Tokens as 2e9 or 500M, hours as 12h. The size of the model follows from it.",),
    lambda answers: "0.5h" if is_cpu(answers) else "24h", parse_length,
  ),
  Question(
    "data", "data", "Which text?",
    ("Files, folders or globs with commas between (.txt .py .md .jsonl .parquet), also gs:// and s3://; none: not yet, the",
     "config trains on Python's own library until you name it."),
    lambda answers: NO_DATA, parse_data,
  ),
  Question(
    "tokenizer", "tokenizer", "Which tokenizer?",
    ("byte, deepseek-llm, deepseek-v3, or the path of a tokenizer.json",),
    lambda answers: "byte" if is_cpu(answers) else "deepseek-v3" if answers["model"] == "moe" else "deepseek-llm",
    parse_tokenizer,
  ),
  Question(
    "seq", "seq", "How many tokens has a sequence?", (),
    lambda answers: "256" if is_cpu(answers) else "4096", parse_seq,
  ),
  Question("name", "name", "How is the experiment called?", (), lambda answers: "mine", parse_name),
)  # fmt: skip


class Interview:
  """Answers the questions, from flags, from a terminal, or by defaults.

  Args:
    given: {key: (flag, text)} of the flags.
    interactive: whether to ask at the terminal. Otherwise a question without a flag has its default, which is shown.
    check_name: raises ConfigError for a name that cannot be used.
  """

  def __init__(
    self, given: Mapping[str, tuple[str, str]], interactive: bool, check_name: Callable[[str], None] = lambda name: None
  ):
    self._given, self._interactive, self._check_name = given, interactive, check_name
    self._texts: dict[str, str] = {}  # of the answers at the terminal, which are the next defaults

  @property
  def can_ask_again(self) -> bool:
    """Whether other answers can come of another round."""
    return self._interactive and bool(self._texts)

  def ask(self, **defaults: str) -> Answers:
    """Answers to all questions. defaults: {key: text} instead of the questions' own. Raises ConfigError."""
    # Flags first: nobody answers questions to be told of a wrong flag.
    questions = {question.key: question for question in QUESTIONS}
    answers = {key: self._parse_flag(questions[key], *given) for key, given in self._given.items()}
    for question in QUESTIONS:
      if question.key in answers:
        continue
      default = self._texts.get(question.key) or defaults.get(question.key) or question.default(answers)
      if self._interactive:
        answers[question.key] = self._ask_one(question, default)
      else:
        current_console().print(f"{question.key:12} {default} (the default; --{question.flag} sets it)")
        answers[question.key] = self._parse_default(question, default)
    return Answers(**answers)

  def _parse(self, question: Question, text: str) -> Any:
    answer = question.parse(text)
    if question.key == "name":
      self._check_name(answer)
    return answer

  def _parse_flag(self, question: Question, flag: str, text: str) -> Any:
    parse = {"tokens": parse_tokens, "hours": parse_hours}.get(flag)
    try:
      return parse(text) if parse else self._parse(question, text)
    except ConfigError as error:
      shown = text if text.isprintable() else repr(text)
      raise ConfigError(f"--{flag}={shown:.80}: {error}") from None

  def _parse_default(self, question: Question, text: str) -> Any:
    try:
      return self._parse(question, text)
    except ConfigError as error:
      raise ConfigError(f"{question.key} {text}: {error}; --{question.flag} gives another") from None

  def _ask_one(self, question: Question, default: str) -> Any:
    console = current_console()
    console.print("\n".join(("", *question.help)))
    while True:
      try:
        text = input(f"{question.text} [{default}] ").strip() or default
      except EOFError:
        raise ConfigError(
          f"the input ended at the question for --{question.flag}: give that flag, or --yes for the defaults"
        ) from None
      except UnicodeDecodeError as error:
        console.print(f"  expected text in {error.encoding}, got bytes that are none")
        continue
      try:
        answer = self._parse(question, text)
      except ConfigError as error:
        console.print(f"  {error}")
        continue
      self._texts[question.key] = text
      return answer
