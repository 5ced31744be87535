import json

import pytest

from deepseek_jax.errors import ConfigError
from deepseek_jax.serve import chat_template
from deepseek_jax.serve.chat_template import DEEPSEEK_LLM, ChatTemplate, find_chat_template
from deepseek_jax.serve.request_error import RequestError

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
MESSAGES = [
  {"role": "system", "content": "S"},
  {"role": "user", "content": " a\n"},
  {"role": "assistant", "content": "b"},
  {"role": "user", "content": "c"},
]
# DeepSeek V3's chat format in short, with what templates use of Jinja.
V3 = """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{%- set ns = namespace(system='') %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {%- set ns.system = ns.system + message['content'] %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}{{ ns.system }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- '<｜User｜>' + message['content'] }}
    {%- endif %}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- '<｜Assistant｜>' + message['content'] + eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"""


def render(source, messages=MESSAGES, **arguments):
  return ChatTemplate(source, TOKENS).render(messages, {"add_generation_prompt": True, **arguments})


def test_deepseek_llm_s_format():
  assert render(DEEPSEEK_LLM) == "<s>S\n\nUser:  a\n\n\nAssistant: b</s>User: c\n\nAssistant:"
  assert render(DEEPSEEK_LLM, add_generation_prompt=False).endswith("User: c\n\n")


def test_a_template_of_v3():
  assert render(V3) == "<s>S<｜User｜> a\n<｜Assistant｜>b</s><｜User｜>c<｜Assistant｜>"


@pytest.mark.parity
@pytest.mark.parametrize(
  "source", [DEEPSEEK_LLM, V3.replace("{%- generation %}", "").replace("{% endgeneration %}", "")]
)
def test_it_equals_transformers(source):
  from transformers.utils.chat_template_utils import _compile_jinja_template

  compiled = _compile_jinja_template(source)
  assert compiled.render(messages=MESSAGES, add_generation_prompt=True, **TOKENS) == render(source)


def test_functions_that_templates_call():
  assert render("{{ messages[0] | tojson }}", [{"content": "<é>"}]) == '{"content": "<é>"}'
  assert render("{{ strftime_now('%Y') }}").isdecimal()
  assert render("{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}x{% endfor %}") == "x"
  assert render("{{ tools is none }}{{ thinking }}", thinking=True) == "TrueTrue"


@pytest.mark.parametrize(
  "source",
  [
    "{{ raise_exception('roles must alternate') }}",
    "{{ messages.nothing.more }}",
    "{{ messages[0]['content'] + 1 }}",
    "{{ 1 // 0 }}",
    "{{ messages[99].content }}",
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
  ],
)
def test_what_fails_is_a_refusal(source):
  with pytest.raises(RequestError, match="the chat template refuses these messages") as caught:
    render(source)
  assert caught.value.status == 400


@pytest.mark.parametrize(
  "expression",
  [
    "''.__class__.__mro__[1].__subclasses__()",
    "messages.__init__.__globals__",
    "cycler.__init__.__globals__.os.popen('true').read()",
    "strftime_now.__globals__",
    "raise_exception.__globals__['jinja2']",
    "messages.append(1)",
    "messages[0].update(role='x')",
    "'{0.__class__}'.format(1)",
    "('{0.__class__.__mro__}' | format(1)) ~ messages.__class__",
  ],
)
def test_the_sandbox_holds(expression):
  try:
    text = render("{{ " + expression + " }}")
  except RequestError:
    return
  assert text == ""  # Jinja prints what it has hidden as nothing


def test_text_that_grows_too_long(monkeypatch):
  monkeypatch.setattr(chat_template, "MAX_TEXT_CHARACTERS", 1000)
  with pytest.raises(RequestError, match="more than 1000 characters"):
    render("{% for m in messages %}{% for i in range(1000) %}{{ m.content }}{% endfor %}{% endfor %}")


def test_a_request_cannot_replace_messages_or_tokens():
  template = ChatTemplate("{{ bos_token }}{{ messages | length }}", TOKENS)
  assert template.render(MESSAGES, {"bos_token": "x", "messages": [], "self": 1}) == "<s>4"


def test_what_is_no_jinja():
  with pytest.raises(ConfigError, match="line 2"):
    ChatTemplate("x\n{% if %}", {})


def write(folder, **files):
  folder.mkdir(exist_ok=True)
  for name, content in files.items():
    path = folder / name.replace("__", ".")
    path.write_text(content if isinstance(content, str) else json.dumps(content))
  return folder


def test_where_templates_are_found(tmp_path):
  empty = write(tmp_path / "empty")
  config = {"bos_token": {"content": "<s>"}, "eos_token": None, "add_bos_token": True, "chat_template": "config"}
  folder = write(tmp_path / "model", tokenizer_config__json=config)
  assert find_chat_template(None, [empty, folder]) == ("config", {"bos_token": "<s>", "eos_token": None})
  named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
  write(folder, tokenizer_config__json=config | {"chat_template": named})
  assert find_chat_template(None, [folder])[0] == "d"
  write(folder, chat_template__json={"chat_template": "json"})
  assert find_chat_template(None, [folder])[0] == "json"
  write(folder, chat_template__jinja="jinja")
  assert find_chat_template(None, [folder])[0] == "jinja"
  given = write(tmp_path / "given", file__txt="given")
  assert find_chat_template(str(given / "file.txt"), [folder]) == ("given", {"bos_token": "<s>", "eos_token": None})
  assert find_chat_template(None, [empty]) == (None, {})


def test_files_that_cannot_be_read(tmp_path):
  with pytest.raises(ConfigError, match="cannot be read"):
    find_chat_template(str(tmp_path / "nothing.jinja"), [])
  with pytest.raises(ConfigError, match="should be a JSON object"):
    find_chat_template(None, [write(tmp_path / "bad", tokenizer_config__json="{")])
