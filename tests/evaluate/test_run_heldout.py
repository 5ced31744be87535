"""The held-out split of a run, against what the run itself wrote, through the program."""

import dataclasses
import json
import pathlib

import pytest

from deepseek_jax.checkpoint.load import open_saved_model
from deepseek_jax.config import Config
from deepseek_jax.config_sections import DataConfig, EvalConfig, MeshConfig, SampleConfig, TrainConfig
from deepseek_jax.console import SilentConsole
from deepseek_jax.data.pipeline import open_data
from deepseek_jax.errors import DataError
from deepseek_jax.evaluate.results import TextResult
from deepseek_jax.evaluate.run_heldout import evaluate_run_heldout
from deepseek_jax.train import train
from tests.configs import DENSE, write_texts

SEQ, FINAL = 32, 20


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """(its folder, its config) of a run of two steps on two sources."""
  folder = tmp_path_factory.mktemp("run_heldout")
  write_texts(folder / "a", 20, 40)
  write_texts(folder / "b", 30, 25)
  model = dataclasses.replace(DENSE, vocab=264, embed=16, layers=1, mlp=24)
  config = Config(
    model=model, mesh=MeshConfig(data=1, fsdp=4), train=TrainConfig(steps=2, global_batch=8), sample=SampleConfig(max_tokens=0),
    data=DataConfig(sources=(str(folder / "a"), str(folder / "b")), cache=str(folder / "cache"), seq=SEQ, heldout_fraction=0.3),
    eval=EvalConfig(final_sequences=FINAL),
  )  # fmt: skip
  assert train(config, str(folder / "run"), selftest=False, console=SilentConsole()) == 0
  return folder / "run", config


def files(folder):
  return {path: path.stat().st_mtime_ns for path in pathlib.Path(folder).rglob("*")}


def evaluate(run, devices=1, sequences=None, tokenizer=None):
  saved = open_saved_model(run[0])
  return evaluate_run_heldout(saved, saved.load(devices), saved.load_tokenizer(tokenizer), tokenizer, 8, sequences)


@pytest.mark.parametrize("devices", [1, 2])
def test_the_total_is_the_final_evaluation_of_the_run(run, devices, capsys):
  folder, before = run[0], files(run[0])
  results = evaluate(run, devices)
  total = TextResult.total(results.values()).as_dict("windows")
  events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
  (final,) = [event for event in events if event["event"] == "eval"]
  assert final["sequences"] == total["windows"] == FINAL
  assert total["loss"] == pytest.approx(final["loss"], rel=1e-6)
  assert total["bits_per_byte"] == pytest.approx(final["bits_per_byte"], rel=1e-6)
  assert files(folder) == before
  assert "note" not in capsys.readouterr().err


def test_sources_add_up(run):
  config = run[1]
  results = evaluate(run, sequences=0)
  data = open_data(config.data, config.model.vocab, config.seed)
  assert list(results) == list(config.data.sources) == [name for name, _ in data.heldout_windows]
  for name, windows in data.heldout_windows:
    assert results[name].items == len(windows) > 0 and results[name].tokens == SEQ * len(windows)
    assert results[name].bytes == data.heldout.target_bytes(windows).sum()
  assert sum(result.items for result in results.values()) == len(data.heldout) > FINAL
  assert len({round(result.loss_sum / result.tokens, 6) for result in results.values()}) == 2


def test_text_that_has_changed_is_noted(run, capsys):
  more = pathlib.Path(run[1].data.sources[0]) / "more.txt"
  more.write_text("one more document of the training text")
  try:
    evaluate(run)
  finally:
    more.unlink()
  assert "note     the text of data.sources is not what the checkpoint saw" in capsys.readouterr().err


def test_text_that_is_gone_is_named(run):
  source = pathlib.Path(run[1].data.sources[1])
  source.rename(source.with_name("moved"))
  try:
    with pytest.raises(DataError, match="there is no .*/b"):
      evaluate(run)
  finally:
    source.with_name("moved").rename(source)
