"""The benchmarks as a user starts them, at a size that takes seconds: they end well and print what they promise."""

import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import jax
import pytest

from benchmarks import convert, experts
from deepseek_jax.kernels import tiles

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def text(tmp_path):
  """A folder of forty small text files."""
  rng = random.Random(0)
  (tmp_path / "text").mkdir()
  for i in range(40):
    words = " ".join(rng.choice(["def", "return", "x", "y", "+", "="]) for _ in range(200))
    (tmp_path / "text" / f"{i}.txt").write_text(f"{i} {words}")
  return tmp_path / "text"


def benchmark(name, *arguments, codes=(0,)):
  """(stdout, stderr) of `python -m benchmarks.<name>` on one device, which ends with one of `codes`."""
  env = dict(os.environ)
  env["XLA_FLAGS"] = " ".join(flag for flag in env["XLA_FLAGS"].split() if "device_count" not in flag)
  env.pop("NPROC", None)
  done = subprocess.run(
    [sys.executable, "-m", f"benchmarks.{name}", *arguments],
    cwd=ROOT, env=env, capture_output=True, text=True, timeout=200,
  )  # fmt: skip
  assert done.returncode in codes, done.stderr
  return done.stdout, done.stderr


def test_train_step():
  sizes = ("model.embed=32", "model.layers=1", "model.num_mtp_layers=0", "model.mlp=48", "data.seq=32")
  out, _ = benchmark("train_step", "--steps=1", *(f"--config.{size}" for size in (*sizes, "train.global_batch=2")))
  for words in (
    "config            tiny on 1 x cpu", "wall time/step", "CPU time/step", "tokens/s", "model FLOP/s", "matmul roof", "compile  ",
    "peak memory",
  ):  # fmt: skip
    assert words in out, words


def test_input(text, tmp_path):
  out, _ = benchmark("input", f"--source={text}", f"--cache={tmp_path}", "--seq=32", "--batch=4", "--steps=5")
  first, second = out.splitlines()
  assert first.startswith("windows of 32 tokens, batches of 4: ") and first.endswith(" million tokens per core-second")
  assert second.startswith("5 steps, 0.0 million tokens: ")


@pytest.mark.parametrize("argument", ["--steps=0", "--source=/no/such/folder"])
def test_input_says_what_is_wrong_in_one_line(argument):
  out, err = benchmark("input", argument, codes=(2,))
  assert out == "" and err.startswith("error: ") and err.count("\n") == 1


def test_byte_models(text, tmp_path):
  settings = (f"data.sources={text}", f"data.cache={tmp_path}", "data.seq=32", "data.heldout_fraction=0.3")
  out, _ = benchmark("byte_models", *(f"--config.{setting}" for setting in settings))
  counts, *models = out.splitlines()
  assert "held-out bytes after" in counts
  assert [line[:14].strip() for line in models] == ["gzip -9", "xz -9", "order-2 bytes", "order-3 bytes"]
  assert all(0 < float(line.split()[-4]) < 8 and line.endswith("bits per byte") for line in models)


def test_experts():
  sizes = ("model.embed=32", "model.layers=2", "model.mlp=48", "model.vocab=272", "model.moe.mlp=16", "data.seq=32")
  arguments = [f"--config.{size}" for size in (*sizes, "train.global_batch=2")]
  out, _ = benchmark("experts", "--steps=1", *arguments, codes=(0, 1))  # no time is to be relied on at this size
  assert [line.split()[0] for line in out.splitlines()] == ["experts", "8", "16", "32", "64"]


@pytest.mark.parametrize(
  ("wall", "cpu", "flops", "code"), [(1.5, 1.5, 1.2, 0), (1.7, 1, 1, 1), (1, 1.7, 1, 1), (1, 1, 1.4, 1)]
)
def test_experts_fails_where_more_of_them_cost_more(monkeypatch, capsys, wall, cpu, flops, code):
  def timed(config, steps):
    many = config.model.moe.num_routed_experts == 32
    times = (wall, cpu, flops) if many else (1, 1, 1)
    return {"wall": [times[0]], "cpu": [times[1]], "cost": {"flops": times[2]}}

  monkeypatch.setattr(experts, "time_steps", timed)
  assert experts.main(["experts", "--config.train.global_batch=4"]) == code
  assert capsys.readouterr().out.count("TOO MUCH") == code


def test_convert(tmp_path):
  out, _ = benchmark("convert", f"--folder={tmp_path}", "--vocab=512", "--embed=64", "--layers=2", "--experts=16")
  assert "to workdir" in out and "tensors are bitwise equal after the round trip" in out
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("peaks", "code"), [((2**29, 2**30), 0), ((2**31, 2**29), 1)])
def test_convert_fails_where_it_takes_too_much_memory(tmp_path, monkeypatch, capsys, peaks, code):
  peak = iter(peaks)
  monkeypatch.setattr(convert, "convert", lambda source, target: (1.0, shutil.copytree(source, target) and next(peak)))
  sizes = ("--vocab=512", "--embed=64", "--layers=2", "--experts=16")
  assert convert.main(["convert", f"--folder={tmp_path}", *sizes]) == code
  assert capsys.readouterr().out.count("TOO MUCH") == code


def test_ablations_go_on_where_they_were(text, tmp_path):
  sizes = (
    "model.embed=32", "model.layers=2", "model.mlp=48", "model.moe.mlp=16", "data.seq=32", "train.global_batch=2",
    f"data.sources={text}", f"data.cache={tmp_path}", "log.tensorboard=false", "sample.max_tokens=2",
  )  # fmt: skip
  arguments = (
    "--steps=2",
    "--seeds=1",
    "--variants=none",
    f"--workdir={tmp_path}/runs",
    f"--out={tmp_path}/curves.svg",
  )
  for expected in ("held-out loss", "finished already: step 2 of 2"):
    out, _ = benchmark("ablations", *arguments, *(f"--config.{size}" for size in sizes))
    assert expected in out and out.splitlines()[-1].startswith("| none | ")
  ElementTree.parse(tmp_path / "curves.svg")
  _, err = benchmark("ablations", "--steps=1", *arguments[1:], *(f"--config.{size}" for size in sizes), codes=(2,))
  assert "train.steps: 2 there, 1 now" in err and "another --workdir" in err
  _, err = benchmark("ablations", "--variants=mlp", codes=(2,))
  assert "among mla, gqa" in err


def test_fp8_matmul():
  out, _ = benchmark("fp8_matmul", "--small")
  head, columns, *rows = out.splitlines()
  assert head.startswith("cpu, jax ") and columns.split() == ["ours", "bf16", "torch", "goal", "floor", "error"]
  names = [
    "forward or dgrad",
    "grouped",
    "grouped wgrad",
    "wgrad",
    "quantize both",
    "SwiGLU both",
    "linear layer",
  ]
  assert len(rows) == len(names) and all(row.startswith(name) for row, name in zip(rows, names, strict=True))
  errors = [float(row.split()[-1]) for row in rows[:-1]]
  assert all(error < bound for error, bound in zip(errors, (2e-3, 2e-3, 1e-6, 1e-6, 1e-9, 1e-9), strict=True)), errors


def test_fp8_matmul_goes_on_after_a_row_that_fails():
  out, _ = benchmark("fp8_matmul", "--small", "--implementation=pallas", codes=(1,))
  rows = out.splitlines()[2:]
  assert len(rows) == 7 and all("failed: ValueError: " in row and "no Pallas kernel for cpu" in row for row in rows)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="kernels for GPUs need jax 0.11")
def test_tune_kernels_goes_on_where_it_was(tmp_path):
  table = tmp_path / "tiles.json"
  out, _ = benchmark("tune_kernels", "--small", f"--table={table}")
  assert "fp8_matmul bfloat16 1x128x128x128: Tiles(" in out
  (fields,) = json.loads(table.read_text())["fp8_matmul"]["cpu"].values()
  assert tiles.Tiles(**fields) in tiles.CANDIDATES["fp8_matmul"]
  assert benchmark("tune_kernels", "--small", f"--table={table}")[0] == ""
