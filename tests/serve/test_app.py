import asyncio
import json
import socket
import threading
import time
import types

import httpx
import openai
import pytest

from deepseek_jax.generate.request import EngineStats
from deepseek_jax.serve.app import Service, make_app
from deepseek_jax.serve.chat_template import ChatTemplate
from deepseek_jax.serve.messages import Settings
from tests.serve.fake_engine import DEFAULTS
from tests.serve.servers import events, serving, wait_until

GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def client(server):
  with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as made:
    yield made


def test_models_and_health(server, client):
  [model] = client.models.list().data
  assert (model.id, model.object) == ("fake", "model")
  assert client.models.retrieve("fake").id == "fake"
  assert server.http.get("/health").json() == {"status": "ok"}


def test_a_completion(client):
  answer = client.completions.create(model="fake", prompt="abc", max_tokens=7, temperature=0)
  [choice] = answer.choices
  assert (choice.text, choice.finish_reason, choice.logprobs) == ("cbacbac", "length", None)
  assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (4, 7, 11)
  assert answer.object == "text_completion" and answer.id.startswith("cmpl-")


def test_sixteen_tokens_by_default(client):
  assert len(client.completions.create(model="fake", prompt="ab", temperature=0).choices[0].text) == 16


@pytest.mark.parametrize(
  ("prompt", "texts"),
  [
    (["ab", "cde"], ["baba", "edce"]),
    ([97, 98], ["baba"]),
    ([[97, 98], [99, 100, 101]], ["baba", "edce"]),
  ],
)
def test_prompts_in_every_form(client, prompt, texts):
  answer = client.completions.create(model="fake", prompt=prompt, max_tokens=4, temperature=0)
  assert [choice.text for choice in answer.choices] == texts
  assert [choice.index for choice in answer.choices] == list(range(len(texts)))


def test_whether_bos_comes_before_text(server):
  counts = [
    server.post(prompt="abc", max_tokens=1, add_special_tokens=add).json()["usage"]["prompt_tokens"]
    for add in (True, False)
  ]
  assert counts == [4, 3]


def test_n_answers_differ_and_a_seed_repeats_them(client):
  ask = lambda seed: [
    c.text for c in client.completions.create(model="fake", prompt="b", max_tokens=2, n=4, seed=seed).choices
  ]
  assert len(set(ask(3))) > 1
  assert ask(3) == ask(3) != ask(4)
  assert ask(-(2**62)) == ask(-(2**62))
  together = client.completions.create(model="fake", prompt=["a", "b"], max_tokens=2, n=4, seed=3)
  assert [choice.text for choice in together.choices[4:]] == ask(3)


def test_usage_counts_a_prompt_once_however_many_its_answers(client):
  usage = client.completions.create(model="fake", prompt=[[97, 98, 99], [97]], n=3, max_tokens=2, seed=0).usage
  assert (usage.prompt_tokens, usage.completion_tokens) == (4, 12)
  assert usage.prompt_tokens_details.cached_tokens == 2


def test_a_stream_has_the_text_of_the_whole(client):
  arguments = {"model": "fake", "prompt": ["héllo", "abc"], "max_tokens": 23, "temperature": 0}
  whole = client.completions.create(**arguments)
  texts, reasons = ["", ""], {}
  for chunk in client.completions.create(**arguments, stream=True, stream_options={"include_usage": True}):
    for choice in chunk.choices:
      texts[choice.index] += choice.text
      reasons[choice.index] = choice.finish_reason
      assert choice.text.isascii() or "é" in choice.text or "\ufffd" in choice.text
  assert texts == [choice.text for choice in whole.choices]
  assert reasons == {0: "length", 1: "length"}
  assert chunk.choices == [] and chunk.usage == whole.usage


def test_usage_in_every_event(server):
  options = {"include_usage": True, "continuous_usage_stats": True}
  response = server.post(prompt="abc", max_tokens=3, stream=True, stream_options=options, **GREEDY)
  assert response.headers["content-type"].startswith("text/event-stream")
  got = events(response.text)
  assert [event["usage"]["completion_tokens"] for event in got] == [1, 2, 3, 3]
  [first, *_] = events(server.post(prompt="abc", max_tokens=3, stream=True, **GREEDY).text)
  assert "usage" not in first


def test_an_event_is_one_line_whatever_the_text(server):
  text = "a\x85b\u2028c\u2029d\x0b\x0c\x1c\r\n"
  body = {"prompt": list(text.encode())[::-1], "max_tokens": len(text.encode()), "temperature": 0, "stream": True}
  with server.http.stream("POST", "/v1/completions", json=body) as response:
    lines = [line for line in response.iter_lines() if line]  # which splits as str.splitlines
  got = [json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines[:-1]]
  assert "".join(got) == text and lines[-1] == "data: [DONE]"


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_answer_and_the_request(server, client, stream):
  before = server.metric("engine_cancelled_total")
  answer = client.completions.create(
    model="fake", prompt="abcde", max_tokens=300, temperature=0, stop=["ae", "zz"], stream=stream
  )
  choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
  assert "".join(choice.text for choice in choices) == "edcb"
  assert choices[-1].finish_reason == "stop"
  wait_until(server.engine_is_idle)
  assert server.metric("engine_cancelled_total") == before + 1


def test_the_end_of_the_document(client):
  ask = lambda **more: client.completions.create(
    model="fake", prompt="abQcd", max_tokens=8, temperature=0, extra_body=more
  )
  answer = ask()
  assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("dc", "stop")
  assert answer.usage.completion_tokens == 2
  answer = ask(ignore_eos=True)
  assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("dcbadc", "length")
  assert answer.usage.completion_tokens == 8


def test_logprobs_of_a_completion(client):
  answer = client.completions.create(model="fake", prompt="aé", max_tokens=3, temperature=0, logprobs=2, echo=True)
  [choice] = answer.choices
  assert choice.text == "aé\ufffd\ufffda"
  got = choice.logprobs
  assert got.tokens == ["<|endoftext|>", "a", "bytes:\\xc3", "bytes:\\xa9", "bytes:\\xa9", "bytes:\\xc3", "a"]
  assert got.token_logprobs == [None, *[-1.5] * 6]
  assert got.text_offset[:6] == [0, 0, 1, 1, 2, 3]
  assert got.top_logprobs[0] is None
  assert got.top_logprobs[1] == {"b": -0.5, "a": -1.5}


def test_the_token_itself_is_among_the_likeliest(client):
  answer = client.completions.create(model="fake", prompt="a", max_tokens=1, temperature=0, logprobs=1)
  assert answer.choices[0].logprobs.top_logprobs == [{"b": -0.5, "a": -1.5}]
  answer = client.completions.create(model="fake", prompt="a", max_tokens=1, temperature=0, logprobs=0)
  assert answer.choices[0].logprobs.top_logprobs == [{"a": -1.5}]


@pytest.mark.parametrize("prompt", [[97, 98, 99], [97, 98, ord("Q")]])
def test_what_lm_eval_parses(server, prompt):
  """`choices[].logprobs.token_logprobs[context:-1]`: one token follows, also where it ends the document."""
  body = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
  choices = server.post(prompt=[prompt, [97, 98]], **body).json()["choices"]
  for choice, ids in zip(choices, [prompt, [97, 98]], strict=True):
    assert len(choice["logprobs"]["token_logprobs"]) == len(choice["logprobs"]["top_logprobs"]) == len(ids) + 1
    assert sum(choice["logprobs"]["token_logprobs"][1:-1]) == -1.5 * (len(ids) - 1)
  assert [choice["finish_reason"] for choice in choices] == ["stop" if prompt[-1] == ord("Q") else "length", "length"]


def test_a_prompt_alone_is_scored(server):
  body = server.post(prompt="abc", max_tokens=0, echo=True, logprobs=1).json()
  [choice] = body["choices"]
  assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
  assert choice["logprobs"]["token_logprobs"] == [None, -1.5, -1.5, -1.5]
  assert body["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_echo(client, stream):
  answer = client.completions.create(model="fake", prompt="abc", max_tokens=3, temperature=0, echo=True, stream=stream)
  choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
  assert "".join(choice.text for choice in choices) == "abccba"


MESSAGES = [{"role": "user", "content": "abc"}]
PROMPT = "<bos>User: abc\n\nAssistant:"


def test_a_chat(client):
  answer = client.chat.completions.create(model="fake", messages=MESSAGES, max_completion_tokens=10, temperature=0)
  [choice] = answer.choices
  assert (choice.message.role, choice.message.content) == ("assistant", ":tnatsissA")
  assert choice.finish_reason == "length" and choice.logprobs is None
  assert answer.object == "chat.completion"
  assert answer.usage.prompt_tokens == 1 + len(PROMPT) - len("<bos>")


def test_a_chat_takes_what_fits(client):
  answer = client.chat.completions.create(model="fake", messages=MESSAGES, temperature=0)
  assert answer.usage.total_tokens == 400


def test_a_chat_stream(server, client):
  arguments = {"model": "fake", "messages": MESSAGES, "max_tokens": 10, "temperature": 0, "n": 2}
  chunks = list(client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True}))
  assert [chunk.choices[0].delta.role for chunk in chunks[:2]] == ["assistant", "assistant"]
  for index in (0, 1):
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    assert "".join(choice.delta.content or "" for choice in choices) == ":tnatsissA"
    assert choices[-1].finish_reason == "length"
  assert chunks[-1].usage.completion_tokens == 20
  with client.chat.completions.stream(model="fake", messages=MESSAGES, stop="ss", temperature=0) as stream:
    assert stream.get_final_completion().choices[0].message.content == ":tnatsi"


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_chat(client, stream):
  answer = client.chat.completions.create(
    model="fake", messages=MESSAGES, max_tokens=2, temperature=0, logprobs=True, top_logprobs=2, stream=stream
  )
  choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
  content = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
  assert [(entry.token, entry.logprob, entry.bytes) for entry in content] == [(":", -1.5, [58]), ("t", -1.5, [116])]
  assert [(top.token, top.logprob) for top in content[0].top_logprobs] == [(";", -0.5), (":", -1.5)]


def test_messages_in_parts_and_turns(client):
  messages = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d"},
  ]
  answer = client.chat.completions.create(model="fake", messages=messages, max_tokens=400 - 100, temperature=0)
  text = "S\n\nUser: ab\n\nAssistant: cUser: d\n\nAssistant:"
  assert answer.choices[0].message.content.startswith(text[::-1])
  assert answer.usage.prompt_tokens == 2 + len(text)  # bos, and eos after the assistant's turn


BAD = {
  "no prompt": ({}, "prompt"),
  "empty prompt": ({"prompt": ""}, "prompt"),
  "no ids": ({"prompt": []}, "prompt"),
  "an empty list among prompts": ({"prompt": [[97], []]}, "prompt"),
  "a number as prompt": ({"prompt": 3}, "prompt"),
  "mixed": ({"prompt": ["a", 3]}, "prompt"),
  "booleans": ({"prompt": [True]}, "prompt"),
  "an unknown id": ({"prompt": [300]}, "prompt"),
  "a negative id": ({"prompt": [-1]}, "prompt"),
  "a huge id": ({"prompt": [2**63]}, "prompt"),
  "text as a number": ({"prompt": "a", "max_tokens": "3"}, "max_tokens"),
  "true as a number": ({"prompt": "a", "max_tokens": True}, "max_tokens"),
  "less than nothing": ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
  "too long": ({"prompt": "a", "max_tokens": 400}, "max_tokens"),
  "too long a prompt": ({"prompt": "a" * 500}, "prompt"),
  "too many ids": ({"prompt": [97] * 1000}, "prompt"),
  "lists too many": ({"prompt": [[97]] * 1000}, "prompt"),
  "far too long a prompt": ({"prompt": "a" * 100_000}, "prompt"),
  "temperature": ({"prompt": "a", "temperature": -1}, "temperature"),
  "top_p": ({"prompt": "a", "top_p": 2}, "top_p"),
  "a list as a number": ({"prompt": "a", "top_p": [1]}, "top_p"),
  "penalty": ({"prompt": "a", "presence_penalty": 3}, "presence_penalty"),
  "top_k": ({"prompt": "a", "top_k": 1.5}, "top_k"),
  "a huge top_k": ({"prompt": "a", "top_k": 2**31}, "top_k"),
  "no answers": ({"prompt": "a", "n": 0}, "n"),
  "many answers": ({"prompt": "a", "n": 1000}, "n"),
  "many prompts": ({"prompt": ["a"] * 100, "n": 2}, "n"),
  "more than the queue": ({"prompt": ["a"] * 9}, "n"),
  "best_of": ({"prompt": "a", "best_of": 2}, "best_of"),
  "logprobs": ({"prompt": "a", "logprobs": 21}, "logprobs"),
  "logprobs as in a chat": ({"prompt": "a", "logprobs": True}, "logprobs"),
  "many stop strings": ({"prompt": "a", "stop": ["a"] * 17}, "stop"),
  "an empty stop string": ({"prompt": "a", "stop": ""}, "stop"),
  "a long stop string": ({"prompt": "a", "stop": "a" * 300}, "stop"),
  "stop as a number": ({"prompt": "a", "stop": [1]}, "stop"),
  "suffix": ({"prompt": "a", "suffix": "b"}, "suffix"),
  "logit_bias": ({"prompt": "a", "logit_bias": {"1": 100}}, "logit_bias"),
  "seed": ({"prompt": "a", "seed": "x"}, "seed"),
  "a stream as text": ({"prompt": "a", "stream": "yes"}, "stream"),
  "options without a stream": ({"prompt": "a", "stream_options": {}}, "stream_options"),
  "a misspelled field": ({"prompt": "a", "temprature": 0}, "temprature"),
  "model as a number": ({"prompt": "a", "model": 1}, "model"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_completions(server, name):
  body, param = BAD[name]
  check_error(server.post(**body), 400, param)


BAD_CHATS = {
  "no messages": ({}, "messages"),
  "empty": ({"messages": []}, "messages"),
  "a text": ({"messages": "hi"}, "messages"),
  "no object": ({"messages": ["hi"]}, "messages[0]"),
  "role": ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
  "no role": ({"messages": [{"content": "x"}]}, "messages[0].role"),
  "no content": ({"messages": [{"role": "user"}]}, "messages[0].content"),
  "image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
  "tool calls": ({"messages": [{"role": "user", "content": "", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
  "tools": ({"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools"),
  "response_format": ({"messages": MESSAGES, "response_format": {"type": "json_object"}}, "response_format"),
  "top_logprobs": ({"messages": MESSAGES, "top_logprobs": 3}, "top_logprobs"),
  "nothing to generate": ({"messages": MESSAGES, "max_tokens": 0}, "max_tokens"),
  "too long": ({"messages": [{"role": "user", "content": "a" * 500}]}, "messages"),
  "too many": ({"messages": MESSAGES * 500}, "messages"),
  "arguments": ({"messages": MESSAGES, "chat_template_kwargs": []}, "chat_template_kwargs"),
  "echo": ({"messages": MESSAGES, "echo": True}, "echo"),
}


@pytest.mark.parametrize("name", BAD_CHATS)
def test_bad_chats(server, name):
  body, param = BAD_CHATS[name]
  check_error(server.post("/v1/chat/completions", **body), 400, param)


def check_error(response, status, param=None, code=None):
  assert response.status_code == status, response.text
  error = response.json()["error"]
  assert set(error) == {"message", "type", "param", "code"}
  assert error["param"] == param and "Traceback" not in error["message"] and error["message"]
  if code:
    assert error["code"] == code
  return error["message"]


def test_lengths_are_in_the_message(server):
  message = check_error(server.post(prompt="a" * 500), 400, "prompt", "context_length_exceeded")
  assert "501" in message and "400" in message


def test_values_that_ask_for_nothing_are_fine(server):
  body = {"suffix": None, "logit_bias": {}, "tools": [], "response_format": {"type": "text"}, "user": "me", "top_k": -1}
  assert server.post(prompt="a", max_tokens=1, best_of=2, n=2, **body).status_code == 200


def test_unknown_models_and_routes(server, client):
  check_error(server.post(prompt="a", model="other"), 404, "model", "model_not_found")
  check_error(server.http.get("/v1/models/other"), 404, "model", "model_not_found")
  check_error(server.http.get("/v1/embeddings"), 404)
  check_error(server.http.get("/v1/completions"), 405)
  check_error(server.http.post("/health"), 405)
  with pytest.raises(openai.NotFoundError):
    client.completions.create(model="other", prompt="a")


def test_bodies_that_are_no_json(server):
  headers = {"Content-Type": "application/json"}
  for content in (b"", b"{", b"\xff", b"[" * 100_000, b'{"temperature": NaN}', b"[]", b"3"):
    check_error(server.http.post("/v1/completions", content=content, headers=headers), 400)
  check_error(server.http.post("/v1/completions", content=b'{"prompt": "a"}'), 400)


def test_a_large_body_is_refused(server):
  headers = {"Content-Type": "application/json"}
  check_error(server.http.post("/v1/completions", content=b" " * (9 * 2**20), headers=headers), 413)
  parts = (b" " * 2**20 for _ in range(9))  # of a length that is not said
  check_error(server.http.post("/v1/completions", content=parts, headers=headers), 413)


def test_one_answer_too_many_waits_for_nobody(server):
  def ask():
    answers.append(
      httpx.post(f"{server.url}/v1/completions", json={"prompt": "a" * 8, "max_tokens": 300, "n": 4}, timeout=30)
    )

  answers = []
  threads = [threading.Thread(target=ask) for _ in range(2)]
  for thread in threads:
    thread.start()
  wait_until(lambda: server.metric("engine_running") + server.metric("engine_waiting") == 8)
  refused = server.post(prompt="a", max_tokens=1)
  check_error(refused, 429)
  assert int(refused.headers["retry-after"]) >= 1
  for thread in threads:
    thread.join()
  assert [answer.status_code for answer in answers] == [200, 200]
  assert server.post(prompt="a", max_tokens=1).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_requests(server, stream):
  before = server.metric("engine_cancelled_total")
  body = json.dumps({"prompt": "abc", "max_tokens": 390, "n": 2, "stream": stream}).encode()
  with socket.create_connection(("127.0.0.1", server.port)) as connection:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    wait_until(lambda: server.metric("engine_running") == 2)
  wait_until(server.engine_is_idle)
  assert server.metric("engine_cancelled_total") == before + 2


def test_a_client_that_leaves_the_queue(server):
  with pytest.raises(httpx.ReadTimeout):
    httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 300, "n": 8}, timeout=0.2)
  wait_until(server.engine_is_idle)


def test_metrics_count(server):
  names = ("engine_prompt_tokens_total", "engine_generated_tokens_total", "time_to_first_token_seconds_count", "inter_token_latency_seconds_count", 'choices_total{finish_reason="length"}', 'responses_total{route="/v1/completions",status="200"}')  # fmt: skip
  before = [server.metric(name) for name in names]
  server.post(prompt="abc", max_tokens=5)
  assert [server.metric(name) - old for name, old in zip(names, before, strict=True)] == [4, 5, 1, 4, 1, 1]
  assert 0 < server.metric("engine_occupancy") <= 1


def test_answers_at_a_time_do_not_mix(server):
  async def ask_all():
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
      ask = lambda prompt: client.completions.create(model="fake", prompt=prompt, max_tokens=30, temperature=0)
      return await asyncio.gather(*map(ask, prompts))

  prompts = ["abc", "d", "efghij", "kl", "mno", "pq", "rst", "uvw"]
  for prompt, answer in zip(prompts, asyncio.run(ask_all()), strict=True):
    assert answer.choices[0].text == (prompt[::-1] * 30)[:30]


def test_an_error_of_the_server_s_says_nothing_of_it():
  def fail(text):
    raise RuntimeError("a secret")

  async def ask():
    transport = httpx.ASGITransport(make_app(service), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
      return await client.post("/v1/completions", json={"prompt": "a"})

  tokenizer, client = types.SimpleNamespace(encode=fail, bos=0), types.SimpleNamespace(check_room=lambda count: None)
  service = Service(Settings(**DEFAULTS), tokenizer, ChatTemplate("", {}), client)
  assert "secret" not in check_error(asyncio.run(ask()), 500, code="internal_error")
  assert b'responses_total{route="/v1/completions",status="500"} 1.0' in service.metrics.to_text(EngineStats())


def test_a_key_and_names_of_this_machine():
  hosts = ("localhost", "127.0.0.1")
  with serving(api_key="secret", local_hosts=hosts) as server:
    for given, problem in (
      (None, "no"),
      ("Bearer wrong", "wrong"),
      ("Bearer", "no"),
      ("secret", "no"),
      ("Basic secret", "no"),
    ):
      headers = {} if given is None else {"Authorization": given}
      message = check_error(server.http.get("/v1/models", headers=headers), 401, code="invalid_api_key")
      assert message.startswith(f"{problem} API key")
    assert server.http.get("/v1/models", headers={"Authorization": "bearer secret"}).status_code == 200
    assert server.http.get("/health").status_code == 200
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret") as client:
      assert client.models.list().data[0].id == "fake"
    started = time.monotonic()
    for host, status in (("localhost", 200), ("LOCALHOST:1", 200), ("evil.example", 403), ("evil.example:80", 403)):
      assert server.http.get("/health", headers={"Host": host}).status_code == status
    assert time.monotonic() - started < 5
