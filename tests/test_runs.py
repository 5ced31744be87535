"""Runs in Python: trained, interrupted, opened again; what they give."""

import dataclasses
import os
import signal

import numpy as np
import pytest

import deepseek_jax
from deepseek_jax.checkpoint.hf_files import HFReader
from deepseek_jax.config import Config
from deepseek_jax.config_sections import CheckpointConfig, DataConfig, EvalConfig, SampleConfig, TrainConfig
from deepseek_jax.console import SilentConsole
from deepseek_jax.errors import CheckpointError, ConfigError, DataError
from deepseek_jax.runs import Run
from deepseek_jax.storage import ObjectStore
from tests.compare.records import write_run
from tests.configs import DENSE, write_texts

pytestmark = pytest.mark.jax_version


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  folder = tmp_path_factory.mktemp("texts")
  write_texts(folder / "texts", files=6, words=40)
  return Config(
    name="small",
    model=dataclasses.replace(DENSE, vocab=264, layers=1),
    data=DataConfig(sources=(str(folder / "texts"),), cache=str(folder / "cache"), seq=32, heldout_fraction=0.3),
    train=TrainConfig(steps=4, global_batch=4),
    eval=EvalConfig(every=2, sequences=4, final_sequences=4),
    checkpoint=CheckpointConfig(every=100),
    sample=SampleConfig(max_tokens=3),
  )  # fmt: skip


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run")
  return deepseek_jax.run(config, workdir, {"log.every": 1, "schedule.peak": 0.01}, console=SilentConsole())


def test_a_run_gives_its_metrics_as_columns(trained):
  metrics = trained.metrics
  assert metrics["step"].tolist() == [1, 2, 3, 4] and len(metrics["loss"]) == 4
  assert np.isfinite(metrics["loss"]).all() and metrics["loss"][-1] < metrics["loss"][0]
  # The evaluation at step 2 counts in the interval of the line after it.
  assert set(trained.evaluations) == {"step", "loss", "bits_per_byte", "sequences"}
  assert trained.evaluations["step"].tolist() == [2, 4]
  assert (
    repr(trained)
    == f"<Run small in {trained.workdir}: finished at step 4, {trained.evaluations['bits_per_byte'][-1]:.4f} held-out bits per byte>"
  )
  assert trained.config.schedule.peak == 0.01
  assert 0 < trained.goodput.fraction < 1 and trained.goodput.seconds["compile"] > 0 and trained.goodput.starts == 1


def test_a_run_whose_last_evaluation_is_not_finite_has_a_repr(tmp_path):
  run = Run(write_run(tmp_path / "a", evals=()))
  with open(tmp_path / "a" / "events.jsonl", "a") as file:
    file.write('{"event": "eval", "step": 40, "loss": null, "bits_per_byte": null, "sequences": 4}\n')
  assert repr(run) == f"<Run tiny in {run.workdir}: finished at step 40>"
  assert np.isnan(run.evaluations["loss"]).tolist() == [True]


def test_a_run_in_a_bucket_is_only_read(tmp_path, buckets):
  for file in write_run(tmp_path / "a").iterdir():
    ObjectStore("s3://bucket-a/a").write(file.name, file.read_bytes())
  buckets.fail(403, "(PUT|POST)")
  run = deepseek_jax.load("s3://bucket-a/a")
  assert repr(run) == "<Run tiny in s3://bucket-a/a: finished at step 40, 4.0000 held-out bits per byte>"
  assert run.metrics["step"][-1] == run.config.train.steps == 40


def test_a_run_has_a_report_that_notebooks_show(trained):
  page = trained.report()
  assert os.fspath(page) == os.path.join(trained.workdir, "report.html")
  assert page._repr_html_().startswith('<iframe srcdoc="&lt;!doctype html&gt;')


def test_the_model_of_a_run_is_that_of_its_newest_checkpoint(trained, tmp_path):
  model = deepseek_jax.load(trained.workdir).model
  assert (model.step, model.source) == (4, trained.workdir)
  assert repr(model).startswith("<Model of small, step 4: 1 layers, width 32, ") and "float32" in repr(model)
  tokens = np.arange(12).reshape(2, 6)
  logits = model.logits(tokens)
  model.save_pretrained(tmp_path / "hf")
  assert {HFReader(tmp_path / "hf").dtype(name) for name in HFReader(tmp_path / "hf").names} == {np.dtype(np.float32)}
  again = deepseek_jax.load_pretrained(tmp_path / "hf")
  np.testing.assert_allclose(again.logits(tokens), logits, atol=1e-5)
  # Greedy decoding is the argmax of the logits, from bos on.
  text = model.sample("def", max_tokens=1, temperature=0)
  best = int(np.argmax(model.logits([[256, *b"def"]])[0, -1, :257]))
  assert text == (chr(best) if 32 <= best < 127 or best in b"\n\t" else "" if best == 256 else "\ufffd")
  assert trained.sample("def", max_tokens=1, temperature=0) == text
  assert again.sample("def", tokenizer="byte", max_tokens=1, temperature=0) == text
  with pytest.raises(DataError, match="came without a tokenizer"):
    again.sample("def")
  with pytest.raises(ConfigError, match="sample.*has no temprature; it takes prompt, max_tokens"):
    model.sample("def", temprature=0)


def test_a_run_that_goes_on_has_the_newer_model(config, tmp_path):
  first = deepseek_jax.run(config, tmp_path, {"train.steps": 1}, console=SilentConsole())
  assert first.model.step == 1
  second = deepseek_jax.run(config, tmp_path, {"train.steps": 2}, console=SilentConsole())
  assert (first.model.step, second.model.step) == (2, 2) and second.metrics["step"].tolist() == [1, 2]


class Interrupts:
  """A writer that interrupts the process at the first line, as the stop button of a notebook does."""

  def __init__(self, folder, step):
    pass

  def write(self, step, values, histograms):
    if step == 1:  # a second one would end the run at once
      os.kill(os.getpid(), signal.SIGINT)

  def event(self, name, step, **values):
    pass

  def close(self):
    pass


def test_an_interrupt_saves_and_is_raised(config, tmp_path):
  overrides = {"train.steps": 1000, "log.every": 1}
  with pytest.raises(KeyboardInterrupt):
    deepseek_jax.run(config, tmp_path, overrides, console=SilentConsole(), writers=[Interrupts])
  run = deepseek_jax.load(tmp_path)
  assert 1 <= run.model.step < 1000 and f"SIGINT at step {run.model.step:,}" in repr(run)


def test_configs_are_names_files_or_objects(config, tmp_path):
  from deepseek_jax.runs import with_overrides

  assert with_overrides("tiny", {"model.layers": 6}).model.layers == 6
  assert with_overrides(config, {}) == config
  assert with_overrides(config, {"model.layers": "3"}).model.layers == 3
  with pytest.raises(ConfigError, match="did you mean 'model.layers'"):
    with_overrides(config, {"model.layres": 3})
  # It would replace the section, with the defaults of its other fields.
  with pytest.raises(ConfigError, match=r"^train is a section: set its fields by their paths, as train\.steps$"):
    with_overrides("tiny", {"train": {"steps": 5}})


def test_what_is_no_run_is_told_what_to_do(tmp_path):
  with pytest.raises(CheckpointError, match="holds no run: expected its config.json"):
    deepseek_jax.load(tmp_path)
  (tmp_path / "config.json").write_text('{"model_type": "llama"}')
  with pytest.raises(CheckpointError, match=r"deepseek_jax.load_pretrained\('"):
    deepseek_jax.load(tmp_path)
