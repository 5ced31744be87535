"""A model served as a user serves it, against the same model asked directly."""

import json
import threading

import numpy as np
import openai
import pytest

from deepseek_jax.checkpoint.load import open_saved_model
from deepseek_jax.config_sections import SampleConfig
from deepseek_jax.evaluate.language_model import LanguageModel
from tests.saved_models import SEQ, TEXT, write_hugging_face
from tests.serve.servers import events, serving, wait_until

PROMPTS = [TEXT[:9], TEXT[12:20], "a text", TEXT[30:33]]
NEW = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write_hugging_face(tmp_path_factory.mktemp("served") / "hf", num_nextn_predict_layers=1)


@pytest.fixture(scope="module")
def server(folder):
  with serving(f"--from={folder}", "--served_model_name=small", "--max_batch=4", "--max_queue=100") as running:
    yield running


@pytest.fixture(scope="module")
def client(server):
  with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
    yield client


@pytest.fixture(scope="module")
def model(folder):
  saved = open_saved_model(folder)
  return LanguageModel(saved, saved.load_tokenizer(), batch=4)


def test_greedy_texts_are_those_of_the_model(client, model):
  expected = model.generate(PROMPTS, SampleConfig(max_tokens=NEW, temperature=0.0))
  answer = client.completions.create(model="small", prompt=PROMPTS, max_tokens=NEW, temperature=0)
  assert [choice.text for choice in answer.choices] == expected
  stream = client.completions.create(model="small", prompt=PROMPTS[0], max_tokens=NEW, temperature=0, stream=True)
  assert "".join(chunk.choices[0].text for chunk in stream) == expected[0]


def test_log_probabilities_of_a_prompt_are_those_of_an_evaluation(client, model):
  pairs = [("the words of", " a text"), ("the model", " sees")]
  expected = model.log_likelihoods(pairs)
  for (context, continuation), likelihood in zip(pairs, expected, strict=True):
    ids = model.encode(context + continuation)
    answer = client.completions.create(model="small", prompt=ids, max_tokens=0, echo=True, logprobs=1)
    got = answer.choices[0].logprobs
    scored = got.token_logprobs[len(ids) - likelihood.num_tokens :]
    assert sum(scored) == pytest.approx(likelihood.log_prob, abs=1e-4)
    tops = [max(top.values()) for top in got.top_logprobs[-len(scored) :]]
    assert (scored == tops) == likelihood.is_greedy


def test_a_chat_answers_and_what_does_not_fit_is_an_error(client):
  messages = [{"role": "user", "content": "words"}]
  answer = client.chat.completions.create(model="small", messages=messages, max_tokens=4, logprobs=True, top_logprobs=2)
  assert answer.usage.completion_tokens <= 4 and answer.choices[0].message.role == "assistant"
  with pytest.raises(openai.BadRequestError, match=f"{SEQ}"):
    client.completions.create(model="small", prompt=[5] * SEQ, max_tokens=1)


def test_random_requests_compile_nothing_and_leave_nothing(server, client):
  compilations, rng = server.metric("engine_compilations_total"), np.random.default_rng(0)
  assert compilations > 0
  bodies = [
    {
      "prompt": rng.integers(0, 290, rng.integers(1, 30)).tolist(), "max_tokens": int(rng.integers(1, 18)), "seed": i,
      "temperature": float(rng.choice([0, 1])), "top_p": float(rng.choice([0.5, 1])), "top_k": int(rng.choice([0, 5])),
      "logprobs": int(rng.integers(0, 5)), "frequency_penalty": float(rng.choice([0, 1])), "echo": bool(rng.integers(2)),
    }
    for i in range(24)
  ]  # fmt: skip
  texts = {}

  def ask(i):
    answer = server.post(model="small", **bodies[i]).json()
    texts[i] = answer["choices"][0]["text"], answer["choices"][0]["logprobs"]

  threads = [threading.Thread(target=ask, args=(i,)) for i in range(24)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  together = dict(texts)
  for i in range(0, 24, 4):
    ask(i)  # alone
    assert texts[i] == together[i], json.dumps(bodies[i])
  wait_until(server.engine_is_idle)
  assert server.metric("engine_compilations_total") == compilations
  pages = [server.metric(f"engine_{name}pages") for name in ("free_", "cached_", "")]
  assert pages[0] + pages[1] == pages[2]


def test_a_client_that_leaves_frees_its_slot(server):
  before = server.metric("engine_cancelled_total")
  body = {"prompt": [5], "max_tokens": SEQ - 2, "stream": True, "ignore_eos": True, "n": 30}
  with server.http.stream("POST", "/v1/completions", json=body) as response:
    next(response.iter_lines())
  wait_until(server.engine_is_idle)
  assert server.metric("engine_cancelled_total") > before


def test_usage_counts_are_those_of_the_metrics(server):
  names = ("engine_prompt_tokens_total", "engine_generated_tokens_total")
  before = [server.metric(name) for name in names]
  body = {"prompt": [[5, 6, 7], [8]], "max_tokens": 9, "stream": True, "stream_options": {"include_usage": True}}
  usage = events(server.post(**body).text)[-1]["usage"]
  after = [server.metric(name) - value for name, value in zip(names, before, strict=True)]
  assert after == [usage["prompt_tokens"], usage["completion_tokens"]] and after[0] == 4


def test_a_mesh_and_speculation_change_no_text(folder, model, monkeypatch):
  monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
  expected = model.generate(PROMPTS, SampleConfig(max_tokens=NEW, temperature=0.0))
  flags = (f"--from={folder}", "--devices=2", "--tensor_parallel=2", "--speculate", "--max_batch=2")
  with serving(*flags) as server:
    texts = [choice["text"] for choice in server.post(prompt=PROMPTS, max_tokens=NEW, temperature=0).json()["choices"]]
    assert texts == expected and server.metric("engine_drafted_tokens_total") > 0
