import json

import numpy as np
import pytest

from deepseek_jax.compare.runs import read_compared_run
from deepseek_jax.errors import DataError
from tests.compare.records import FLOPS_PER_TOKEN, TOKENS_PER_STEP, write_run


def read(folder):
  return read_compared_run(str(folder), "a")


def test_the_final_numbers_are_those_of_the_files(tmp_path):
  run = read(write_run(tmp_path / "a", {"seed": 7}, final=4.0, skipped=lambda step: step // 20))
  n = run.numbers
  assert (run.seed, n.bits_per_byte, n.evaluated_step, n.best_bits_per_byte, n.best_step) == (7, 4.0, 40, 4.0, 40)
  np.testing.assert_allclose([n.loss, n.train_loss], [4.0 * np.log(2), 4.025 * np.log(2)])
  assert (n.steps, n.tokens, n.flops) == (40, 40 * TOKENS_PER_STEP, 40 * TOKENS_PER_STEP * FLOPS_PER_TOKEN)
  assert (n.seconds, n.tokens_per_second, n.parameters, n.skipped) == (30.0, 1000.0, 1234, 2)  # 0.75 s a step
  assert (n.devices, n.end) == ("1 x cpu", "finished")


@pytest.mark.parametrize(
  ("axis", "last"),
  [("steps", 40), ("tokens", 40 * TOKENS_PER_STEP), ("flops", 40 * TOKENS_PER_STEP * 1e6), ("seconds", 30.0)],
)
def test_curves_are_over_any_axis(tmp_path, axis, last):
  run = read(write_run(tmp_path / "a"))
  curve, heldout = run.curve("bits_per_byte", axis), run.heldout_curve("bits_per_byte", axis)
  np.testing.assert_allclose(curve.x, np.arange(1, 41) * last / 40)
  np.testing.assert_allclose(curve.y, 4 + 1 / np.arange(1, 41))
  np.testing.assert_allclose(heldout.x, [last / 2, last])
  np.testing.assert_allclose(heldout.y, [4.5, 4.0])


@pytest.mark.parametrize(("axis", "of_a_step"), [("steps", 1), ("tokens", TOKENS_PER_STEP), ("seconds", 0.75)])
def test_evaluations_between_logged_steps_have_their_own_places(tmp_path, axis, of_a_step):
  folder = write_run(tmp_path / "a", evals=(5, 15))
  lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
  # Every tenth step is logged; its seconds are those of the ten before it.
  every_tenth = [line.replace("0.5,", "5.0,").replace("0.25,", "2.5,") for line in lines[9::10]]
  (folder / "metrics.jsonl").write_text("".join(every_tenth))
  np.testing.assert_allclose(read(folder).heldout_curve("loss", axis).x, np.array([5, 15]) * of_a_step)


def test_flops_are_those_of_the_plan(tmp_path):
  """A run's own FLOP/s are its tokens/s times the FLOPs per token of the plan: nothing has to be counted again."""
  from deepseek_jax.flags import load_config
  from deepseek_jax.mesh import make_mesh
  from deepseek_jax.plan.flops import training_flops
  from deepseek_jax.training.timing import device_metrics

  config = load_config("tiny_dense", {"mesh.data": -1})
  flops = training_flops(config.model, config.data.seq).causal
  logged = device_metrics(make_mesh(config.mesh), 1000.0 * flops)["model_flops_per_second"]
  run = read(write_run(tmp_path / "a", config="tiny_dense", model_flops_per_second=lambda step: logged))
  np.testing.assert_allclose(run.numbers.flops, run.numbers.tokens * flops, rtol=1e-12)


def test_a_run_that_goes_on_has_what_it_has(tmp_path):
  folder = write_run(tmp_path / "a", end=None, evals=())
  with open(folder / "metrics.jsonl", "a") as file:
    file.write('{"step": 41, "lo')
  n = read(folder).numbers
  assert (n.bits_per_byte, n.loss, n.evaluated_step, n.best_step, n.end, n.steps) == (None, None, None, None, None, 40)
  (folder / "metrics.jsonl").unlink()
  (folder / "events.jsonl").unlink()
  run = read(folder)
  assert run.numbers.steps == 0 and run.numbers.tokens is None and len(run.curve("loss", "tokens")) == 0


def test_values_that_are_not_finite_are_no_points_and_no_results(tmp_path):
  folder = write_run(tmp_path / "a", loss=lambda step: float("nan") if step > 20 else 1.0, evals=())
  with open(folder / "events.jsonl", "a") as file:
    file.write(json.dumps({"event": "eval", "step": 20, "loss": 2.0, "bits_per_byte": 3.0}) + "\n")
    file.write(json.dumps({"event": "eval", "step": 40, "loss": None, "bits_per_byte": None}) + "\n")
  run = read(folder)
  assert len(run.curve("loss", "steps")) == 20 and len(run.heldout_curve("loss", "steps")) == 1
  assert (run.numbers.bits_per_byte, run.numbers.evaluated_step, run.numbers.best_step) == (None, 40, 20)
  assert run.numbers.train_loss is None


def test_a_damaged_run_is_an_error(tmp_path):
  folder = write_run(tmp_path / "a")
  (folder / "metrics.jsonl").write_text("[1]\n")
  with pytest.raises(DataError, match=r"metrics\.jsonl, line 1"):
    read(folder)
