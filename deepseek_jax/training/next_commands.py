"""What a finished run suggests to do next: commands that work as they are printed, in the folder where it was started."""

import dataclasses
import os
import shlex
import sys

from deepseek_jax.config import Config
from deepseek_jax.flags import load_config, shipped_configs
from deepseek_jax.plan.summary import planned_tokens
from deepseek_jax.schema import flatten_config
from deepseek_jax.training.schedule_check import fitted_fields

BIGGER = {True: "small", False: "small_dense"}  # shipped configs: with experts, and dense
# Variables without which a command would not compute the same.
ENVIRONMENT = ("JAX_ENABLE_X64", "JAX_NUM_CPU_DEVICES")


def next_commands(config: Config, workdir: str, step: int, tokens: int, processes: int = 1) -> str:
  """Commands that train on from `step`, sample, and train a bigger model, each below what it does.

  tokens: what the run has seen. processes: of the run; how several were started is not known.
  """
  lines = []
  if not config.stages:
    lines.append(f"  train on\n    {train_on_command(config, workdir, step, tokens, processes)}")
  prompt = shlex.quote(f"--prompt={config.sample.prompt}")
  lines.append(f"  sample\n    {_python()} -m deepseek_jax.generate {_workdir(workdir)} {prompt}")
  name = BIGGER[config.model.num_moe_layers > 0]
  if name in shipped_configs():
    # By width and depth: parameters cannot be counted inside the mesh of a run.
    bigger, this = (model.embed**2 * model.layers for model in (load_config(name).model, config.model))
    if bigger > this:
      lines.append(f"  train a bigger model\n    {_python()} -m deepseek_jax.train --config={name}")
  return "\n".join(lines)


def train_on_command(config: Config, workdir: str, step: int, tokens: int, processes: int = 1) -> str:
  """The command that trains from `step` on, as many steps again, with a schedule that does not end before the run."""
  longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2 * step))
  fitted, values = fitted_fields(longer, planned_tokens(longer, step, tokens)), flatten_config(config)
  fields = {"train.steps": 2 * step} | {path: value for path, value in fitted.items() if value > values[path]}
  overrides = " ".join(f"--config.{path}={value}" for path, value in fields.items())
  if processes > 1:
    return f"the same command with {overrides}"
  return f"{_python()} -m deepseek_jax.train {_workdir(workdir)} {overrides}"


def continue_command(workdir: str) -> str:
  """The command that continues the run in `workdir`."""
  return f"{_python()} -m deepseek_jax.train {_workdir(workdir)}"


def _workdir(workdir: str) -> str:
  return shlex.quote(f"--workdir={workdir}")


def _python() -> str:
  """This interpreter as a shell finds it, and the variables that this run had."""
  relative = os.path.relpath(sys.executable)
  python = relative if "/" in relative and not relative.startswith("..") else sys.executable
  variables = [f"{name}={shlex.quote(os.environ[name])} " for name in ENVIRONMENT if os.environ.get(name)]
  return "".join(variables) + shlex.quote(python)
