"""Continues a prompt with a trained model:  python -m deepseek_jax.generate --workdir=runs/tiny --prompt="def "

Loads the newest checkpoint of the run. What is not given comes from the run's own `sample` config. A converted
checkpoint that came without a tokenizer needs --tokenizer.
"""

import dataclasses
import sys
from typing import TYPE_CHECKING, Any

from absl import flags

from deepseek_jax.config import Config, check_weights
from deepseek_jax.config_sections import MeshConfig, SampleConfig
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.errors import CheckpointError, ConfigError, DataError
from deepseek_jax.flags import parse, run_program
from deepseek_jax.schema import from_dict, leaf_paths

if TYPE_CHECKING:  # it imports jax
  from deepseek_jax.checkpoint.manager import CheckpointReader


def main(argv: list[str]) -> int:
  """Prints the prompt and its continuation. Raises UserError for an error of the user's."""
  values = flags.FlagValues()
  flags.DEFINE_string("workdir", None, "folder of the run, or its gs:// or s3:// URL", flag_values=values)
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
  from deepseek_jax.checkpoint.bucket import open_reader
  from deepseek_jax.checkpoint.weights import has_hf_config
  from deepseek_jax.data.tokenizer import load_model_tokenizer

  if has_hf_config(values.workdir):
    raise ConfigError(
      f"--workdir={values.workdir} is a Hugging Face folder: make a workdir of it first, python -m deepseek_jax.checkpoint "
      f"convert --from={values.workdir} --to=DIR"
    )
  reader = open_reader(values.workdir)
  step = reader.latest()
  if step is None:
    raise CheckpointError(
      f"no checkpoint in {values.workdir}; train one: python -m deepseek_jax.train --config=NAME --workdir={values.workdir}"
    )
  meta = reader.meta(step)
  config = from_dict(Config, meta["config"])
  name = config.data.tokenizer if values.tokenizer is None else values.tokenizer
  tokenizer = load_model_tokenizer(name, config.model.vocab)
  if meta["tokenizer_fingerprint"] not in (None, tokenizer.fingerprint):  # None: converted weights, trained elsewhere
    raise DataError(
      f"data.tokenizer={name} is not the one of the checkpoint: put that one back, or give it with --tokenizer"
    )
  overrides: dict[str, Any] = {
    name: values[name].value for name in vars(config.sample) if values[name].value is not None
  }
  if "prompt" in overrides:  # the command line may hold bytes that are not UTF-8
    overrides["prompt"] = overrides["prompt"].encode(errors="surrogateescape").decode(errors="replace")
  sample = dataclasses.replace(config.sample, **overrides)
  print(f"checkpoint of step {step} in {values.workdir}", file=sys.stderr)
  # What a run trained begins with bos. What was trained elsewhere is prompted as transformers prompts it.
  add_bos = tokenizer.add_bos_token or meta["tokenizer_fingerprint"] is not None
  if not add_bos and tokenizer.bos != tokenizer.eos:
    print("note     the tokenizer's config has add_bos_token=false: the prompt begins without bos", file=sys.stderr)
  print(
    sample.prompt
    + sample_from_checkpoint(reader, step, config, tokenizer, sample, values.seed, values.devices, add_bos)
  )
  return 0


def sample_from_checkpoint(
  reader: "CheckpointReader",
  step: int,
  config: Config,
  tokenizer: Tokenizer,
  sample: SampleConfig,
  seed: int,
  devices: int,
  add_bos: bool = True,
) -> str:
  """Text that follows `sample.prompt`, by the parameters of the checkpoint of `step`, sharded over `devices` devices.

  `add_bos`: as `continue_prompt`.

  Raises ConfigError when there are fewer devices.
  """
  import jax

  from deepseek_jax.compilation_cache import use_compilation_cache
  from deepseek_jax.cpu_backend import keep_freed_memory
  from deepseek_jax.generate.decoding import continue_prompt
  from deepseek_jax.mesh import check_x64, make_mesh
  from deepseek_jax.model.transformer import graphdef, init_params
  from deepseek_jax.sharding import with_concrete_shardings

  check_x64(config.model)
  if devices > len(jax.devices()):
    raise ConfigError(f"--devices={devices}, but {len(jax.devices())} are here")
  check_weights(config.model, MeshConfig(data=1, fsdp=devices))
  use_compilation_cache()
  if jax.default_backend() == "cpu":
    keep_freed_memory()
  mesh = make_mesh(MeshConfig(data=1, fsdp=devices), jax.devices()[:devices])
  with jax.set_mesh(mesh):
    shapes = jax.eval_shape(lambda: init_params(config.model, key=None))
    abstract = dict(zip(("params", "buffers"), with_concrete_shardings(shapes, mesh), strict=True))
    weights = reader.restore(step, abstract)
    return continue_prompt(
      graphdef(config.model.for_sampling()),
      weights["params"],
      weights["buffers"],
      tokenizer,
      sample,
      config.data.seq,
      seed,
      mesh,
      add_bos,
    )


if __name__ == "__main__":
  run_program(main)
