"""A saved model as a model class of lm-evaluation-harness, and its tasks from local files.

Importing this needs the package lm-eval.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from deepseek_jax.config_sections import SampleConfig
from deepseek_jax.console import current_console
from deepseek_jax.errors import ConfigError, DataError, UserError, format_exception
from deepseek_jax.evaluate.language_model import LanguageModel

# What the harness and its libraries raise for the fields of a task and its files.
TASK_ERRORS = (
  AssertionError,
  DatasetsError,
  KeyError,
  NotImplementedError,
  OSError,
  TemplateError,
  TypeError,
  ValueError,
)


class HarnessModel(LM):
  """Answers the requests of lm-evaluation-harness by a LanguageModel.

  seed: of sampling, where a task asks for it.
  """

  def __init__(self, model: LanguageModel, seed: int = 0):
    super().__init__()
    self.model, self.seed = model, seed

  def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
    """(ln p, whether it is the likeliest) of the continuation of each (context, continuation)."""
    results = self.model.log_likelihoods([request.args for request in requests], "log-likelihoods")
    return [(result.log_prob, result.is_greedy) for result in results]

  def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
    """ln p of each whole text after bos."""
    texts = [request.args[0] for request in requests]
    with current_console().count_progress("evaluate: texts", len(texts)):
      return [result.log_prob for result in self.model.document_log_likelihoods(texts)]

  def generate_until(self, requests: list[Instance]) -> list[str]:
    """The continuation of each (context, arguments of generation), up to a stop text, which is not part of it."""
    texts: list[str] = [""] * len(requests)
    by_arguments: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
      by_arguments.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
    for arguments, indices in by_arguments.items():
      sample, stop = sampling(json.loads(arguments))
      prompts = [requests[i].args[0] for i in indices]
      for i, text in zip(indices, self.model.generate(prompts, sample, stop, self.seed), strict=True):
        texts[i] = text
    return texts


def sampling(arguments: Mapping[str, Any]) -> tuple[SampleConfig, list[str]]:
  """(settings, stop texts) of a task's generation_kwargs. Raises ConfigError for one that is not known here."""
  values = dict(normalize_gen_kwargs(dict(arguments)))
  stop = [text for text in values.pop("until") if text]
  fields = {
    "max_tokens": values.pop("max_gen_toks"),
    "temperature": values.pop("temperature", 0.0),
    "top_k": 0,
    "top_p": 1.0,
  }
  fields |= {name: values.pop(name) for name in ("top_k", "top_p", "repetition_penalty") if name in values}
  if not values.pop("do_sample", False):
    fields["temperature"] = 0.0
  if values:
    raise ConfigError(
      f"generation_kwargs: {', '.join(values)} is not known; known are until, max_gen_toks, do_sample, temperature, top_k, "
      "top_p and repetition_penalty"
    )
  return SampleConfig(**fields), stop


def find_tasks(manager: TaskManager, names: Sequence[str], folder: str) -> list[str | dict[str, Any]]:
  """What `simple_evaluate` takes for `names`: tasks of the .yaml files in `folder`, or the content of NAME.json there.

  Raises DataError for a name that is neither.
  """
  tasks: list[str | dict[str, Any]] = []
  for name in names:
    path = pathlib.Path(folder, f"{name}.json")
    if name in manager.all_tasks:
      tasks.append(name)
    elif path.is_file():
      try:
        content = json.loads(path.read_text(encoding="utf-8"))
      except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from None
      if not isinstance(content, dict):
        raise DataError(f"{path} should hold a JSON object, the fields of a task, got {content!r:.60}")
      tasks.append({"task": name} | content)
    else:
      known = ", ".join(sorted({*manager.all_tasks, *(p.stem for p in pathlib.Path(folder).glob("*.json"))}))
      raise DataError(
        f"--lm_eval_tasks: no task {name!r} in {folder}; there is {known or 'none: a .yaml file with task: NAME'}"
      )
  return tasks


def evaluate_tasks(
  model: LanguageModel, names: Sequence[str], folder: str, limit: int | None = None, seed: int = 0
) -> dict[str, dict[str, Any]]:
  """{task: {metric: value}} of the tasks `names` in `folder`, by `lm_eval.simple_evaluate`.

  limit: documents of each task, the first ones; None: all. seed: of few-shot examples and sampling. Raises DataError
  for a task that is not there or fails.
  """
  manager = TaskManager(include_path=folder, include_defaults=False)
  tasks = find_tasks(manager, names, folder)
  try:
    output = simple_evaluate(
      model=HarnessModel(model, seed), tasks=tasks, task_manager=manager, limit=limit, log_samples=False, random_seed=seed,
      numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
    )  # fmt: skip
  except UserError:
    raise
  except TASK_ERRORS as error:
    raise DataError(f"--lm_eval_tasks={','.join(names)}: {format_exception(error)}") from error
  return {
    task: {metric.removesuffix(",none"): value for metric, value in metrics.items() if metric not in ("alias", "name")}
    for task, metrics in output["results"].items()
  }
