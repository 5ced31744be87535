"""benchmarks/fp8_training.py and its controls: what they change, what they show, and that they resume."""

import json
import os
import signal
import subprocess
import sys
import time
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import fp8_controls, fp8_training
from deepseek_jax.kernels.fp8_linear import Recipe
from deepseek_jax.kernels.quantize import xla
from deepseek_jax.model import linear
from tests.benchmarks.programs import ROOT, benchmark

EXACT = Recipe(forward=False, dgrad=False, wgrad=False)
SIZES = (
  "model.embed=32", "model.layers=1", "model.first_dense_layers=0", "model.moe.mlp=16", "data.seq=32", "train.global_batch=2",
  "train.steps=6", "checkpoint.every=2",
)  # fmt: skip


@pytest.fixture
def outliers(monkeypatch):
  """Models of width 256 have outliers."""
  for name in ("fp8_linear", "fp8_ragged_linear"):
    monkeypatch.setattr(linear, name, getattr(linear, name))
  fp8_controls.add_outliers(256)


def gradients(grouped, x, weights, dys):
  """(products of x with each of `weights`, gradients of all): of groups of 24, 0 and 40 rows, or of one."""

  def products(x, *weights):
    if grouped:
      return linear.grouped_linear(EXACT, x, weights, jnp.array([24, 0, 40]), 8)
    return linear.linear(EXACT, "td,df->tf", x, *(w[0] for w in weights))

  ys, vjp = jax.vjp(products, x, *weights)
  return list(ys), vjp(type(ys)(dys))


@pytest.mark.parametrize("grouped", [False, True])
def test_outliers_leave_an_exact_product_and_its_gradients_as_they_are(grouped, request):
  draw = np.random.default_rng(0).standard_normal
  x, *weights = (jnp.asarray(draw(shape), jnp.float32) for shape in ((64, 256), (3, 256, 96), (3, 256, 64)))
  dys = [jnp.asarray(draw((64, w.shape[2])), jnp.float32) for w in weights]
  plain = gradients(grouped, x, weights, dys)
  request.getfixturevalue("outliers")
  jax.tree.map(np.testing.assert_array_equal, gradients(grouped, x, weights, dys), plain)


@pytest.mark.parametrize(("width", "factor"), [(256, 2.0**fp8_controls.EXPONENT), (128, 1)])
def test_only_what_is_as_wide_as_the_stream_has_outliers(width, factor):
  x, w, found = jnp.full((4, width), 0.3), jnp.full((width, 8), 0.3), []
  fp8_controls.with_outliers(lambda *operands: found.extend(operands), 256, x, w)
  channels = np.where(np.arange(width) < fp8_controls.NUM_OUTLIERS, factor, 1)
  assert (found[0] == x * channels).all() and (found[1] == w / channels[:, None]).all()


def test_one_scale_a_matrix():
  x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 130, 200)), jnp.float32)
  q, tiled = (quantize(x, (1, 128), False) for quantize in (fp8_controls.quantize_per_tensor, xla.quantize))
  assert q.values.shape == tiled.values.shape and q.scales.shape == tiled.scales.shape == (3, 130, 2)
  assert (q.scales == q.scales[:, :1, :1]).all() and (jnp.abs(q.values.astype(jnp.float32)).max((1, 2)) == 448).all()
  np.testing.assert_allclose(q.dequantize(), x, atol=0.04 * float(jnp.abs(x).max()), rtol=2**-4)


def test_outliers_cost_a_scale_a_matrix_more_than_a_scale_a_tile():
  found = fp8_controls.outlier_errors((0, fp8_controls.EXPONENT), rows=256)
  (_, tile), (_, tile_out) = found["a tile"]
  (_, matrix), (_, matrix_out) = found["a matrix"]
  assert max(tile, matrix) < 0.04 and tile_out < 0.1 < 0.25 < matrix_out


def test_errors_of_few_bits_grow_with_the_length_unless_promoted():
  assert fp8_controls.truncate(np.array([1 + 2**-14, -1 - 2**-14, 1 + 2**-13, 0]), 14).tolist() == [
    1, -1, 1 + 2**-13, 0,
  ]  # fmt: skip
  found = fp8_controls.accumulation_errors((128, 512, 4096), size=16)
  (_, first), *_, (_, last) = found["no promotion"]
  promoted = [error for _, error in found["promotion every 128"]]
  assert first == promoted[0] and last > 10 * first and max(promoted) < 2 * first
  assert all(
    error < 1e-6 for errors in fp8_controls.accumulation_errors((512,), bits=40).values() for _, error in errors
  )


def ended_run(workdir, losses, heldout):
  """What the report reads of a run."""
  workdir.mkdir(parents=True)
  events = [{"event": "eval", "loss": heldout}, {"event": "end", "reason": "finished"}]
  for name, lines in (("metrics", [{"loss": loss} for loss in losses]), ("events", events)):
    content = "".join(json.dumps({"step": i, **line}) + "\n" for i, line in enumerate(lines, 1))
    (workdir / f"{name}.jsonl").write_text(content)


@pytest.mark.parametrize(
  ("fp8", "per_tensor", "more", "code"),
  [
    (2.001, 2.1, (), 0), (2.01, 2.1, (), 1), (2.001, 2.001, (), 1), (2.001, None, (), 1),
    (2.001, None, ("--nocontrols",), 0), (2.01, None, ("--nocontrols",), 1),
  ],
)  # fmt: skip
def test_report(tmp_path, capsys, monkeypatch, fp8, per_tensor, more, code):
  monkeypatch.setattr(fp8_controls, "outlier_errors", lambda exponents: {"a tile": [(e, 0.1) for e in exponents]})
  for seed in range(2):
    ended_run(tmp_path / f"bf16-{seed}", [3.0] * 10 + [1.5] * 30, 2.0)
    ended_run(tmp_path / f"fp8-{seed}", [3.0] * 10 + [1.53] * 30, fp8 + (0.1 if seed else -0.1))
    ended_run(tmp_path / f"fp8-{seed}-frozen", [2.0], 2.002)
  if per_tensor:
    ended_run(tmp_path / "per-tensor-outliers-0", [3.0] * 10 + [1.6] * 30, per_tensor)
    ended_run(tmp_path / "per-tensor-outliers-0-frozen", [2.0], 2.5)
  arguments = ("--report", "--seeds=2", f"--workdir={tmp_path}", f"--out={tmp_path}/curves.svg", *more)
  assert fp8_training.main(["fp8_training", *arguments]) == code
  out, mean = capsys.readouterr().out, fp8 / 2 - 1
  gaps = f"{mean - 0.05:+.2%}, {mean + 0.05:+.2%}: {mean:+.2%} ± 5.00%"
  rest = "+0.10%, +0.10%: +0.10% ± 0.00% | +2.00%, +2.00%: +2.00% ± 0.00% |"
  assert f"| fp8 | {fp8 - 0.1:.4f}, {fp8 + 0.1:.4f} | {gaps} | {rest}" in out
  assert not per_tensor or f"| {per_tensor:.4f} | {per_tensor / 2 - 1:+.2%} | +25.00% | +6.67% |" in out
  assert out.startswith("10,2") and "| k | 512 |" in out and "| a tile | 0.1 |" in out  # 10 million parameters
  ElementTree.parse(tmp_path / "curves.svg")


def test_controls_train(text, tmp_path):
  settings = (
    *SIZES, "train.steps=1", "model.precision=fp8", "eval.final_sequences=2", "sample.max_tokens=0", "log.tensorboard=false",
    f"data.sources={text}", f"data.cache={tmp_path}",
  )  # fmt: skip
  arguments = ("--config=benchmarks/fp8_training.py", f"--workdir={tmp_path}/run", "--outliers", "--per_tensor")
  out, _ = benchmark("fp8_controls", *arguments, *(f"--config.{setting}" for setting in settings))
  assert "step 1: held-out loss" in out


@pytest.mark.chaos
def test_killed_and_started_again_it_gives_the_same(text, tmp_path):
  settings = (f"data.sources={text}", f"data.cache={tmp_path}", *SIZES)
  arguments = ("--seeds=1", *(f"--config.{setting}" for setting in settings))
  whole, _ = benchmark("fp8_training", f"--workdir={tmp_path}/whole", *arguments, codes=(0, 1))
  command = [sys.executable, "-m", "benchmarks.fp8_training", f"--workdir={tmp_path}/killed", *arguments]
  env = {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=4", "device_count=1")}
  killed = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, stdout=subprocess.DEVNULL)
  try:
    until = time.monotonic() + 150
    while not (tmp_path / "killed/fp8-0/checkpoints/2").exists() and time.monotonic() < until:
      time.sleep(0.02)
  finally:
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
  assert not fp8_training.read_run(tmp_path / "killed/fp8-0")
  again, _ = benchmark("fp8_training", f"--workdir={tmp_path}/killed", *arguments, codes=(0, 1))
  assert "resume   from the checkpoint of step" in again
  assert again.partition("parameters in FP8 GEMMs")[2] == whole.partition("parameters in FP8 GEMMs")[2] != ""
