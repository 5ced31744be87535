"""Continues a prompt with a trained model:  python -m deepseek_jax.generate --workdir=runs/tiny --prompt="def "

Loads the newest checkpoint of the run, or that of --step. What is not given comes from the run's own `sample` config. A converted
checkpoint that came without a tokenizer needs --tokenizer.
"""

import dataclasses
import sys
from typing import TYPE_CHECKING, Any

from absl import flags

from deepseek_jax.config_sections import SampleConfig
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.errors import ConfigError
from deepseek_jax.flags import parse, run_program
from deepseek_jax.schema import leaf_paths

if TYPE_CHECKING:  # it imports jax
  from deepseek_jax.checkpoint.load import SavedModel


def main(argv: list[str]) -> int:
  """Prints the prompt and its continuation. Raises UserError for an error of the user's."""
  values = flags.FlagValues()
  flags.DEFINE_string("workdir", None, "folder of the run, or its gs:// or s3:// URL", flag_values=values)
  flags.DEFINE_integer("step", None, "another checkpoint of the run", lower_bound=0, flag_values=values)
  flags.DEFINE_integer("seed", 0, "seed of the sampling", flag_values=values)
  flags.DEFINE_integer("devices", 1, "devices that the parameters are sharded over", lower_bound=1, flag_values=values)
  flags.DEFINE_string(
    "tokenizer", None, "byte, deepseek-llm, deepseek-v3, or the path of a tokenizer.json; default: the run's own",
    flag_values=values,
  )  # fmt: skip
  for path, field in leaf_paths(SampleConfig).items():  # as text: SampleConfig parses and checks it
    flags.DEFINE_string(path.removeprefix("sample."), None, field.metadata["doc"], flag_values=values)
  parse(argv, values, __doc__)
  if not values.workdir:
    raise ConfigError("--workdir=DIR says which run to sample from, e.g. --workdir=runs/tiny")

  # Imported late: --help and flag errors need no jax.
  from deepseek_jax.checkpoint.load import open_workdir
  from deepseek_jax.checkpoint.weights import has_hf_config

  if has_hf_config(values.workdir):
    raise ConfigError(
      f"--workdir={values.workdir} is a Hugging Face folder: make a workdir of it first, python -m deepseek_jax.checkpoint "
      f"convert --from={values.workdir} --to=DIR"
    )
  saved = open_workdir(values.workdir, values.step)
  tokenizer = saved.load_tokenizer(values.tokenizer)
  overrides: dict[str, Any] = {
    name: values[name].value for name in vars(saved.config.sample) if values[name].value is not None
  }
  if "prompt" in overrides:  # the command line may hold bytes that are not UTF-8
    overrides["prompt"] = overrides["prompt"].encode(errors="surrogateescape").decode(errors="replace")
  sample = dataclasses.replace(saved.config.sample, **overrides)
  print(f"checkpoint of step {saved.step} in {values.workdir}", file=sys.stderr)
  if not saved.add_bos(tokenizer) and tokenizer.bos != tokenizer.eos:
    print("note     the tokenizer's config has add_bos_token=false: the prompt begins without bos", file=sys.stderr)
  print(sample.prompt + sample_from_checkpoint(saved, tokenizer, sample, values.seed, values.devices))
  return 0


def sample_from_checkpoint(
  saved: "SavedModel", tokenizer: Tokenizer, sample: SampleConfig, seed: int, devices: int
) -> str:
  """Text that follows `sample.prompt`, by the parameters of `saved`, sharded over `devices` devices.

  Raises ConfigError when there are fewer devices.
  """
  import jax

  from deepseek_jax.generate.decoding import continue_prompt

  weights = saved.load(devices)
  with jax.set_mesh(weights.mesh):
    return continue_prompt(
      saved.config.model,
      weights.params,
      weights.buffers,
      tokenizer,
      sample,
      saved.config.data.seq,
      seed,
      weights.mesh,
      saved.add_bos(tokenizer),
    )


if __name__ == "__main__":
  run_program(main)
