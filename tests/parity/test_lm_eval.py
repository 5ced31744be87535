"""lm-evaluation-harness on local tasks: our model class against its own transformers backend, on the same exported folder."""

import json

import numpy as np
import pytest

from deepseek_jax.checkpoint.convert import convert
from deepseek_jax.checkpoint.load import open_saved_model
from deepseek_jax.config_sections import SampleConfig
from deepseek_jax.errors import ConfigError, DataError
from deepseek_jax.evaluate.__main__ import main
from deepseek_jax.evaluate.language_model import LanguageModel
from tests.saved_models import write_hugging_face
from tests.serve.servers import serving

pytestmark = pytest.mark.parity
lm_eval = pytest.importorskip("lm_eval", reason="make parity runs these in an environment with lm-eval and torch")
HFLM = pytest.importorskip("lm_eval.models.huggingface").HFLM
LocalCompletionsAPI = pytest.importorskip("lm_eval.models.openai_completions").LocalCompletionsAPI

from lm_eval.api.instance import Instance  # noqa: E402 - it is there

from deepseek_jax.evaluate import lm_eval_model  # noqa: E402 - it imports lm_eval

WORDS = "the model sees the words of a text one by one and the text is short".split()


@pytest.fixture(scope="module", params=[True, False], ids=["bos", "no bos"])
def folder(request, tmp_path_factory):
  """A folder that was exported from a workdir, in float32."""
  root = tmp_path_factory.mktemp("lm_eval")
  source = write_hugging_face(root / "hf", request.param, max_position_embeddings=96)
  convert(source, root / "run")
  convert(root / "run", root / "exported")
  return root / "exported"


@pytest.fixture(scope="module")
def model(folder):
  saved = open_saved_model(folder)
  return LanguageModel(saved, saved.load_tokenizer(), batch=4)


@pytest.fixture(scope="module")
def tasks(folder, model, tmp_path_factory):
  """A folder with a task of multiple choice, one of generation, and one of whole texts, on data of its own."""
  path, rng = tmp_path_factory.mktemp("tasks"), np.random.default_rng(0)

  def words(count):
    return " ".join(rng.choice(WORDS, count))

  questions = [
    {"question": words(rng.integers(1, 60)), "choices": [words(n) for n in (1, 3, 6)], "label": int(rng.integers(3))}
    for _ in range(30)
  ]
  write_task(path, "choices", questions, output_type="multiple_choice", doc_to_text="{{question}}", doc_to_target="label",
             doc_to_choice="choices", metric_list=[{"metric": metric} for metric in ("acc", "acc_norm", "acc_bytes")])  # fmt: skip
  prompts = [words(rng.integers(1, 12)) for _ in range(12)]
  texts = model.generate(prompts, SampleConfig(max_tokens=8, temperature=0.0, top_p=1.0), ["w"])
  answers = [text if i % 3 else "something else" for i, text in enumerate(texts)]
  rows = [{"question": prompt, "answer": answer} for prompt, answer in zip(prompts, answers, strict=True)]
  write_task(path, "completion", rows, output_type="generate_until", doc_to_text="{{question}}", doc_to_target="{{answer}}",
             generation_kwargs={"until": ["w"], "max_gen_toks": 8, "do_sample": False},
             metric_list=[{"metric": "exact_match"}])  # fmt: skip
  rows = [{"question": words(int(n))} for n in (3, 40, 150)]
  write_task(path, "texts", rows, output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{question}}",
             metric_list=[{"metric": "bits_per_byte"}])  # fmt: skip
  (path / "choices.yaml").rename(path / "choices.json")  # JSON is YAML; the harness itself finds .yaml files only
  return path


def write_task(path, name, rows, **fields):
  (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path / f"{name}.jsonl")}}}
  (path / f"{name}.yaml").write_text(json.dumps({"task": name, "test_split": "test"} | data | fields))


def evaluate(model, path, names):
  manager = lm_eval.tasks.TaskManager(include_path=str(path), include_defaults=False)
  return lm_eval.simple_evaluate(
    model=model, tasks=lm_eval_model.find_tasks(manager, names, str(path)), task_manager=manager, log_samples=True
  )  # fmt: skip


def test_scores_equal_those_of_the_transformers_backend(folder, model, tasks, tmp_path):
  names = ["choices", "completion"]
  backend = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)
  theirs = evaluate(backend, tasks, names)
  mine = evaluate(lm_eval_model.HarnessModel(model), tasks, names)
  assert mine["results"] == theirs["results"]
  assert 0 < mine["results"]["choices"]["acc,none"] < 1
  assert mine["results"]["completion"]["exact_match,none"] == pytest.approx(8 / 12)
  for my_sample, their_sample in zip(mine["samples"]["choices"], theirs["samples"]["choices"], strict=True):
    for (my_log_prob, my_greedy), (their_log_prob, their_greedy) in zip(
      my_sample["filtered_resps"], their_sample["filtered_resps"], strict=True
    ):
      assert my_log_prob == pytest.approx(their_log_prob, abs=2e-4)
      assert my_greedy == their_greedy
  assert [s["resps"] for s in mine["samples"]["completion"]] == [s["resps"] for s in theirs["samples"]["completion"]]
  # The same through the command line, and our own multiple choice.
  flags = [
    f"--from={folder}",
    f"--lm_eval_tasks={','.join(names)}",
    f"--lm_eval_path={tasks}",
    f"--json={tmp_path}/out.json",
  ]
  questions = [json.loads(line) for line in (tasks / "choices.jsonl").read_text().splitlines()]
  lines = [json.dumps(row | {"answer": row["label"]}) for row in questions]
  (tmp_path / "questions.jsonl").write_text("\n".join(lines))
  assert main(["evaluate", *flags, f"--multiple_choice={tmp_path}/questions.jsonl"]) == 0
  results = json.loads((tmp_path / "out.json").read_text())
  for metric in ("acc", "acc_norm", "acc_bytes", "acc_stderr"):
    expected = theirs["results"]["choices"][f"{metric},none"]
    assert results["lm_eval"]["choices"][metric] == expected
    assert results["multiple_choice"][f"{tmp_path}/questions.jsonl"][metric] == pytest.approx(expected)


def test_whole_texts(folder, model, tasks):
  backend = HFLM(
    pretrained=str(folder), device="cpu", dtype="float32", batch_size=4, add_bos_token=False
  )  # with bos in the text, the backend scores bos after bos
  theirs, mine = (
    evaluate(m, tasks, ["texts"])["results"]["texts"] for m in (backend, lm_eval_model.HarnessModel(model))
  )
  assert mine["bits_per_byte,none"] == pytest.approx(theirs["bits_per_byte,none"], rel=1e-5)


def test_the_arguments_of_a_generation():
  greedy, stop = lm_eval_model.sampling(
    {"until": ["\n\n", ""], "max_gen_toks": 7, "do_sample": False, "temperature": 0.7}
  )
  assert (greedy.max_tokens, greedy.temperature, greedy.top_p, stop) == (7, 0.0, 1.0, ["\n\n"])
  sampled, stop = lm_eval_model.sampling(
    {"until": "x", "do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9}
  )
  assert (sampled.max_tokens, sampled.temperature, sampled.top_k, sampled.top_p, stop) == (256, 0.7, 5, 0.9, ["x"])
  with pytest.raises(ConfigError, match="generation_kwargs: num_beams is not known; known are until"):
    lm_eval_model.sampling({"num_beams": 4})


def test_generations_with_several_arguments_keep_their_order(model):
  requests = [
    Instance("generate_until", {}, (prompt, {"until": [], "max_gen_toks": count}), i)
    for i, (prompt, count) in enumerate([("the words", 3), ("one", 5), ("the words", 5), ("a text", 3)])
  ]
  texts = lm_eval_model.HarnessModel(model).generate_until(requests)
  for request, text in zip(requests, texts, strict=True):
    prompt, arguments = request.args
    assert model.generate([prompt], SampleConfig(max_tokens=arguments["max_gen_toks"], temperature=0.0, top_p=1.0)) == [
      text
    ]


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("choices.yaml", "", "no task 'other' in .*; there is choices"),
    ("other.json", "[", "other.json is not JSON"),
    ("other.json", "[]", "other.json should hold a JSON object"),
    ("other.yaml", '{"task": "other"}', "--lm_eval_tasks=other: "),
    ("other.json", '{"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "none.jsonl"}}, "test_split": "test"}',
     "--lm_eval_tasks=other: .*none.jsonl"),
  ],
)  # fmt: skip
def test_a_task_that_cannot_be_used_is_named(model, tmp_path, name, content, message):
  (tmp_path / name).write_text(content or '{"task": "choices"}')
  with pytest.raises(DataError, match=message):
    lm_eval_model.evaluate_tasks(model, ["other"], str(tmp_path))


def test_the_server_gives_the_scores_of_a_direct_evaluation(folder, model, tasks):
  names = ["choices", "completion"]
  mine = evaluate(lm_eval_model.HarnessModel(model), tasks, [*names, "texts"])
  length = model.seq + 2  # the harness keeps one token free
  with serving(f"--from={folder}", "--max_batch=4", f"--max_length={length}") as server:

    def ask(add_bos, names):
      backend = LocalCompletionsAPI(
        model="exported", base_url=f"{server.url}/v1/completions", tokenizer=str(folder), max_length=length, batch_size=4,
        num_concurrent=2, add_bos_token=add_bos,
      )  # fmt: skip
      return evaluate(backend, tasks, names)

    theirs = ask(model.add_bos, names)
    # Before a whole text the harness always puts bos, and with add_bos_token a second one.
    whole_texts = ask(False, ["texts"])
  for name in names:
    assert theirs["results"][name] == mine["results"][name]
  for my_sample, their_sample in zip(mine["samples"]["choices"], theirs["samples"]["choices"], strict=True):
    mine_values, their_values = my_sample["filtered_resps"], their_sample["filtered_resps"]
    np.testing.assert_allclose([v for v, _ in their_values], [v for v, _ in mine_values], atol=2e-4)
    assert [greedy for _, greedy in their_values] == [greedy for _, greedy in mine_values]
  bits = [results["results"]["texts"]["bits_per_byte,none"] for results in (mine, whole_texts)]
  assert bits[1] == pytest.approx(bits[0], rel=1e-4)
