"""Chat templates: Jinja that makes the text of a prompt of messages, run in a sandbox, as transformers runs it."""

import datetime
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from deepseek_jax.errors import ConfigError
from deepseek_jax.serve.request_error import RequestError

# The format that DeepSeek LLM's repository documents for its chat models.
DEEPSEEK_LLM = """{{ bos_token }}
{%- for message in messages %}
  {%- if message.role == "user" %}{{- "User: " + message.content + "\\n\\n" }}
  {%- elif message.role == "assistant" %}{{- "Assistant: " + message.content + eos_token }}
  {%- else %}{{- message.content + "\\n\\n" }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "Assistant:" }}{% endif %}"""
MAX_TEXT_CHARACTERS = 16 * 2**20  # a template may multiply what a request sends


class ChatTemplate:
  """A compiled template.

  Args:
    source: Jinja.
    tokens: texts of special tokens, by the names that templates know them by: bos_token, eos_token.

  Raises ConfigError where it is no Jinja.
  """

  def __init__(self, source: str, tokens: Mapping[str, str]):
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    try:
      self._template = environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
      raise ConfigError(f"the chat template is no Jinja: line {error.lineno}: {error.message}") from None
    self._tokens = dict(tokens)

  def render(self, messages: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]) -> str:
    """The text of a prompt. arguments: more variables, as add_generation_prompt. Raises RequestError 400 where the template
    refuses the messages or fails on them.
    """
    variables = {"tools": None, "documents": None, **arguments, **self._tokens, "messages": messages}
    parts, size = [], 0
    try:
      for part in self._template.generate(variables):
        parts.append(part)
        size += len(part)
        if size > MAX_TEXT_CHARACTERS:
          raise _refusal(f"it makes more than {MAX_TEXT_CHARACTERS} characters of them")
    except (
      jinja2.TemplateError,
      ArithmeticError,
      AttributeError,
      LookupError,
      RecursionError,
      TypeError,
      ValueError,
    ) as error:
      # What a template does with unexpected messages raises what Python raises.
      raise _refusal(str(error)[:300]) from None
    return "".join(parts)


def find_chat_template(file: str | None, folders: Iterable[pathlib.Path]) -> tuple[str | None, dict[str, str | None]]:
  """(Jinja, {name of a special token: its text}) of `file` or else of the first of `folders` that has a template.

  Folders are those of tokenizers, as Hugging Face lays them out: chat_template.jinja, chat_template.json or
  tokenizer_config.json. The template is None where there is none. A token is None where tokenizer_config.json says that
  there is none. Raises ConfigError for a file that cannot be read.
  """
  tokens: dict[str, str | None] = {}
  source = None if file is None else _read(pathlib.Path(file).expanduser())
  for folder in folders:
    config = _read_json(folder / "tokenizer_config.json")
    if not tokens:
      tokens = _special_tokens(config)
    if source is None and (path := folder / "chat_template.jinja").is_file():
      source = _read(path)
    if source is None:
      found = _read_json(folder / "chat_template.json").get("chat_template") or config.get("chat_template")
      source = _default_template(found)
  return source, tokens


def _default_template(value: Any) -> str | None:
  """A template, or the one called default of a list of named ones."""
  if isinstance(value, list):
    named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
    value = named.get("default")
  return value if isinstance(value, str) else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str | None]:
  tokens: dict[str, str | None] = {}
  for name, value in config.items():
    content = value.get("content") if isinstance(value, dict) else value
    if name.endswith("_token") and (content is None or isinstance(content, str)):
      tokens[name] = content
  return tokens


def _read(path: pathlib.Path) -> str:
  try:
    return path.read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise ConfigError(f"the chat template {path} cannot be read: {error}") from None


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  """The object of a file; {} where there is none."""
  if not path.is_file():
    return {}
  try:
    content = json.loads(_read(path))
  except (ValueError, RecursionError) as error:
    raise ConfigError(f"{path} should be a JSON object: {error}") from None
  return content if isinstance(content, dict) else {}


def _refusal(reason: str) -> RequestError:
  return RequestError(400, f"the chat template refuses these messages: {reason}", "messages", "invalid_value")


def _raise_exception(message: str) -> None:
  raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
  """As transformers: plain JSON, where Jinja's own filter writes for HTML."""
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


class _GenerationTag(jinja2.ext.Extension):
  """{% generation %} marks what an assistant says, for training; a prompt has its content."""

  tags = {"generation"}

  def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
    next(parser.stream)
    return parser.parse_statements(("name:endgeneration",), drop_needle=True)
