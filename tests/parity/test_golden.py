"""Every architecture against what transformers computed: golden/ is from make_golden.py; no torch is needed here."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import deepseek_jax
from deepseek_jax.checkpoint.__main__ import main as checkpoint_main
from deepseek_jax.checkpoint.convert import convert
from tests.end_to_end.test_run import call
from tests.parity import ours
from tests.parity.cases import CASES
from tests.parity.digest import errors
from tests.parity.weights import write_folder

GOLDEN = pathlib.Path(__file__).parent / "golden"
# What a few cases prove runs for them in `make test`, and for all in `make parity`. Gradients are those of the forward
# pass, and that is compared in every case. Float64 shows that the mathematics is the same, float32 how far roundings
# go.
ARCHITECTURES, ROUNDED = ("dense_gqa", "moe_v1", "v2", "v3_mtp"), ("dense_gqa", "v3_mtp")


def quick(names):
  return [name if name in names else pytest.param(name, marks=pytest.mark.parity) for name in CASES]


@pytest.fixture(scope="module", params=CASES)
def made(request, tmp_path_factory):
  """(case, its folder, the tensors in it as float32, what transformers computed)."""
  folder = tmp_path_factory.mktemp(request.param)
  tensors = write_folder(folder, CASES[request.param])
  with np.load(GOLDEN / f"{request.param}.npz") as file:
    return CASES[request.param], folder, tensors, dict(file)


def compare(made, scratch, dtype):
  case, folder, _, golden = made
  found = errors(golden, ours.compute(folder, case, dtype, scratch), case.mtp_weight)
  assert {what: error for what, error in found.items() if not error <= ours.LIMITS[dtype][what]} == {}


@pytest.mark.parametrize("made", sorted(CASES.keys() - set(ARCHITECTURES)), indirect=True)
def test_logits_and_routing(made):
  compare(made, None, "float64")


@pytest.mark.parametrize("made", quick(ARCHITECTURES), indirect=True)
def test_outputs_and_gradients(made, tmp_path):
  compare(made, tmp_path, "float64")


@pytest.mark.parametrize("made", quick(ROUNDED), indirect=True)
def test_outputs_in_float32(made, tmp_path):
  compare(made, tmp_path, "float32")


def test_saved_again_bit_for_bit(made, tmp_path):
  case, folder, tensors, _ = made
  deepseek_jax.load_pretrained(folder).save_pretrained(tmp_path)
  ours.assert_same_tensors(tmp_path, tensors)
  config = json.loads((tmp_path / "config.json").read_text())
  expected = {name: value for name, value in case.config.items() if name != "quantization_config"}
  assert {name: config.get(name) for name in expected} == expected and "quantization_config" not in config


def test_through_our_checkpoint_bit_for_bit(made, tmp_path):
  case, folder, tensors, _ = made
  convert(folder, tmp_path / "ours")
  convert(tmp_path / "ours", tmp_path / "back")
  ours.assert_same_tensors(tmp_path / "back", tensors)
  assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())


def test_command_that_converts(tmp_path):
  folder = tmp_path / "folder"
  folder.mkdir()
  tensors = write_folder(folder, CASES["v3_first3"])
  command = [sys.executable, "-m", "deepseek_jax.checkpoint", "convert"]
  subprocess.run([*command, f"--from={tmp_path}/folder", f"--to={tmp_path}/ours"], check=True)
  call(checkpoint_main, "convert", f"--from={tmp_path}/ours", f"--to={tmp_path}/back")
  ours.assert_same_tensors(tmp_path / "back", tensors)
