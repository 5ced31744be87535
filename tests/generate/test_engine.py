"""Continuous batching: a request's tokens are its own, whoever is beside it, whatever the cache holds, on every mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.config_sections import MeshConfig
from deepseek_jax.errors import ConfigError
from deepseek_jax.generate.engine import Engine, EngineConfig
from deepseek_jax.generate.request import Request, Sampling
from deepseek_jax.mesh import make_mesh
from deepseek_jax.model.transformer import graphdef, init_params
from tests import configs
from tests.steps import compilations

pytestmark = pytest.mark.jax_version

VOCAB, EOS = 60, 59
V3 = dataclasses.replace(configs.V3, init_std=0.3, remat="none")
GQA = dataclasses.replace(
  configs.DENSE, init_std=0.3, attention=dataclasses.replace(configs.GQA, heads=4, kv_heads=2, window=9)
)
MODELS = {"v3": V3, "gqa with a window": GQA}
SIZES = EngineConfig(max_batch=4, max_length=64, page_size=4, chunk=8, token_budget=20)
GREEDY = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=2)


def float64(model):
  return dataclasses.replace(model, param_dtype="float64", compute_dtype="float64")


@pytest.fixture(scope="module")
def engines():
  """(model, sizes, vocab, axes of the mesh) -> a context with an engine; those of one model have the same weights."""
  mesh_of = {}

  def make(model, sizes=SIZES, vocab=VOCAB, **axes):
    devices = int(np.prod(list(axes.values()))) if axes else 1
    mesh = make_mesh(MeshConfig(**{"data": 1, **axes}), jax.devices()[:devices])
    with jax.set_mesh(mesh):
      params, buffers = jax.block_until_ready(jax.jit(init_params, static_argnums=0)(model, jax.random.key(3)))
      mesh_of[(engine := Engine(model, params, buffers, mesh, vocab, EOS, sizes, "weights"))] = mesh
    engine.params, engine.buffers = params, buffers
    return engine

  def run(engine, requests, before_step=lambda step: None):
    """{id: (tokens, logprobs, last output)} of `requests` (prompt, sampling), in the order of their ids."""
    answers, step = {}, 0
    with jax.set_mesh(mesh_of[engine]):
      for i, (prompt, sampling) in enumerate(requests):
        engine.add(Request(i, tuple(prompt), sampling))
      while engine.has_work:
        before_step(step)
        step += 1
        for output in engine.step():
          tokens, logprobs, _ = answers.get(output.id, ((), (), None))
          answers[output.id] = tokens + output.tokens, logprobs + output.logprobs, output
    stats = engine.stats()
    assert stats.running == stats.waiting == 0 and stats.free_pages + stats.cached_pages == stats.pages
    return answers

  return make, run


def prompts(count, seed=0, longest=30):
  rng = np.random.default_rng(seed)
  return [tuple(rng.integers(0, VOCAB, rng.integers(1, longest)).tolist()) for _ in range(count)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("speculate", [False, True])
def test_who_is_beside_a_request_changes_no_bit_of_its_answer_and_nothing_compiles(engines, name, speculate):
  if speculate and not MODELS[name].num_mtp_layers:
    with pytest.raises(ConfigError, match="speculation needs a model with multi-token prediction"):
      engines[0](MODELS[name], dataclasses.replace(SIZES, speculate=True))
    return
  make, run = engines
  sizes = dataclasses.replace(SIZES, speculate=speculate)
  texts, rng = prompts(12), np.random.default_rng(1)
  samplings = [
    dataclasses.replace(
      GREEDY, max_tokens=int(rng.integers(1, 20)), temperature=float(i % 3), top_k=7 * (i % 2), seed=i,
      repetition_penalty=1 + 0.5 * (i % 4 == 1), frequency_penalty=0.3 * (i % 5 == 2),
    )
    for i in range(12)
  ]  # fmt: skip
  requests = list(zip(texts, samplings, strict=True))
  engine = make(MODELS[name], sizes)
  with jax.set_mesh(make_mesh(MeshConfig(data=1), jax.devices()[:1])):
    engine.warm_up()
  with compilations() as names:
    together = run(engine, requests)
  assert not names and engine.stats().compilations > 0
  alone_engine = make(MODELS[name], sizes)
  for i, request in enumerate(requests):
    tokens, logprobs, output = run(alone_engine, [request])[0]
    assert (tokens, logprobs) == together[i][:2], i
    assert len(tokens) == samplings[i].max_tokens and output.finish_reason == "length"


@pytest.mark.parametrize("name", MODELS)
def test_greedy_answers_and_log_probabilities_are_those_of_whole_forward_passes(engines, name):
  make, run = engines
  engine = make(MODELS[name])
  prompt = prompts(1, seed=4)[0]
  sampling = dataclasses.replace(GREEDY, prompt_logprobs=3, logprobs=20)
  tokens, logprobs, output = run(engine, [(prompt, sampling)])[0]
  with jax.set_mesh(make_mesh(MeshConfig(data=1), jax.devices()[:1])):
    model = nnx.merge(graphdef(MODELS[name]), engine.params, engine.buffers)
    ids = jnp.array([prompt + tokens])
    logits = model.logits(model(ids)[0])[0, :, :VOCAB]
  expected = np.asarray(jax.nn.log_softmax(logits))
  assert tokens == tuple(expected[len(prompt) - 1 : -1].argmax(-1).tolist())
  got = [*output.prompt_logprobs[1:], *logprobs] if output.prompt_logprobs else None
  if got is None:  # they came with the first output
    got = [*run(engine, [(prompt, dataclasses.replace(sampling, max_tokens=1))])[0][2].prompt_logprobs[1:], *logprobs]
  assert len(got) == len(prompt) + len(tokens) - 1
  for position, of_token in enumerate(got):
    row, token = expected[position], int(ids[0, position + 1])
    np.testing.assert_allclose(of_token.logprob, row[token], atol=1e-5)
    np.testing.assert_allclose([v for _, v in of_token.top], np.sort(row)[::-1][: len(of_token.top)], atol=1e-5)
    assert len(of_token.top) == (3 if position < len(prompt) - 1 else 20)


def test_a_prefix_that_was_computed_before_costs_its_tail_alone(engines):
  make, run = engines
  with jax.enable_x64(True):
    engine, prefix = make(float64(V3)), prompts(1, seed=2, longest=30)[0] * 3
    prefix = (prefix * 9)[:24]
    texts = [prefix + tail for tail in ((1, 2, 3), (4,), (5, 6, 7, 8, 9))]
    fresh = [run(make(float64(V3)), [(text, GREEDY)])[0] for text in texts]
    first = run(engine, [(texts[0], GREEDY)])[0]
    computed = engine.stats().prefilled_tokens
    assert computed == len(texts[0]) and first[2].cached_tokens == 0
    for text, expected in zip(texts[1:], fresh[1:], strict=True):
      answer = run(engine, [(text, GREEDY)])[0]
      assert answer[0] == expected[0]
      np.testing.assert_allclose([p.logprob for p in answer[1]], [p.logprob for p in expected[1]], atol=1e-10)
    stats = engine.stats()
    assert stats.prefilled_tokens - computed == 1 + 5 and stats.cached_prompt_tokens == 48
    # Of a text that is known as a whole the last token is computed, for what follows it.
    run(engine, [(prefix, GREEDY)])
    assert engine.stats().prefilled_tokens - stats.prefilled_tokens == 4  # of the page that has it
    # What asks for the log-probabilities of its prompt computes all of it.
    run(engine, [(prefix, dataclasses.replace(GREEDY, prompt_logprobs=0))])
    assert engine.stats().prefilled_tokens - stats.prefilled_tokens == 4 + 24


def test_a_prefix_hit_changes_float32_log_probabilities_by_rounding_alone(engines):
  make, run = engines
  engine, prefix = make(V3), tuple(range(24))
  expected = run(make(V3), [((*prefix, 3), GREEDY)])[0]
  run(engine, [((*prefix[:22], 50), GREEDY)])
  answer = run(engine, [((*prefix, 3), GREEDY)])[0]
  assert engine.stats().cached_prompt_tokens == 20
  np.testing.assert_allclose([p.logprob for p in answer[1]], [p.logprob for p in expected[1]], atol=1e-5)


def test_speculation_answers_as_without_it_and_takes_right_drafts(engines):
  make, run = engines
  with jax.enable_x64(True):
    requests = [
      (text, dataclasses.replace(GREEDY, temperature=float(i % 2), seed=i, frequency_penalty=0.4 * (i == 2)))
      for i, text in enumerate(prompts(6))
    ]
    expected = run(make(float64(V3)), requests)
    engine = make(float64(V3), dataclasses.replace(SIZES, speculate=True))
    answers = run(engine, requests)
    assert {i: a[0] for i, a in answers.items()} == {i: a[0] for i, a in expected.items()}
    slow = engine.stats()
    assert slow.drafted_tokens > 0

    def draft_right(step):
      for sequence in engine._scheduler.running:
        done = sequence.generated
        tokens = expected[sequence.request.id][0]
        if sequence.is_prefilled and sequence.draft is not None and done < len(tokens):
          sequence.draft = tokens[done]

    answers = run(engine, requests, draft_right)
    stats = engine.stats()
    assert {i: a[0] for i, a in answers.items()} == {i: a[0] for i, a in expected.items()}
    drafted, accepted = (getattr(stats, n) - getattr(slow, n) for n in ("drafted_tokens", "accepted_tokens"))
    assert accepted == drafted - 6 > 0  # the first of each is the model's own
    assert stats.decode_steps - slow.decode_steps < slow.decode_steps


def test_speculation_changes_float32_log_probabilities_by_rounding_alone(engines):
  make, run = engines
  requests = [(text, dataclasses.replace(GREEDY, max_tokens=30)) for text in prompts(6)]
  expected, answers = run(make(V3), requests), run(make(V3, dataclasses.replace(SIZES, speculate=True)), requests)
  for i, (tokens, logprobs, _) in expected.items():
    assert answers[i][0] == tokens
    np.testing.assert_allclose([p.logprob for p in answers[i][1]], [p.logprob for p in logprobs], atol=1e-5)


@pytest.mark.parametrize("speculate", [False, True])
def test_out_of_pages_the_youngest_waits_and_is_computed_again_to_the_same_bits(engines, speculate):
  make, run = engines
  requests = [
    (text, dataclasses.replace(GREEDY, max_tokens=30, seed=i, temperature=float(i % 2), presence_penalty=0.5))
    for i, text in enumerate(prompts(7, longest=12))
  ]
  sizes = dataclasses.replace(SIZES, speculate=speculate)
  expected = run(make(V3, sizes), requests)
  engine = make(V3, dataclasses.replace(sizes, cache_tokens=64))
  order = []
  answers = run(engine, requests, lambda step: order.append([s.request.id for s in engine._scheduler.running]))
  stats = engine.stats()
  assert stats.preemptions > 2 and stats.generated_tokens == 7 * 30
  assert {i: a[:2] for i, a in answers.items()} == {i: a[:2] for i, a in expected.items()}
  assert all(running == sorted(running) for running in order)  # who came first goes on


def test_the_likeliest_tokens_are_of_the_vocabulary_also_where_it_is_small(engines):
  make, run = engines
  sampling = dataclasses.replace(GREEDY, logprobs=20, prompt_logprobs=20, max_tokens=1)
  ((_, (logprobs,), output),) = run(make(V3, vocab=10), [((1, 2), sampling)]).values()
  for top in (logprobs.top, output.prompt_logprobs[1].top):
    assert sorted(id for id, _ in top) == list(range(10)) and all(np.isfinite(value) for _, value in top)


def test_log_probabilities_of_a_prompt_are_given_once_and_not_computed_again(engines):
  make, run = engines
  requests = [(text, dataclasses.replace(GREEDY, max_tokens=30, prompt_logprobs=1)) for text in prompts(5, longest=12)]
  engine = make(V3, dataclasses.replace(SIZES, cache_tokens=64))
  expected = [run(make(V3), [(text, dataclasses.replace(s, max_tokens=1))])[0][2] for text, s in requests]
  given = {}
  with jax.set_mesh(make_mesh(MeshConfig(data=1), jax.devices()[:1])):
    for i, (prompt, sampling) in enumerate(requests):
      engine.add(Request(i, prompt, sampling))
    while engine.has_work:
      for output in engine.step():
        if output.prompt_logprobs is not None:
          assert output.id not in given
          given[output.id] = output.prompt_logprobs
      running = engine._scheduler.running
      assert not any(s.prompt_logprobs for s in running if s.has_answered)
  stats = engine.stats()
  assert stats.preemptions > 0 and [given[i] for i in range(5)] == [output.prompt_logprobs for output in expected]


def test_a_request_that_is_cancelled_leaves_nothing_behind(engines):
  make, run = engines
  engine, texts = make(V3), prompts(8)

  def cancel(step):
    if step == 3:
      for id in (0, 6, 99):  # one that runs, one that waits, one that nobody knows
        engine.cancel(id)
      assert engine.stats().running <= 3

  answers = run(engine, [(text, dataclasses.replace(GREEDY, max_tokens=15)) for text in texts], cancel)
  assert engine.stats().cancelled == 2 and 6 not in answers and len(answers[0][0]) < 15
  assert all(len(answers[i][0]) == 15 for i in (1, 2, 3, 4, 5, 7))


def test_the_ninth_waits_and_static_batching_waits_for_all(engines):
  make, run = engines
  lengths = [3, 9, 20, 6, 8, 12]
  requests = [(text, dataclasses.replace(GREEDY, max_tokens=n)) for text, n in zip(prompts(6), lengths, strict=True)]
  most, answers, steps = {}, {}, {}
  for is_static in (False, True):
    engine = make(V3, dataclasses.replace(SIZES, is_static=is_static))
    seen = []
    answers[is_static] = run(engine, requests, lambda step: seen.append(engine.stats().running))  # noqa: B023
    most[is_static], steps[is_static] = max(seen), engine.stats().decode_steps
    if is_static:
      assert seen[1:] == sorted(seen[1:20], reverse=True) + seen[20:]
  assert {i: a[0] for i, a in answers[False].items()} == {i: a[0] for i, a in answers[True].items()}
  assert most[False] == most[True] == 4 and steps[True] > steps[False]


@pytest.mark.parametrize("axes", [{"tensor": 2}, {"expert": 2}, {"expert": 2, "tensor": 2}, {"fsdp": 4}])
def test_a_mesh_answers_as_one_device(engines, axes):
  make, run = engines
  with jax.enable_x64(True):
    requests = [(text, dataclasses.replace(GREEDY, seed=i, prompt_logprobs=0)) for i, text in enumerate(prompts(6))]
    requests += [(text, dataclasses.replace(GREEDY, temperature=1.0)) for text, _ in requests[:2]]
    sizes = dataclasses.replace(SIZES, speculate=True)
    expected, answers = run(make(float64(V3), sizes), requests), run(make(float64(V3), sizes, **axes), requests)
    for i, (tokens, logprobs, _) in expected.items():
      assert answers[i][0] == tokens
      np.testing.assert_allclose([p.logprob for p in answers[i][1]], [p.logprob for p in logprobs], atol=1e-10)


def test_eos_ends_an_answer_unless_it_is_ignored(engines):
  make, run = engines
  engine = make(V3)
  tokens = run(engine, [((1, 2), dataclasses.replace(GREEDY, max_tokens=40))])[0][0]
  at = next(i for i, token in enumerate(tokens) if i >= 3 and token not in tokens[:i])
  engine._eos = tokens[at]
  ended, _, output = run(engine, [((1, 2), dataclasses.replace(GREEDY, max_tokens=40, ignore_eos=False))])[0]
  assert ended == tokens[:at] and output.finish_reason == "stop"


@pytest.mark.parametrize("name", MODELS)
def test_bytes_of_the_cache(engines, name):
  engine, a = engines[0](MODELS[name]), MODELS[name].attention
  width = a.kv_lora_rank + a.qk_rope_head_dim if a.kind == "mla" else 2 * a.kv_heads * a.head_dim
  assert engine.cache_bytes == 4 * 64 * MODELS[name].layers * width * 4


def test_what_cannot_be_answered_is_refused(engines):
  engine = engines[0](V3)
  for prompt, most, message in (
    ((), 1, "no tokens"),
    ((1, 60), 1, "ids from 1 to 60: expected 0 to 59"),
    ((-1,), 1, "ids from -1"),
    ((1,) * 50, 15, "the prompt has 50 tokens and max_tokens is 15: together more than the 64"),
  ):
    with pytest.raises(ConfigError, match=message):
      engine.add(Request(0, prompt, dataclasses.replace(GREEDY, max_tokens=most)))
  for sizes, message in (
    (dict(cache_tokens=63), "cache_tokens=63 has no room for one sequence of max_length=64"),
    (dict(page_size=0), "page_size=0: expected at least 1"),
    (dict(chunk=-1), "chunk=-1: expected at least 0"),
  ):
    with pytest.raises(ConfigError, match=message):
      engines[0](V3, dataclasses.replace(SIZES, **sizes))
