"""Loss by position, of a run, through the program, against the evaluation of whole windows."""

import dataclasses
import json

import pytest

from deepseek_jax.config import Config
from deepseek_jax.config_sections import DataConfig, EvalConfig, MeshConfig, SampleConfig, TrainConfig
from deepseek_jax.console import SilentConsole
from deepseek_jax.errors import ConfigError
from deepseek_jax.evaluate.__main__ import main
from deepseek_jax.evaluate.by_position import position_edges
from deepseek_jax.train import train
from tests.configs import DENSE, write_texts

SEQ = 32


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The folder of a run of two steps on two sources."""
  folder = tmp_path_factory.mktemp("by_position")
  write_texts(folder / "a", 20, 40)
  write_texts(folder / "b", 30, 25)
  config = Config(
    model=dataclasses.replace(DENSE, vocab=264, embed=16, layers=1, mlp=24), mesh=MeshConfig(data=1, fsdp=4),
    train=TrainConfig(steps=2, global_batch=8), sample=SampleConfig(max_tokens=0), eval=EvalConfig(final_sequences=20),
    data=DataConfig(
      sources=(str(folder / "a"), str(folder / "b")), cache=str(folder / "cache"), seq=SEQ, heldout_fraction=0.3
    ),
  )  # fmt: skip
  assert train(config, str(folder / "run"), selftest=False, console=SilentConsole()) == 0
  return folder / "run"


def evaluate(capsys, run, *flags):
  assert main(["evaluate", f"--workdir={run}", "--json=-", *flags]) == 0
  return json.loads(capsys.readouterr().out)


def test_its_mean_is_the_loss_of_whole_windows(run, capsys):
  results = evaluate(capsys, run, "--by_position", "--heldout", "--batch=2")
  rows = results["by_position"]
  assert list(rows) == ["0 to 15", "16 to 23", "24 to 31"]
  a, b = (name for name in results["heldout"] if name != "total")
  for column, name in (("loss", "total"), (a, a), (b, b)):
    weighted = sum(row[column] * row["tokens"] for row in rows.values()) / sum(row["tokens"] for row in rows.values())
    assert weighted == pytest.approx(results["heldout"][name]["loss"], rel=1e-5)
  assert sum(row["tokens"] for row in rows.values()) == results["heldout"]["total"]["tokens"]


def test_it_is_given_beyond_the_length_of_the_run(run, capsys):
  results = evaluate(capsys, run, "--by_position", "--seq=128", "--sequences=3")
  assert list(results) == ["model", "by_position"] and results["model"]["seq"] == 128
  assert list(results["by_position"])[-2:] == ["64 to 95", "96 to 127"]
  assert results["by_position"]["96 to 127"]["tokens"] == 3 * 32


def test_fields_of_the_model_may_be_others(run, capsys):
  flags = ["--by_position", "--seq=128", "--sequences=4"]
  factor = "--config.model.attention.yarn.factor"
  plain, same, yarn = (
    evaluate(capsys, run, *flags, *more)["by_position"]
    for more in ([], [f"{factor}=1"], [f"{factor}=4", "--config.model.attention.yarn.original_seq=32"])
  )
  assert plain == same
  assert plain["96 to 127"]["loss"] != yarn["96 to 127"]["loss"]
  with pytest.raises(ConfigError, match=r"--config.model.embed: the model in .*/run has arrays of other shapes"):
    main(["evaluate", f"--workdir={run}", "--config.model.embed=32"])
  with pytest.raises(ConfigError, match=r"takes no --config.seed, only fields of the model"):
    main(["evaluate", f"--workdir={run}", "--config.seed=1"])


def test_buckets_are_two_an_octave():
  assert position_edges(2) == [0, 2] and position_edges(16) == [0, 16] and position_edges(20) == [0, 16, 20]
  assert position_edges(128) == [0, 16, 24, 32, 48, 64, 96, 128]
