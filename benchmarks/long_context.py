"""Context extension with YaRN, and the same tokens without:  python -m benchmarks.long_context

Trains configs/tiny_long.py: pre-training once, and from there its extensions twice, with YaRN and without (factor 1 in all
stages). At each length it evaluates loss by position and retrieval by distance before the extension and after it. Rows go to
--json, curves to --out, tables are printed. The same command continues: finished runs and rows are not repeated.
About 40 minutes on two CPU cores. Results: docs/results/long_context.md.
"""

import math
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from benchmarks.curve import write_svg
from benchmarks.results import Results
from deepseek_jax.checkpoint.load import open_workdir
from deepseek_jax.errors import ConfigError
from deepseek_jax.evaluate.__main__ import with_model_fields
from deepseek_jax.evaluate.by_position import evaluate_by_position
from deepseek_jax.evaluate.language_model import LanguageModel
from deepseek_jax.evaluate.retrieval import evaluate_retrieval
from deepseek_jax.flags import define_config_flags, load_config, parse, run_program
from deepseek_jax.runs import run
from deepseek_jax.stages import Stage, resolve_stages
from deepseek_jax.training.plot import Series

ARMS = ("no YaRN", "YaRN")
YARN = "model.attention.yarn"
TIMES = ("before", "after")

Rows = Mapping[str, Mapping[str, Any]]  # {row_name(...): results of evaluate}


def main(argv: list[str]) -> int:
  values = flags.FlagValues()
  define_config_flags(values, "tiny_long")
  flags.DEFINE_string("workdir", "runs/long_context", "folder of the runs", flag_values=values)
  flags.DEFINE_string("json", None, "file of the results; default: results.json in --workdir", flag_values=values)
  flags.DEFINE_string("out", None, "SVG file to write", flag_values=values)
  flags.DEFINE_integer("sequences", 128, "held-out windows of an evaluation", lower_bound=1, flag_values=values)
  flags.DEFINE_integer(
    "retrieval", 128, "windows of key-value retrieval of an evaluation", lower_bound=1, flag_values=values
  )
  overrides = parse(argv, values, __doc__)
  arms = {arm: {**overrides, **arm_fields(values.config, overrides, arm)} for arm in ARMS}
  stages = {arm: resolve_stages(load_config(values.config, fields)) for arm, fields in arms.items()}
  workdir = pathlib.Path(values.workdir)
  for arm, fields in arms.items():
    train_arm(arm, values.config, fields, stages[arm][0].config.train.steps, workdir)

  results = Results(
    values.json or workdir / "results.json",
    {"config": values.config, "overrides": overrides, "sequences": values.sequences, "retrieval": values.retrieval},
  )
  evaluations = {
    row_name(arm, stage, time): (folder(workdir, arm), stage, time)
    for time in TIMES
    for arm in ARMS
    for stage in stages[arm][1:]
  }

  def measure(name: str) -> dict[str, Any]:
    return evaluate(*evaluations[name], values.sequences, values.retrieval)

  code = results.run(
    evaluations, measure, show=lambda row: print(f"== {row['name']}: {row.get('failure', 'done')}", flush=True)
  )
  if code:
    return code
  print("\n\n".join(tables(results.rows, stages["YaRN"][1:])))
  if values.out:
    write_svg(values.out, make_panels(results.rows, stages["YaRN"][1:]), columns=2, x_unit="log2 of tokens")
  return 0


def arm_fields(config: str, overrides: Mapping[str, str], arm: str) -> dict[str, str]:
  """The fields {path: value} by which an arm differs from `config`. Raises ConfigError for one that extends nothing."""
  stages = load_config(config, overrides).stages
  if len(stages) < 2:
    raise ConfigError(
      f"--config={config} has {len(stages)} stages: give one with pre-training and extensions, as tiny_long"
    )
  return {f"stages.{stage.name}.{YARN}.factor": "1" for stage in stages[1:]} if arm == "no YaRN" else {}


def folder(workdir: pathlib.Path, arm: str) -> pathlib.Path:
  """The folder of the run of an arm."""
  return workdir / arm.replace(" ", "-").lower()


def row_name(arm: str, stage: Stage, time: str) -> str:
  """The name of the evaluation of an arm at the length of `stage`, before or after it."""
  return f"{arm}, {time} the extension to {stage.name}"


def train_arm(arm: str, config: str, fields: Mapping[str, str], steps: int, workdir: pathlib.Path) -> None:
  """Trains or continues the run of an arm, from a copy of the run of `steps` steps that ends pre-training.

  Arms differ only in later stages: so the copy is bit for bit what the run would be that far.
  """
  pretraining, target = workdir / "pretraining", folder(workdir, arm)
  if not target.exists():
    train(config, {**fields, "train.steps": str(steps)}, pretraining)
    copy = target.with_name(f"{target.name}.partial")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(pretraining, copy)
    copy.rename(target)
  train(config, fields, target)


def train(config: str, fields: Mapping[str, str], workdir: pathlib.Path) -> None:
  """Trains a run, or continues it; a finished one is left as it is."""
  print(f"== {workdir}", flush=True)
  run(config, workdir, {"sample.max_tokens": "0", **fields})


def evaluate(workdir: pathlib.Path, stage: Stage, time: str, sequences: int, retrieval: int) -> dict[str, Any]:
  """Loss by position and retrieval by distance at the length of `stage`, and with its YaRN, {evaluation: rows}.

  Its weights are those of the checkpoint at which the stage starts (before) or ends (after).
  """
  step = stage.first_step if time == "before" else stage.config.train.steps
  saved = open_workdir(workdir, step)
  yarn = stage.config.model.attention.yarn
  saved = with_model_fields(saved, {f"{YARN}.factor": yarn.factor, f"{YARN}.original_seq": yarn.original_seq})
  model = LanguageModel(saved, saved.load_tokenizer(), seq=stage.config.data.seq)
  return {
    "step": step,
    "by_position": evaluate_by_position(model, None, sequences),
    "retrieval": evaluate_retrieval(model, retrieval),
  }


def measured(stage: Stage, row: Mapping[str, float]) -> float:
  """The accuracy of a row of retrieval; of one by position the loss of the first source, the text to learn."""
  return row["accuracy"] if "accuracy" in row else row.get(stage.config.data.sources[0], row["loss"])


def tables(rows: Rows, stages: Sequence[Stage]) -> list[str]:
  """Markdown tables, of each stage the loss by position and the accuracy by distance."""
  found = []
  for stage in stages:
    for evaluation, title in (("by_position", "loss by position"), ("retrieval", "accuracy by distance")):
      of_arms = {(arm, time): rows[row_name(arm, stage, time)][evaluation] for time in TIMES for arm in ARMS}
      lines = [f"| {title}, {stage.name} | {' | '.join(f'{arm}, {time}' for arm, time in of_arms)} |", "|---" * 5 + "|"]
      for bucket in next(iter(of_arms.values())):
        lines.append(f"| {bucket} | {' | '.join(f'{measured(stage, row[bucket]):.3f}' for row in of_arms.values())} |")
      found.append("\n".join(lines))
  return found


def make_panels(rows: Rows, stages: Sequence[Stage]) -> list[tuple[str, list[Series], str]]:
  """The panels for `write_svg`, over the logarithm to base 2 of positions and distances."""
  panels = []
  for stage in stages:
    for evaluation, title, scale in (
      ("by_position", "loss", "log"),
      ("retrieval", "retrieval", "from zero"),
    ):
      curves = [
        Series(f"{arm}, {time}", curve(stage, rows[row_name(arm, stage, time)][evaluation]), "dots")
        for time in TIMES
        for arm in ARMS
      ]
      panels.append((f"{title} at {stage.name}", curves, scale))
  return panels


def curve(stage: Stage, buckets: Mapping[str, Mapping[str, float]]) -> list[tuple[float, float]]:
  """[(log2 of the middle of a bucket "FIRST to LAST", what is measured of it)]."""
  points = []
  for bucket, row in buckets.items():
    first, last = map(int, bucket.split(" to "))
    points.append((math.log2((first + last + 1) / 2), measured(stage, row)))
  return points


if __name__ == "__main__":
  run_program(main)
