"""Greedy decoding of every kind of model, and each rule of sampling, against transformers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deepseek_jax
from deepseek_jax.generate.decoding import continue_ids
from deepseek_jax.generate.engine import Engine, EngineConfig
from deepseek_jax.generate.request import Sampling
from deepseek_jax.generate.sampling import min_p, penalize, stack_rules, top_k, top_p
from tests.parity.cases import CASES
from tests.parity.weights import make_modules, write_folder

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="make parity runs these in an environment with torch and transformers")
transformers = pytest.importorskip("transformers")

from tests.parity import reference  # noqa: E402 - it imports torch

NEW = 24


@pytest.mark.parametrize(
  ("name", "speculate"),
  [(name, False) for name in CASES]
  + [(name, True) for name, case in CASES.items() if case.config.get("num_nextn_predict_layers")],
)
def test_greedy_answers_are_those_of_transformers(name, speculate, tmp_path):
  case = CASES[name]
  write_folder(tmp_path, case)
  prompts = [row[: 3 + 4 * i].tolist() for i, row in enumerate(case.tokens)]
  theirs, _ = reference.make_modules(tmp_path, case, make_modules(case))
  expected = []
  with torch.no_grad(), reference.float64():
    for prompt in prompts:
      ids = torch.tensor([prompt])
      if hasattr(theirs, "generate"):
        theirs.generation_config.eos_token_id = None  # which min_new_tokens would forbid
        ids = theirs.generate(ids, do_sample=False, max_new_tokens=NEW, pad_token_id=0)
      else:
        for _ in range(NEW):
          ids = torch.cat([ids, theirs(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
      expected.append(ids[0, len(prompt) :].tolist())
  with jax.enable_x64(True):
    model = deepseek_jax.load_pretrained(tmp_path, dtype="float64")
    sizes = EngineConfig(max_batch=2, max_length=64, page_size=4, chunk=8, speculate=speculate)
    vocab = case.config["vocab_size"]
    with jax.set_mesh(model._mesh):
      engine = Engine(model.config, model.params, model.buffers, model._mesh, vocab, vocab, sizes)
      greedy = Sampling(NEW, temperature=0.0, ignore_eos=True)
      assert continue_ids(engine, prompts, [greedy] * len(prompts)) == expected


def warped(rule, logits, prompt, answer):
  """What transformers makes of `logits` [1, vocab]."""
  p = transformers.generation.logits_process
  processors = {
    "repetition_penalty": lambda v: p.RepetitionPenaltyLogitsProcessor(penalty=v),
    "temperature": lambda v: p.TemperatureLogitsWarper(v),
    "top_k": lambda v: p.TopKLogitsWarper(v),
    "top_p": lambda v: p.TopPLogitsWarper(v),
    "min_p": lambda v: p.MinPLogitsWarper(v),
  }
  scores = torch.tensor(logits)
  for name, make in processors.items():
    if (value := getattr(rule, name)) != getattr(Sampling(1), name):
      scores = make(value)(torch.tensor([[*prompt, *answer]]), scores)
  return torch.softmax(scores, -1).numpy()


@pytest.mark.parametrize("seed", range(20))
def test_rules_are_the_processors_of_transformers_in_their_order(seed):
  rng = np.random.default_rng(seed)
  logits = rng.normal(0, 3, (1, 50)).astype(np.float32)
  prompt, answer = rng.integers(0, 50, 9).tolist(), rng.integers(0, 50, 5).tolist()
  rule = Sampling(
    1, float(rng.choice([0.3, 1.0, 1.7])), int(rng.choice([0, 1, 7, 60])), float(rng.choice([0.2, 0.7, 0.95, 1.0])),
    float(rng.choice([0.0, 0.02, 0.4])), float(rng.choice([0.7, 1.0, 1.3])),
  )  # fmt: skip
  rules = stack_rules([rule])
  counts = np.zeros((1, 50), np.int32)
  np.add.at(counts[0], answer, 1)
  ours = penalize(jnp.asarray(logits), rules, counts, np.isin(np.arange(50), prompt)[None])
  ours = min_p(top_p(top_k(ours / rule.temperature, rules.top_k), rules.top_p), rules.min_p)
  np.testing.assert_allclose(jax.nn.softmax(ours), warped(rule, logits, prompt, answer), atol=1e-6)


def test_presence_and_frequency_are_openai_s_formula():
  rng = np.random.default_rng(0)
  logits, counts = rng.normal(size=(1, 30)).astype(np.float32), rng.integers(0, 4, (1, 30)).astype(np.int32)
  rule = dataclasses.replace(Sampling(1), presence_penalty=0.7, frequency_penalty=-0.4)
  ours = penalize(jnp.asarray(logits), stack_rules([rule]), counts, np.zeros((1, 30), bool))
  # https://platform.openai.com/docs/api-reference: mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence
  np.testing.assert_allclose(ours, logits - counts * -0.4 - (counts > 0) * 0.7, atol=1e-6)
