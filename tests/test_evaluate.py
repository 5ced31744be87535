"""The program evaluate: what it prints and writes, and every flag that it refuses."""

import importlib
import json
import subprocess
import sys

import pytest

from deepseek_jax.checkpoint.convert import convert
from deepseek_jax.errors import CheckpointError, ConfigError, DataError
from deepseek_jax.evaluate.__main__ import main
from tests.saved_models import TEXT, write_hugging_face


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder with a Hugging Face folder, the workdir that is converted from it, a text and questions."""
  folder = tmp_path_factory.mktemp("evaluate")
  convert(write_hugging_face(folder / "hf"), folder / "run")
  (folder / "a.txt").write_text(TEXT)
  (folder / "b.jsonl").write_text('{"body": "the words of a text"}\n{"body": "one"}\n')
  questions = [{"prompt": "the words", "choices": ["of", "see", "few"], "answer": i % 3} for i in range(4)]
  (folder / "q.jsonl").write_text("\n".join(map(json.dumps, questions)))
  (folder / "p.jsonl").write_text('{"prompt": "the words", "reference": "of a text"}')
  return folder


def run(*arguments, code=0):
  assert main(["evaluate", *arguments]) == code


def test_a_hugging_face_folder_and_its_workdir_have_the_same_scores(folder, capsys):
  files = [
    f"--text={folder}/a.txt,{folder}/b.jsonl",
    f"--multiple_choice={folder}/q.jsonl",
    "--text_field=body",
    "--batch=4",
  ]
  run(f"--from={folder}/hf", *files, "--json=-")
  of_folder = json.loads(capsys.readouterr().out)  # and nothing else
  assert of_folder["model"] == {"source": f"{folder}/hf", "step": None, "compute_dtype": "float32", "seq": 48}
  assert list(of_folder["text"]) == ["a", "b", "total"]
  assert of_folder["text"]["total"]["documents"] == 3
  assert of_folder["text"]["total"]["bytes"] == len(TEXT) + len("the words of a textone")
  assert of_folder["multiple_choice"][f"{folder}/q.jsonl"]["questions"] == 4
  run(f"--workdir={folder}/run", *files, f"--json={folder}/out.json", "--dtype=float32", "--seq=48", "--devices=2")
  out = capsys.readouterr().out
  assert f"model of step 0 in {folder}/run, computes in float32, 48 positions" in out
  header = next(line for line in out.splitlines() if line.startswith("text"))
  assert header.split() == ["text", "loss", "perplexity", "bits_per_byte", "tokens", "bytes", "documents"]
  of_run = json.loads((folder / "out.json").read_text())
  assert of_run["model"]["step"] == 0 and "heldout" not in of_run
  for evaluation in ("text", "multiple_choice"):
    for name, metrics in of_folder[evaluation].items():
      assert of_run[evaluation][name] == pytest.approx(metrics, rel=1e-5)


def test_retrieval_of_a_folder(folder, capsys):
  run(f"--from={folder}/hf", "--retrieval=3", "--seq=256", "--json=-")
  of_folder = json.loads(capsys.readouterr().out)
  run(f"--workdir={folder}/run", "--retrieval=3", "--seq=256", "--dtype=float32", "--batch=2")
  out = capsys.readouterr().out
  rows = of_folder["retrieval"]
  assert sum(row["queries"] for row in rows.values()) > 3
  assert all(row["accuracy"] < 0.5 and row["loss"] > 4 for row in rows.values())  # an untrained model knows no digits
  assert [line.split()[:3] for line in out.splitlines() if " to " in line] == [name.split() for name in rows]


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ([], "give one model: --workdir=DIR.*or --from=DIR"),
    (["--workdir={0}/run", "--from={0}/hf"], "give one model"),
    (["--from={0}/hf"], "say what to evaluate: --text, --retrieval, --multiple_choice, --generate or --lm_eval_tasks"),
    (["--from={0}/hf", "--heldout"], "--heldout is of a run, and --from=.* is none"),
    (["--from={0}/hf", "--by_position"], "--by_position is of a run, and --from=.* is none"),
    (["--from={0}/hf", "--retrieval=0"], "--retrieval=0"),
    (["--from={0}/hf", "--text={0}/a.txt", "--step=3"], "--step=3 is a checkpoint of a --workdir"),
    (["--from={0}/hf", "--lm_eval_tasks=a"], "--lm_eval_tasks=NAME,... and --lm_eval_path=DIR.*go together"),
    (["--from={0}/hf", "--lm_eval_tasks=a", "--lm_eval_path={0}/no"], "--lm_eval_path=.*/no is not a folder"),
    (["--from={0}/hf", "--text={0}/a.txt", "--generations=x"], "--generations writes what --generate=FILE makes"),
    (["--from={0}/hf", "--text={0}/a.txt", "--json={0}/no/a.json"], "--json=.*/no/a.json cannot be written: there is no folder"),
    (["--from={0}/hf", "--text={0}/a.txt", "--stop=x"], "--stop ends generations, which --generate=FILE asks for"),
    (["--from={0}/hf", "--generate={0}/p.jsonl", "--stop="], "--stop= is empty"),
    (["--from={0}/hf", "--text={0}/none.txt"], "--text: .* there is no .*none.txt"),
    (["--from={0}/hf", "--text={0}/b.jsonl"], "b.jsonl:1 has no field 'text' .*set --text_field"),
    (["--from={0}/hf", "--multiple_choice={0}/p.jsonl"], "p.jsonl:1 has no field 'choices'"),
    (["--from={0}/run", "--text={0}/a.txt"], "run is the workdir of a run: give it as --workdir="),
    (["--workdir={0}/hf", "--text={0}/a.txt"], "hf is a Hugging Face folder: give it as --from="),
    (["--from={0}/none", "--text={0}/a.txt"], "/none is not a folder"),
    (["--workdir={0}/none"], "no checkpoint in .*none; train one"),
    (["--workdir={0}/run", "--step=7"], "no checkpoint 7 in .*: it holds .0."),
    (["--from={0}/hf", "--text={0}/a.txt", "--tokenizer=none.json"], "cannot read none.json"),
    (["--from={0}/hf", "--text={0}/a.txt", "--devices=9"], "--devices=9, but 4 are here"),
    (["--from={0}/hf", "--text={0}/a.txt", "--seq=1"], "--seq=1"),
    (["--from={0}/hf", "--text={0}/a.txt", "--config.seed=1"], "takes no --config.seed"),
  ],
)  # fmt: skip
def test_what_is_refused(folder, flags, message):
  with pytest.raises((ConfigError, DataError, CheckpointError), match=message):
    run(*(flag.format(folder) for flag in flags))


@pytest.mark.parametrize(
  ("flags", "module", "message"),
  [
    (["--generate={0}/p.jsonl"], "sacrebleu", "--generate needs the packages sacrebleu and rouge-score.*pip install"),
    (["--lm_eval_tasks=a", "--lm_eval_path={0}"], "deepseek_jax.evaluate.lm_eval_model", "needs the package lm-eval.*pip install 'lm-eval'"),
  ],
)  # fmt: skip
def test_a_missing_package_is_named(folder, flags, module, message, monkeypatch):
  original = importlib.import_module

  def import_module(name, *rest):
    if name == module:
      raise ModuleNotFoundError("No module named 'x'")
    return original(name, *rest)

  monkeypatch.setattr(importlib, "import_module", import_module)
  with pytest.raises(ConfigError, match=message):
    run(f"--from={folder}/hf", *(flag.format(folder) for flag in flags))


def test_help_needs_no_jax():
  code = "import sys; sys.modules['jax'] = None; from deepseek_jax.evaluate.__main__ import main; main(['evaluate', '--help'])"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
  assert done.returncode == 0 and "--multiple_choice" in done.stdout, done.stderr
