"""Pallas kernels run in its interpreters, with the race detector on; all but the QUICK cases in `make kernels` alone."""

import pathlib

import jax
import pytest

# Cases of Pallas kernels that run in `make test`, a few seconds each, and so in every change.
QUICK = (
  "test_both_are_the_matrix_and_its_transpose_in_tiles_along_their_rows[bfloat16-pallas_gpu]",
  "test_swiglu_is_rounded_once[bfloat16-False-pallas_gpu]",
  "test_every_scale_is_used_where_it_belongs[False-pallas_gpu]",
  "test_every_scale_is_used_where_it_belongs[True-pallas_gpu]",
  "test_rows_times_the_matrix_of_their_group[several-pallas_gpu-128]",
  "test_the_contraction_of_each_group[several-pallas_gpu-128]",
  "test_both_are_the_matrix_and_its_transpose_in_tiles_along_their_rows[bfloat16-pallas_tpu]",
  "test_tiles_are_rounded_as_numpy_rounds_them[(2, 129, 127)-True-weights-pallas_tpu]",
  "test_swiglu_is_rounded_once[bfloat16-False-pallas_tpu]",
  "test_product_of_the_same_operands[128-True-pallas_tpu]",
  "test_every_scale_is_used_where_it_belongs[False-pallas_tpu]",
  "test_rows_times_the_matrix_of_their_group[empty groups-pallas_tpu-128]",
  "test_the_contraction_of_each_group[empty groups-pallas_tpu-128]",
  "test_value_and_gradients_by_group[pallas_tpu-32]",
  "test_a_shape_that_kernels_for_tpus_do_not_do_is_refused",
)


def pytest_collection_modifyitems(config, items):
  here = [item for item in items if item.path.parent == pathlib.Path(__file__).parent]
  functions = {item.originalname for item in here}
  gone = [
    name for name in QUICK if name.partition("[")[0] in functions and not any(i.name.startswith(name) for i in here)
  ]
  if gone and not any("::" in argument for argument in config.args):  # else a case was asked for by name
    raise pytest.UsageError(f"QUICK names cases that are not there: {', '.join(gone)}")
  for item in here:
    if _implementation(item).startswith("pallas_") and not item.name.startswith(QUICK):
      item.add_marker(pytest.mark.kernels)


def _implementation(item):
  return str(item.callspec.params.get("implementation", "")) if hasattr(item, "callspec") else ""


@pytest.fixture(autouse=True)
def interpreted(request):
  """Interprets the kernels of a test whose `implementation` is a Pallas one."""
  if (name := _implementation(request.node)).startswith("pallas_"):
    request.getfixturevalue({"pallas_gpu": "on_gpu", "pallas_tpu": "on_tpu"}[name])


@pytest.fixture
def on_gpu(capsys):
  """Kernels for GPUs run on CPU, every thread, barrier and copy of them; a race between them is an error."""
  if jax.__version_info__ < (0, 11):
    pytest.skip(f"kernels for GPUs are interpreted by jax 0.11 and newer, and this is {jax.__version__}")
  from jax.experimental.pallas import mosaic_gpu as plgpu

  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
    yield
  no_race(capsys)


@pytest.fixture
def on_tpu(monkeypatch, capsys):
  """Kernels for TPUs run on CPU, in tiles so small that there are several; a race between their copies is an error."""
  from jax.experimental.pallas import tpu as pltpu

  from deepseek_jax.kernels.fp8_matmul import pallas_tpu as products
  from deepseek_jax.kernels.quantize import pallas_tpu as quantizers

  monkeypatch.setattr(products, "TILE", (64, 128))
  monkeypatch.setattr(products, "STEP_BYTES", 2 * (64 + 128) * 256)  # two blocks of 128
  monkeypatch.setattr(quantizers, "ROWS", 64)
  monkeypatch.setattr(quantizers, "STEP_BYTES", 4 * 64 * 256)
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")):
    try:
      yield
    finally:
      pltpu.reset_tpu_interpret_mode_state()
  no_race(capsys)


def no_race(capsys):
  # So jax 0.10 and 0.11 say it; 0.12 raises.
  assert "RACE DETECTED" not in capsys.readouterr().out
