"""Converts checkpoints:  python -m deepseek_jax.checkpoint convert --from=DIR --to=DIR

From a Hugging Face folder to a workdir, which train and generate take, or from a workdir to a Hugging Face folder: the
content of --from tells which it is. Tensors are streamed; only safetensors are read, and FP8 is dequantized.
With --from_model_args=FILE.json --to=CONFIG.json, DeepSeek's own ModelArgs become a config for train --config.
"""

from absl import flags

from deepseek_jax.errors import ConfigError
from deepseek_jax.flags import parse, run_program


def main(argv: list[str]) -> int:
  """Converts, and prints what was written. Raises UserError for user errors."""
  values = flags.FlagValues()
  flags.DEFINE_string("from", None, "a Hugging Face folder, or the workdir of a run", flag_values=values)
  flags.DEFINE_string("from_model_args", None, "a JSON with DeepSeek's ModelArgs", flag_values=values)
  flags.DEFINE_string("to", None, "the folder to write, missing or empty; with ModelArgs, the JSON", flag_values=values)
  flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "of the tensors of a Hugging Face folder that is written",
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_string(
    "tokenizer",
    "",
    "data.tokenizer of a workdir that is written; default: a copy of --from's tokenizer.json, else DeepSeek's for this size of the vocabulary, else none",
    flag_values=values,
  )
  has_command = argv[1:2] == ["convert"]
  parse(argv[:1] + argv[2:] if has_command else argv, values, __doc__)
  if not has_command:
    raise ConfigError(
      "the command is missing: python -m deepseek_jax.checkpoint convert --from=DIR --to=DIR (see --help)"
    )
  source, args = values["from"].value, values.from_model_args
  if bool(source) == bool(args) or not values.to:
    raise ConfigError("convert takes --to and one of --from=DIR and --from_model_args=FILE.json (see --help)")

  # Imported late: --help and flag errors need none of it.
  from deepseek_jax.checkpoint import model_args
  from deepseek_jax.checkpoint.convert import convert

  if args:
    if values["dtype"].present or values["tokenizer"].present:
      raise ConfigError(
        "--from_model_args takes no --dtype and no --tokenizer: train's --config.data.tokenizer names one"
      )
    config, notes = model_args.read_model_args(args)
    model_args.write_config(config, values.to)
    print("\n".join(f"note     {note}" for note in notes) + f"\nwrote    {values.to}")
  else:
    assert source is not None
    convert(source, values.to, values.dtype, values.tokenizer)
  return 0


if __name__ == "__main__":
  run_program(main)
