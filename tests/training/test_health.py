"""What is planted is named with its evidence and its field; what is healthy is not."""

import dataclasses
import pathlib
import re

import numpy as np
import pytest

from deepseek_jax import train
from deepseek_jax.config import Config
from deepseek_jax.console import SilentConsole
from deepseek_jax.flags import load_config
from deepseek_jax.schema import leaf_paths
from deepseek_jax.training import health
from deepseek_jax.training.expert_loads import ExpertLoads, encode
from deepseek_jax.training.health import find, loss_spikes
from deepseek_jax.training.run_records import Column, RunRecords, read_run
from tests.configs import RUN, write_texts

N = 2000
STEPS = np.arange(1, N + 1)
LAYERS = [f"layer_{i}" for i in range(6)]


def healthy():
  """{metric: values} of a run of N steps."""
  rng = np.random.default_rng(0)
  values = {
    "loss": 2 + 3 / (1 + STEPS / 100) + 0.03 * rng.standard_normal(N), "grad_norm": rng.lognormal(-0.5, 0.3, N),
    "tokens_per_second": 4000 * rng.lognormal(0, 0.1, N), "skipped": np.zeros(N), "overflow": np.zeros(N),
    "data_seconds": np.full(N, 1e-4), "step_seconds": np.full(N, 2.0),
  }  # fmt: skip
  for depth, layer in enumerate(LAYERS):
    noise = rng.lognormal(0, 0.05, (2, N))
    values[f"rms/{layer}/activations"] = (0.1 + 0.1 * depth) * (1 + STEPS / 100) * noise[0]
    values[f"rms/{layer}/gradients"] = 1e-3 * 0.7**depth / (1 + STEPS / 500) * noise[1]
    values[f"router/{layer}/max_vio"] = 0.3 + 2 / (1 + STEPS / 50) * noise[0]
  return values


def make_loads():
  rng = np.random.default_rng(0)
  codes = {layer: np.stack([encode(rng.dirichlet(np.full(8, 20.0))) for _ in range(64)]) for layer in LAYERS}
  return ExpertLoads(32, np.arange(64) * 32 + 1, codes)


def make_records(values, events=()):
  balance = {"bias_update_rate": 0.001, "expert_loss": 0.0}
  config = {
    "model": {"init_std": 0.02, "compute_dtype": "bfloat16", "moe": {"num_routed_experts": 8, "num_experts_per_token": 2}},
    "balance": balance, "optimizer": {"clip": 1.0}, "schedule": {"peak": 0.02},
  }  # fmt: skip
  columns = {name: Column(STEPS, np.asarray(v, np.float64)) for name, v in values.items()}
  return RunRecords(config, STEPS, columns, list(events))


def plant(name, *, at=slice(None), to=None, times=1.0):
  def change(values):
    values[name][at] = values[name][at] * times if to is None else to

  return change


def test_a_healthy_run_has_nothing_to_note():
  assert find(make_records(healthy()), make_loads()) == []


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 16, 17, 40, 65])
def test_a_short_run_is_judged_without_a_false_alarm(rows):
  records = make_records({name: values[:rows] for name, values in healthy().items()})
  columns = {name: Column(STEPS[:rows], c.values) for name, c in records.columns.items()}
  assert find(dataclasses.replace(records, steps=STEPS[:rows], columns=columns), None) == []


def test_a_run_without_any_metric_has_nothing_to_note():
  assert find(RunRecords({}, np.zeros(0, np.int64), {}, []), None) == []


# (change of the values, title, words of the evidence, field of the advice)
PLANTED = [
  (plant("loss", at=1200, to=9.5), "Loss spikes", ["1 in all", "9.5 at step 1,201", "median before: 2.2"], "optimizer.clip (now 1.0)"),
  (plant("loss", at=slice(1500, None), times=1.6), "The loss diverged", ["steps 1,201 to 1,400" , "steps 1,801 to 2,000"], "schedule.peak (now 0.02)"),
  (plant("loss", at=[70, 71, 900], to=np.nan), "Values that are not finite", ["loss at steps 71, 72, 901", "first is loss at step 71"], "model.compute_dtype (now bfloat16)"),
  (plant("grad_norm", at=777, to=500.0), "Gradient norm far above its running median", ["500 at step 778"], "optimizer.clip"),
  (plant("skipped", at=slice(300, None), to=2), "Skipped updates", ["2 in all", "at step 301"], "schedule.peak"),
  (plant("tokens_per_second", at=slice(1000, 1200), times=0.3), "Throughput drops", ["at steps 1,", "stretches are slow", "data take 0%"], "data.cache"),
  (plant("rms/layer_3/activations", times=300.0), "The initialisation is too large", ["layer 3: 1"], "model.init_std (now 0.02)"),
  (plant("rms/layer_3/activations", times=40.0), "Activations grow over depth", ["in layer 3", "in layer 4"], "model.init_std"),
  (plant("rms/layer_2/activations", times=0.01), "Activations vanish over depth", ["in layer 2"], "model.init_std"),
  (plant("rms/layer_5/activations", at=slice(1000, None), times=0.0003), "Activations vanish over time", ["layer 5: 0.00"], "optimizer.weight_decay"),
  (plant("rms/layer_0/gradients", at=slice(1000, None), times=900.0), "Gradients grow over time", ["layer 0: "], "schedule.peak"),
  (plant("rms/layer_0/gradients", times=1e-5), "Gradients vanish towards the first layers", ["layer 0: ", "layer 1,"], "model.init_std"),
  (plant("rms/layer_5/gradients", times=1e-4), "Gradients grow towards the first layers", ["in layer 0", "layer 5: "], "model.init_std"),
  (plant("router/layer_4/max_vio", to=2.8), "Experts stay unbalanced", ["layer 4: 2.8", "1.5"], "balance.bias_update_rate (now 0.001)"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "title", "words", "field"), PLANTED, ids=[case[1] for case in PLANTED])
def test_what_is_planted_is_named(change, title, words, field):
  values = healthy()
  change(values)
  found = {finding.title: finding for finding in find(make_records(values), make_loads())}
  assert title in found, found
  assert [word for word in words if word not in found[title].evidence] == [], found[title].evidence
  assert field in found[title].advice, found[title].advice


def test_a_slow_minute_is_not_a_slow_second():
  values = healthy()
  plant("tokens_per_second", at=slice(1000, 1200), times=0.3)(values)
  values["step_seconds"][:] = 0.5  # 50 logged steps in a stretch
  assert find(make_records(values), None) == []


def test_values_that_are_not_finite_hide_no_other_finding_and_make_none():
  values = healthy()
  plant("tokens_per_second", at=slice(1000, 1200), times=0.3)(values)
  values["tokens_per_second"][5] = np.nan
  plant("rms/layer_5/activations", to=np.nan)(values)
  titles = [finding.title for finding in find(make_records(values), None)]
  assert titles == ["Values that are not finite", "The initialisation is too large", "Throughput drops"]


def test_the_process_that_held_the_others_up_is_named():
  values = healthy() | {"host_seconds_max": np.full(N, 0.4), "host_seconds_median": np.full(N, 0.02)}
  records = make_records(values | {"slowest_process": np.full(N, 5.0)})
  assert find(records, None) == []
  slow = Column(STEPS[100:104], np.array([5.0, 5.0, 7.0, 5.0]))
  (finding,) = find(dataclasses.replace(records, columns={**records.columns, "straggler": slow}), None)
  assert finding.title == "A process holds the others up" and "data.cache" in finding.advice
  assert finding.evidence == (
    "Process 5, logged at steps 101, 102, 104: 0.4 s of its own in a step, 0.02 s in the median of all; 1 other processes "
    "at other steps."
  )


def test_overflow_is_told_from_gradients_that_are_not_finite():
  values = healthy()
  values["skipped"][300:], values["overflow"][300] = 1, 55
  (finding,) = find(make_records(values), None)
  assert "model.moe.buffer_factor" in finding.advice and "at step 301" in finding.advice


def test_an_imbalance_that_biases_had_no_time_to_mend_is_none():
  values = healthy()
  plant("router/layer_4/max_vio", to=2.8)(values)
  records = make_records(values)
  slow = records.config | {"balance": {"bias_update_rate": 0.0001}}
  assert find(dataclasses.replace(records, config=slow), None) == []


def test_dead_experts_are_named_with_their_layers():
  loads = make_loads()
  loads.codes["layer_2"][40:, [1, 5]] = 0
  loads.codes["layer_3"][-3:, 0] = 0  # for three records of the last sixteen: by chance
  (finding,) = find(make_records(healthy()), loads)
  assert finding.title == "Dead experts" and "Experts in layer 2: 1, 5 of 8" in finding.evidence
  assert "2 got no token in any record from step 1,537 on" in finding.evidence
  assert "balance.expert_loss (now 0.0)" in finding.advice


def test_an_end_by_divergence_is_named():
  events = [{"event": "end", "step": 2000, "reason": "diverged"}]
  (finding,) = find(make_records(healthy(), events), None)
  assert finding.title == "The run diverged" and "step 2,000" in finding.evidence


def test_spikes_that_the_chart_marks_are_those_that_are_named():
  values = healthy()
  for step, height in ((500, 4.0), (505, 6.0), (1700, 3.5)):
    values["loss"][step - 1] = height
  assert STEPS[loss_spikes(Column(STEPS, values["loss"]))].tolist() == [505, 1700]


def test_every_field_that_is_advised_exists():
  fields = set(re.findall(r"field\([\"']([\w.]+)[\"']\)", pathlib.Path(health.__file__).read_text()))
  assert len(fields) > 10 and fields <= set(leaf_paths(Config))


def test_a_broken_initialisation_is_named_in_a_real_run(tmp_path):
  """Thirty times the std of a healthy one, whose run is in tests/end_to_end/test_run.py."""
  write_texts(tmp_path / "text", files=20, words=200)
  text = RUN.format(source=str(tmp_path / "text"), cache=str(tmp_path / "cache"), steps=5)
  (tmp_path / "config.py").write_text(text)
  overrides = {"model.init_std": "3.0", "model.num_mtp_layers": "0", "model.first_dense_layers": "3",
               "train.steps": "3",
    "eval.final_sequences": "4", "sample.max_tokens": "0", "mesh.data": "4"}  # fmt: skip
  config = load_config(str(tmp_path / "config.py"), overrides)
  assert train.train(config, str(tmp_path / "run"), selftest=False, console=SilentConsole()) == 0
  found = {f.title: f for f in find(read_run(tmp_path / "run"), None)}
  assert "model.init_std (now 3.0)" in found["The initialisation is too large"].advice
  assert "The initialisation is too large" in (tmp_path / "run" / "report.html").read_text()
