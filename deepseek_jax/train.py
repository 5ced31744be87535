"""Trains the model of a config:  python -m deepseek_jax.train --config=tiny --workdir=runs/tiny

Any field of the config can be set on the command line: --config.train.steps=10 --config.model.attention.heads=8
--list_configs lists the shipped configs; --config also takes a .py or .json file. --print_config prints every field of
the config, --dry_run what the config amounts to; both stop before anything is trained. --schema prints the JSON Schema of
a .json config, from which editors complete it.
Running the same command again resumes from the newest checkpoint; --workdir alone takes the config saved there.
Several processes train as one by --coordinator, --processes and --process, or as their scheduler says.
--replay=STEP computes a logged step again and compares it with the log: 0 equal, 1 different.
Exit codes: 0 finished, 2 config, data, checkpoint or divergence, 42 a hang, 43 a device computes wrong, 130 / 143 saved
after Ctrl-C / SIGTERM or another notice, 1 anything else. launch/supervise.py starts a run again after 1, 42, 143 and the
end by a signal, but not after 2 and 43.
"""

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from deepseek_jax.config import Config
from deepseek_jax.console import Console, current_console, log_to_console, set_console
from deepseek_jax.errors import ConfigError
from deepseek_jax.flags import define_config_flags, file_exists, load_config, parse, run_program
from deepseek_jax.json_schema import config_schema
from deepseek_jax.processes import define_process_flags, find_initialize_args
from deepseek_jax.training.metrics import WriterFactory

if TYPE_CHECKING:
  from deepseek_jax.stages import Stage


def program_flags() -> flags.FlagValues:
  """The flags of this program; fields of the config are not among them."""
  values = flags.FlagValues()
  define_config_flags(values)
  flags.DEFINE_string(
    "workdir",
    None,
    "folder of the run, or gs://BUCKET/PATH or s3://BUCKET/PATH (default runs/NAME, NAME from the config)",
    flag_values=values,
  )
  flags.DEFINE_boolean(
    "dry_run",
    False,
    "print the fields that differ from the defaults, parameters, FLOPs, mesh and memory, and stop",
    flag_values=values,
  )
  flags.DEFINE_boolean(
    "print_config", False, "print every field with its value, mesh sizes resolved, and stop", flag_values=values
  )
  flags.DEFINE_boolean("schema", False, "print the JSON Schema of a config file, and stop", flag_values=values)
  flags.DEFINE_integer(
    "devices",
    None,
    "devices that --dry_run and --print_config plan for (default: as few as the mesh allows)",
    lower_bound=1,
    flag_values=values,
  )
  flags.DEFINE_string(
    "stage",
    None,
    "start a new run with this stage of the config's `stages`, from the weights of --config.init_from",
    flag_values=values,
  )
  flags.DEFINE_boolean(
    "accept_data_change", False, "resume although the data is not what the checkpoint saw", flag_values=values
  )
  flags.DEFINE_integer(
    "resume_from",
    None,
    "step of the checkpoint to resume from, instead of the newest one; newer ones are renamed. A later start with it goes back again",
    lower_bound=0,
    flag_values=values,
  )
  flags.DEFINE_integer(
    "replay",
    None,
    "a logged step of the run in --workdir: compute it again from the checkpoint before it, compare bit for bit, write nothing",
    lower_bound=1,
    flag_values=values,
  )
  flags.DEFINE_enum(
    "selftest",
    "on",
    ["on", "off"],
    "test the kernels of an accelerator before a new run, and have XLA's implementations replace those that fail or are slower (auto)",
    flag_values=values,
  )
  define_process_flags(values)
  return values


def main(argv: list[str]) -> int:
  """Returns the exit code of a training run, --dry_run, --print_config or --schema.

  Raises UserError for an error of the user's. A run that diverges is an error on stderr and exit code 2: it would diverge again.
  """
  values = program_flags()
  overrides = parse(argv, values, __doc__)
  if values.schema:
    print(json.dumps(config_schema(), indent=2))
    return 0
  saved = os.path.join(values.workdir or "", "config.json")
  if not values.config and not (values.workdir and file_exists(saved)):
    missing = f"there is no {saved}, so " if values.workdir else ""
    raise ConfigError(f"{missing}--config=NAME says what to train, e.g. --config=tiny (see --list_configs and --help)")
  plan_only = values.dry_run or values.print_config
  if values.devices and not plan_only:
    raise ConfigError(
      f"--devices={values.devices} is for --dry_run and --print_config; a run takes the devices that are here"
    )
  if values.replay is not None and (
    values.config or overrides or values.stage or values.resume_from is not None or plan_only
  ):
    raise ConfigError(
      "--replay takes the config that the run has saved, and no other: give --workdir and no --config, and only those flags "
      "beside them that say which process this is"
    )
  if values.stage:
    overrides["first_stage"] = values.stage
  config = load_config(values.config or saved, overrides, saved=not values.config)

  # Imported late: --help and config errors need no jax.
  from deepseek_jax.distributed import print_error
  from deepseek_jax.stages import resolve_stages
  from deepseek_jax.training.clock import process_start
  from deepseek_jax.training.corruption import Corrupted
  from deepseek_jax.training.schedule_check import check_warmup
  from deepseek_jax.training.skipped import Diverged

  stages = resolve_stages(config)
  for stage in stages:
    check_warmup(stage.config)
  if plan_only:
    print(describe(config, stages, values.devices, values.print_config, values.dry_run))
    return 0

  initialize_args = find_initialize_args(values.coordinator, values.processes, values.process)
  if values.replay is not None:
    return replay(config, values.workdir, values.replay, initialize_args)
  workdir = values.workdir or os.path.join("runs", config.name)
  try:
    return train(
      config, workdir, values.selftest == "on", values.accept_data_change, initialize_args=initialize_args,
      resume_from=values.resume_from, started=process_start(),
    )  # fmt: skip
  except (Diverged, Corrupted) as error:
    print_error(f"error: {error}", current_console())
    return error.exit_code if isinstance(error, Corrupted) else 2


def describe(config: Config, stages: Sequence["Stage"], devices: int | None, every_field: bool, plan: bool) -> str:
  """What --print_config (every_field) and --dry_run (plan) print of `config`, whose `stages` are resolved.

  devices: to plan for. None: as few as each mesh allows. Raises ConfigError where they do not fit a mesh.
  """
  from deepseek_jax.mesh import min_devices, resolve_mesh
  from deepseek_jax.plan import summary
  from deepseek_jax.training.schedule_check import schedule_warnings

  on_meshes = [resolve_mesh(stage.config, devices or min_devices(stage.config.mesh)) for stage in stages]
  resolved = resolve_mesh(config, min_devices(on_meshes[0].mesh)) if stages[0].name else on_meshes[0]
  lines = [summary.format_config(resolved) if every_field else summary.format_changed_fields(config)]
  for stage, on_mesh in zip(stages, on_meshes, strict=True) if plan else ():
    start = stage.first_step, stage.first.tokens
    fewest = "" if devices else ", the fewest that the mesh takes: --devices=N plans for N"
    lines += [summary.format_stage(config, stage)] if stage.name else []
    lines.append(f"devices          {min_devices(on_mesh.mesh):,}{fewest}")
    lines += [summary.config_summary(on_mesh), summary.format_planned_tokens(on_mesh, *start)]
    lines += [f"warning          {line}" for line in schedule_warnings(on_mesh, *start, stage.name) if stage.is_last]
  return "\n".join(lines)


def train(
  config: Config,
  workdir: str,
  selftest: bool = True,
  accept_data_change: bool = False,
  console: Console | None = None,
  writers: Sequence[WriterFactory] = (),
  initialize_args: dict[str, Any] | None = None,
  resume_from: int | None = None,
  started: float | None = None,
) -> int:
  """Trains `config` in `workdir`, or resumes there, as this program does; for programs that call the trainer.

  Args:
    workdir: a folder or a URL.
    selftest, accept_data_change: as the flags.
    console: for all that the run shows. None: the current one, which shows it on stdout and stderr.
    writers: of metrics and events, in addition to the files of the run; each is called with the local folder of the run
      and the step that it starts from.
    resume_from: as the flag.
    initialize_args: of a run of several processes, as `find_initialize_args` gives them.
    started: when the run began, in time.monotonic(), from where its wall time counts. None: now.

  Returns:
    The exit code.

  Raises:
    UserError: the config, the data or a checkpoint cannot be used, or a file cannot be written any more.
    Diverged: `train.max_skipped` updates in a row were skipped.
    Corrupted: a device computed wrong, as `train.sdc_every` has found.

  In a run of several processes the last two are raised on all. Any other exception is shown on the console, or on
  stderr where that is a SilentConsole, and ends them all.
  """
  from deepseek_jax.distributed import distributed_session, process_count
  from deepseek_jax.evaluate.heldout import evaluate
  from deepseek_jax.generate.decoding import continue_prompt
  from deepseek_jax.selftest.run import select_kernels
  from deepseek_jax.training.corruption import Corrupted
  from deepseek_jax.training.loop import run
  from deepseek_jax.training.schedule_check import check_warmup
  from deepseek_jax.training.skipped import Diverged

  check_warmup(config)

  def select(config, folder):
    return select_kernels(config, folder, process_count(), selftest)

  with set_console(console or current_console()), log_to_console(), distributed_session(initialize_args):
    try:
      return run(config, workdir, evaluate, continue_prompt, select, accept_data_change, writers, resume_from, started)
    except (Diverged, Corrupted) as error:  # all processes see it at the same step: none has to end the others
      ended_by = error
  raise ended_by


def replay(config: Config, workdir: str, step: int, initialize_args: dict[str, Any] | None = None) -> int:
  """Computes a logged step of the run in `workdir` again, as --replay does. Returns 0 if it is equal bit for bit, else 1.

  config: the one that the run has saved. Arguments and errors are otherwise those of `train`.
  """
  from deepseek_jax.distributed import distributed_session, process_count
  from deepseek_jax.selftest.run import select_kernels
  from deepseek_jax.training import replay

  def select(config, folder):
    return select_kernels(config, folder, process_count(), enabled=False)

  with log_to_console(), distributed_session(initialize_args):
    return replay.replay(config, workdir, step, select)


if __name__ == "__main__":
  run_program(main)
