"""Commands that a run prints, read as a shell reads them and given to the programs."""

import dataclasses
import os
import pathlib
import shlex
import sys

import pytest

from deepseek_jax import train
from deepseek_jax.config import Config
from deepseek_jax.config_sections import SampleConfig, ScheduleConfig, TrainConfig
from deepseek_jax.flags import load_config
from deepseek_jax.schema import flatten_config
from deepseek_jax.training.next_commands import next_commands
from deepseek_jax.training.schedule_check import schedule_warnings

COSINE = ScheduleConfig(kind="warmup_cosine", steps=20, factors=(0.1,))


def commands_of(config, workdir="runs/a b", step=20, tokens=0, processes=1):
  """{what it does: the words that a shell makes of the command}."""
  lines = next_commands(config, workdir, step, tokens, processes).splitlines()
  return {name.strip(): shlex.split(command) for name, command in zip(lines[::2], lines[1::2], strict=True)}


@pytest.mark.parametrize(
  ("schedule", "overrides"),
  [
    (COSINE, {"train.steps": 40, "schedule.steps": 40}),
    (dataclasses.replace(COSINE, tokens=20 * 16 * 256), {"train.steps": 40, "schedule.tokens": 40 * 16 * 256}),
    (ScheduleConfig(), {"train.steps": 40}),
  ],
)
def test_training_on_stretches_the_schedule_to_the_run(schedule, overrides):
  config = Config(train=TrainConfig(steps=20), schedule=schedule)
  python, module, name, workdir, *arguments = commands_of(config, tokens=20 * 16 * 256)["train on"]
  assert (module, name, workdir) == ("-m", "deepseek_jax.train", "--workdir=runs/a b")
  assert arguments == [f"--config.{path}={value}" for path, value in overrides.items()]
  on = load_config("", {path: value for path, value in flatten_config(config).items()} | overrides)
  assert not schedule_warnings(on, 20, 20 * 16 * 256)


def test_a_schedule_that_goes_on_after_the_run_stays():
  arguments = commands_of(load_config("tiny"), step=4)["train on"][4:]
  assert arguments == ["--config.train.steps=8"]  # tiny's warm-up is longer than 8 steps


def test_commands_are_found_in_any_folder(monkeypatch, tmp_path):
  prompt = 'x = "$HOME"  # it\'s\n'
  config = Config(sample=SampleConfig(prompt=prompt))
  monkeypatch.setenv("JAX_ENABLE_X64", "1")
  monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
  for folder in (tmp_path, pathlib.Path(sys.executable).parent, pathlib.Path(sys.executable).parents[1]):
    monkeypatch.chdir(folder)
    lines = next_commands(config, "w", 1, 0)
    words = shlex.split(lines.partition("sample\n")[2], comments=False)
    variable, python, module, name, workdir, given = words[:6]
    assert (variable, module, name, workdir, given) == (
      "JAX_ENABLE_X64=1", "-m", "deepseek_jax.generate", "--workdir=w", f"--prompt={prompt}"
    )  # fmt: skip
    assert "/" in python and os.path.samefile(python, sys.executable)
  assert "#" not in lines.replace(prompt, "").replace("# it", "")  # an interactive zsh has no comments


def test_a_bigger_model_is_offered_to_smaller_ones_only(capsys):
  bigger = commands_of(load_config("tiny"))["train a bigger model"]
  assert train.main(["train", *bigger[3:], "--dry_run"]) == 0
  assert commands_of(load_config("tiny_dense"))["train a bigger model"][-1] == "--config=small_dense"
  assert set(commands_of(load_config("small_dense"))) == {"train on", "sample"}
  assert set(commands_of(load_config("small"))) == set(commands_of(load_config("v3"))) == {"train on", "sample"}


def test_a_run_of_several_processes_is_started_as_before():
  assert " ".join(commands_of(Config(), processes=2)["train on"]) == "the same command with --config.train.steps=40"
