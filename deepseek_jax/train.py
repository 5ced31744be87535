"""Trains the model of a config:  python -m deepseek_jax.train --config=configs/tiny.py --workdir=runs/tiny

Any field of the config can be set on the command line: --config.train.steps=10 --config.model.attention.heads=8
Running the same command again resumes from the newest checkpoint; --workdir alone takes the config saved there.
Several processes train as one by --coordinator, --processes and --process, or as their scheduler says.
Exit codes: 0 finished, 2 config, data or checkpoint, 130 / 143 saved after Ctrl-C / SIGTERM, 1 anything else.
"""

import os

from absl import flags

from deepseek_jax.errors import ConfigError
from deepseek_jax.flags import file_exists, load_config, parse, run_program
from deepseek_jax.processes import define_flags, find_place


def main(argv) -> int:
  """The exit code of a training run, or of --dry_run. Raises UserError for what the user can mend."""
  values = flags.FlagValues()
  flags.DEFINE_string("config", None, "a config file: configs/NAME.py, or a JSON", flag_values=values)
  flags.DEFINE_string(
    "workdir",
    None,
    "folder of the run, or gs://BUCKET/PATH or s3://BUCKET/PATH (default runs/NAME, NAME from the config)",
    flag_values=values,
  )
  flags.DEFINE_boolean("dry_run", False, "print the config and what it amounts to, and stop", flag_values=values)
  flags.DEFINE_integer(
    "devices",
    None,
    "devices that --dry_run plans for (default: as few as the mesh allows)",
    lower_bound=1,
    flag_values=values,
  )
  flags.DEFINE_boolean(
    "accept_data_change", False, "resume although the data is not what the checkpoint saw", flag_values=values
  )
  flags.DEFINE_enum(
    "selftest",
    "on",
    ["on", "off"],
    "test the kernels of an accelerator before a new run, and have XLA's forms replace those that fail or are slower (auto)",
    flag_values=values,
  )
  define_flags(values)
  overrides = parse(argv, values, __doc__)
  saved = os.path.join(values.workdir or "", "config.json")
  if not values.config and not (values.workdir and file_exists(saved)):
    raise ConfigError("--config=FILE says what to train, e.g. --config=configs/tiny.py (see --help)")
  if values.devices and not values.dry_run:
    raise ConfigError(f"--devices={values.devices} is for --dry_run; a run takes the devices that are here")
  config = load_config(values.config or saved, overrides, saved=not values.config)

  # Imported late: --help and config errors need no jax.
  from deepseek_jax.mesh import least_devices, resolve_mesh
  from deepseek_jax.plan.summary import config_summary, format_config

  if values.dry_run:
    config = resolve_mesh(config, values.devices or least_devices(config.mesh))
    print(f"{format_config(config)}\n{config_summary(config)}")
    return 0

  place = find_place(values.coordinator, values.processes, values.process)
  from deepseek_jax.distributed import distributed_session, print_error, process_count
  from deepseek_jax.evaluate.heldout import evaluate
  from deepseek_jax.generate.decoding import continue_prompt
  from deepseek_jax.selftest.run import select_kernels
  from deepseek_jax.training.loop import Diverged, run

  def select(config, folder):
    return select_kernels(config, folder, process_count(), values.selftest == "on")

  workdir = values.workdir or os.path.join("runs", config.name)
  with distributed_session(place):
    try:
      return run(config, workdir, evaluate, continue_prompt, select, values.accept_data_change)
    except Diverged as error:  # all processes see it at the same step
      print_error(f"error: {error}")
      return 1


if __name__ == "__main__":
  run_program(main)
