"""What a finished run suggests to do next."""

import os
import shlex
import sys

from deepseek_jax.config import Config


def next_commands(config: Config, workdir: str) -> str:
  """Commands that train on, sample, and train a bigger model, one a line."""
  relative = os.path.relpath(sys.executable)
  python = shlex.quote(sys.executable if relative.startswith("..") else relative)
  folder = shlex.quote(f"--workdir={workdir}")
  prompt = shlex.quote(f"--prompt={config.sample.prompt}")
  return (
    f"  {python} -m deepseek_jax.train {folder} --config.train.steps={2 * config.train.steps}    # train on\n"
    f"  {python} -m deepseek_jax.generate {folder} {prompt}    # sample\n"
    f"  {python} -m deepseek_jax.train --config=small    # a bigger config"
  )
