"""Evaluates a trained model:  python -m deepseek_jax.evaluate --workdir=runs/tiny

Of a run without other flags: loss and bits per byte of its held-out split by source, as at its end. --from=DIR evaluates a
Hugging Face folder instead. What else can be evaluated, several at once:
  --by_position                    loss of the held-out split by position, also at a --seq that is not the run's
  --retrieval=N                    accuracy of key-value retrieval by distance, in N windows of --seq
  --text=FILE,...                  bits per byte and perplexity of documents: .txt, .jsonl, .parquet, as training reads them
  --multiple_choice=FILE,...       accuracy by log-likelihood; lines {"prompt", "choices": [..], "answer": index}
  --generate=FILE,...              BLEU and ROUGE of generations; lines {"prompt", "references": [..] or "reference"}
  --lm_eval_tasks=NAME,...         tasks of lm-evaluation-harness in the folder --lm_eval_path
Nothing in the workdir is changed. --config.model.FIELD=VALUE evaluates with another value of a field that changes no shape, as
--config.model.attention.yarn.factor=4.
"""

import dataclasses
import importlib
import os
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from absl import flags

from deepseek_jax.config_sections import SampleConfig
from deepseek_jax.console import log_to_console
from deepseek_jax.errors import ConfigError
from deepseek_jax.evaluate.results import TOTAL, TextResult, format_table
from deepseek_jax.flags import load_config, parse, run_program, split_overrides, write_output
from deepseek_jax.json_output import show_result
from deepseek_jax.schema import flatten_config

if TYPE_CHECKING:  # it imports jax
  from deepseek_jax.checkpoint.load import SavedModel
  from deepseek_jax.data.sources import SourceFile
  from deepseek_jax.evaluate.generations import Prompt
  from deepseek_jax.evaluate.language_model import LanguageModel
  from deepseek_jax.evaluate.multiple_choice import Question

Results = dict[str, dict[str, dict[str, Any]]]  # {evaluation: {source, file or task: {metric: value}}}


def program_flags() -> flags.FlagValues:
  """The flags of this program."""
  values = flags.FlagValues()

  def string(name: str, doc: str, default: str | None = None) -> None:
    flags.DEFINE_string(name, default, doc, flag_values=values)

  def several(name: str, doc: str) -> None:
    flags.DEFINE_list(name, None, doc, flag_values=values)

  def integer(name: str, doc: str, default: int | None, least: int) -> None:
    flags.DEFINE_integer(name, default, doc, lower_bound=least, flag_values=values)

  string("workdir", "folder of a run, or its gs:// or s3:// URL: its newest checkpoint is evaluated")
  integer("step", "another checkpoint of the workdir", None, 0)
  string("from", "a Hugging Face folder (config.json, *.safetensors, tokenizer.json)")
  string("tokenizer", "byte, deepseek-llm, deepseek-v3, or the path of a tokenizer.json; default: the model's own")
  flags.DEFINE_boolean(
    "add_bos",
    None,
    "begin prompts with bos; default: as in training, or as the tokenizer's config says",
    flag_values=values,
  )
  flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "of the computation; default: the run's, or float32 for --from",
    flag_values=values,
  )  # fmt: skip
  integer("devices", "devices that the parameters are sharded over", 1, 1)
  integer("batch", "sequences in a pass", 8, 1)
  integer("seq", "positions that the model is given; default: data.seq of the run, or all that --from has", None, 2)
  flags.DEFINE_boolean(
    "heldout",
    None,
    "evaluate the held-out split of the workdir; default: where nothing else is named",
    flag_values=values,
  )
  integer(
    "sequences", "windows of --heldout and --by_position; 0: all; default: eval.final_sequences of the run", None, 0
  )
  flags.DEFINE_boolean(
    "by_position",
    False,
    "loss by position, of windows of --seq of the held-out split of the workdir",
    flag_values=values,
  )
  integer("retrieval", "windows of --seq of key-value retrieval, whose accuracy is given by distance", None, 1)
  several("text", "files, folders or globs of documents")
  string("text_field", "field of .jsonl and .parquet files that holds the text", "text")
  flags.DEFINE_boolean("skip_null", False, "skip records without text", flag_values=values)
  integer("stride", "new tokens in each window after a document's first; default: --seq", None, 1)
  several("multiple_choice", ".jsonl files of questions")
  string("delimiter", "between a prompt and its choices", " ")
  several("generate", ".jsonl files of prompts with references")
  integer("max_tokens", "longest generation", 128, 1)
  flags.DEFINE_float("temperature", 0.0, "of --generate; 0: greedy", lower_bound=0, flag_values=values)
  flags.DEFINE_multi_string("stop", [], "text that ends a generation; may be given several times", flag_values=values)
  integer("seed", "of sampling, of few-shot examples, and of --retrieval", 0, 0)
  string("generations", "file that the generations are written to, as .jsonl")
  several("lm_eval_tasks", "tasks of lm-evaluation-harness")
  string("lm_eval_path", "folder of these tasks: NAME.yaml or NAME.json")
  integer("limit", "documents of each task, the first ones; default: all", None, 1)
  string("json", "file for the results as JSON; - for stdout, without the tables")
  return values


def check_flags(values: flags.FlagValues) -> None:
  """Raises ConfigError for flags that do not go together."""
  source = values["from"].value
  if bool(values.workdir) == bool(source):
    raise ConfigError(
      "give one model: --workdir=DIR, a run, e.g. --workdir=runs/tiny, or --from=DIR, a Hugging Face folder"
    )
  for flag in ("heldout", "by_position"):
    if source and values[flag].value:
      raise ConfigError(f"--{flag} is of a run, and --from={source} is none: give text with --text")
  if source and not names_an_input(values):
    raise ConfigError(
      "say what to evaluate: --text, --retrieval, --multiple_choice, --generate or --lm_eval_tasks (see --help)"
    )
  if source and values.step is not None:
    raise ConfigError(f"--step={values.step} is a checkpoint of a --workdir, and --from has none: leave it out")
  if bool(values.lm_eval_tasks) != bool(values.lm_eval_path):
    raise ConfigError("--lm_eval_tasks=NAME,... and --lm_eval_path=DIR, the folder that the tasks are in, go together")
  if values.lm_eval_path and not os.path.isdir(values.lm_eval_path):
    raise ConfigError(f"--lm_eval_path={values.lm_eval_path} is not a folder: give the one with the tasks' .yaml files")
  if "" in values.stop:
    raise ConfigError("--stop= is empty, and would end every generation before its first token: leave it out")
  if values.generations and not values.generate:
    raise ConfigError("--generations writes what --generate=FILE makes: give that too")
  if values["stop"].present and not values.generate:
    raise ConfigError("--stop ends generations, which --generate=FILE asks for: give that too")
  for flag in ("json", "generations"):  # not after an hour
    folder = os.path.dirname(values[flag].value or "")
    if folder and not os.path.isdir(folder):
      raise ConfigError(f"--{flag}={values[flag].value} cannot be written: there is no folder {folder}")


def names_an_input(values: flags.FlagValues) -> bool:
  """Whether something else than the held-out split of a run is to be evaluated."""
  return any(
    (
      values.by_position, values.retrieval, values.text, values.multiple_choice, values.generate, values.lm_eval_tasks,
    )
  )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Inputs:
  """The files that flags name, read before the model is: {source: files}, {path: questions}, {path: prompts}."""

  texts: dict[str, list["SourceFile"]]
  questions: dict[str, list["Question"]]
  prompts: dict[str, list["Prompt"]]


def read_inputs(values: flags.FlagValues) -> Inputs:
  """The Inputs that `values` name. Raises UserError for a file that cannot be used, or a package that is missing."""
  from deepseek_jax.evaluate.generations import metric_packages, read_prompts
  from deepseek_jax.evaluate.multiple_choice import read_questions
  from deepseek_jax.evaluate.text import text_sources

  if values.generate:
    metric_packages()
  if values.lm_eval_tasks:
    import_harness()
  return Inputs(
    text_sources(values.text or []),
    {path: read_questions(path) for path in values.multiple_choice or []},
    {path: read_prompts(path) for path in values.generate or []},
  )


def import_harness() -> ModuleType:
  """The module with our model class for lm-evaluation-harness. Raises ConfigError where the package is missing."""
  for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):  # tasks are local: nothing is looked for on the hub
    os.environ.setdefault(name, "1")
  try:
    return importlib.import_module("deepseek_jax.evaluate.lm_eval_model")
  except ImportError as error:
    raise ConfigError(f"--lm_eval_tasks needs the package lm-eval ({error}): pip install 'lm-eval'") from None


def open_model(values: flags.FlagValues, overrides: Mapping[str, str]) -> "LanguageModel":
  """The model that `values` name, with `overrides` of fields of its config."""
  from deepseek_jax.checkpoint.load import open_hugging_face, open_workdir
  from deepseek_jax.checkpoint.weights import has_hf_config, is_hugging_face
  from deepseek_jax.evaluate.language_model import LanguageModel

  if source := values["from"].value:
    if not is_hugging_face(source):
      raise ConfigError(f"{source} is the workdir of a run: give it as --workdir={source}")
    saved = open_hugging_face(source)
  else:
    if has_hf_config(values.workdir):
      raise ConfigError(f"{values.workdir} is a Hugging Face folder: give it as --from={values.workdir}")
    saved = open_workdir(values.workdir, values.step)
  if values.dtype:
    overrides = {**overrides, "model.compute_dtype": values.dtype}
  saved = with_model_fields(saved, overrides)
  seq = values.seq or saved.config.data.seq
  if values.stride and values.stride > seq:
    raise ConfigError(
      f"--stride={values.stride} is longer than the windows of {seq:,} tokens: give at most that, or raise --seq"
    )
  tokenizer = saved.load_tokenizer(values.tokenizer)
  return LanguageModel(saved, tokenizer, values.devices, values.batch, values.seq, values.add_bos)


def with_model_fields(saved: "SavedModel", overrides: Mapping[str, Any]) -> "SavedModel":
  """`saved` with other values {path: value or text} of fields of its model. Raises ConfigError for one that changes a shape."""
  from deepseek_jax.checkpoint.compatibility import array_shapes

  config = load_config(None, flatten_config(saved.config) | dict(overrides))
  if array_shapes(config.model) != array_shapes(saved.config.model):
    raise ConfigError(
      f"--config.{' --config.'.join(overrides)}: the model in {saved.source} has arrays of other shapes; only fields that change "
      "none can be set"
    )
  return dataclasses.replace(saved, config=config)


def evaluate(values: flags.FlagValues, inputs: Inputs, model: "LanguageModel") -> tuple[Results, str]:
  """(the results of all that `values` and `inputs` name, the generations as text of a .jsonl file)."""
  from deepseek_jax.evaluate.by_position import evaluate_by_position
  from deepseek_jax.evaluate.generations import evaluate_generations, to_jsonl
  from deepseek_jax.evaluate.multiple_choice import evaluate_multiple_choice
  from deepseek_jax.evaluate.retrieval import evaluate_retrieval
  from deepseek_jax.evaluate.run_heldout import evaluate_run_heldout
  from deepseek_jax.evaluate.text import evaluate_texts

  results: Results = {}
  if not names_an_input(values) if values.heldout is None else values.heldout:
    of_sources = evaluate_run_heldout(
      model.saved, model.weights, model.tokenizer, values.tokenizer, values.batch, values.sequences
    )
    results["heldout"] = with_total(of_sources, "windows")
  if values.by_position:
    results["by_position"] = evaluate_by_position(model, values.tokenizer, values.sequences)
  if values.retrieval:
    results["retrieval"] = evaluate_retrieval(model, values.retrieval, values.seed)
  if inputs.texts:
    of_texts = evaluate_texts(model, inputs.texts, values.text_field, values.skip_null, values.stride)
    results["text"] = with_total(of_texts, "documents")
  if inputs.questions:
    results["multiple_choice"] = {
      path: evaluate_multiple_choice(model, questions, values.delimiter, path)
      for path, questions in inputs.questions.items()
    }
  generations = ""
  if inputs.prompts:
    sample = SampleConfig(max_tokens=values.max_tokens, temperature=values.temperature, top_p=1.0)
    results["generate"] = {}
    for path, prompts in inputs.prompts.items():
      scores, texts = evaluate_generations(model, prompts, sample, values.stop, values.seed)
      results["generate"][path], generations = scores, generations + to_jsonl(prompts, texts)
  if values.lm_eval_tasks:
    results["lm_eval"] = import_harness().evaluate_tasks(
      model, values.lm_eval_tasks, values.lm_eval_path, values.limit, values.seed
    )
  return results, generations


def with_total(results: dict[str, TextResult], items: str) -> dict[str, dict[str, Any]]:
  """The metrics of each source, and of all together as TOTAL."""
  return {name: result.as_dict(items) for name, result in results.items()} | {
    TOTAL: TextResult.total(results.values()).as_dict(items)
  }


def tables(results: Results) -> str:
  """A table for each evaluation. Those of a harness's tasks have a row for each metric."""
  texts = []
  for evaluation, rows in results.items():
    table: list[dict[str, Any]] = [{evaluation: name} | metrics for name, metrics in rows.items()]
    if evaluation == "lm_eval":
      table = [
        {evaluation: task, "metric": name, "value": value, "stderr": metrics.get(f"{name}_stderr")}
        for task, metrics in rows.items()
        for name, value in metrics.items()
        if not name.endswith("_stderr")
      ]
    texts.append(format_table(table))
  return "\n\n".join(texts)


def main(argv: list[str]) -> int:
  """Prints tables of results. Raises UserError for an error of the user's."""
  values = program_flags()
  arguments, overrides = split_overrides(argv)
  if refused := [path for path in overrides if not path.startswith("model.")]:
    raise ConfigError(
      f"this program takes no --config.{refused[0]}, only fields of the model; its flags are {', '.join(values)}"
    )
  parse(arguments, values, __doc__)
  check_flags(values)
  inputs = read_inputs(values)
  with log_to_console():
    model = open_model(values, overrides)
    results, generations = evaluate(values, inputs, model)
  if values.generations:
    write_output(generations, values.generations, "generations")
  saved = model.saved
  about: dict[str, Any] = {
    "source": saved.source, "step": saved.step, "compute_dtype": saved.config.model.compute_dtype, "seq": model.seq,
  }  # fmt: skip
  step = "" if saved.step is None else f" of step {saved.step:,}"
  text = (
    f"model{step} in {saved.source}, computes in {about['compute_dtype']}, {model.seq:,} positions\n\n{tables(results)}"
  )
  return show_result(text, {"model": about} | results, values.json)


if __name__ == "__main__":
  run_program(main)
