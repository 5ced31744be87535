"""Pallas kernels run in its interpreters, with the race detector on; `make test` runs only cases marked `quick`."""

import pathlib

import pytest

from tests.kernels.marks import NEEDS_JAX_0_11


def pytest_collection_modifyitems(config, items):
  """Marks each case of a Pallas kernel `kernels`, unless a `quick` mark of its test names its parameters.

  Those that interpret kernels for GPUs have NEEDS_JAX_0_11.

  `@pytest.mark.quick(implementation="pallas_gpu", step=128)` on a test: its cases with these parameters run in
  `make test`.
  """
  here = [item for item in items if item.path.parent == pathlib.Path(__file__).parent]
  marks = {}  # (test, mark) -> whether it names a case
  for item in here:
    params = item.callspec.params if hasattr(item, "callspec") else {}
    names_item = []
    for mark in item.iter_markers("quick"):
      names_item.append(all(params[name] == value for name, value in mark.kwargs.items()))
      key = f"{item.nodeid.partition('[')[0]}: {mark.kwargs}"
      marks[key] = marks.get(key, False) or names_item[-1]
    if "on_gpu" in item.fixturenames or _implementation(item) == "pallas_gpu":
      item.add_marker(NEEDS_JAX_0_11)
    if _implementation(item).startswith("pallas_") and not any(names_item):
      item.add_marker(pytest.mark.kernels)
  unmatched = [key for key, found in marks.items() if not found]
  if unmatched and not any("[" in argument for argument in config.args):  # else a case was asked for by its id
    raise pytest.UsageError(f"quick marks that name no case: {'; '.join(unmatched)}")


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
  from jax.experimental.pallas import mosaic_gpu as plgpu

  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
    yield
  no_race(capsys)


@pytest.fixture
def on_tpu(monkeypatch, capsys):
  """Kernels for TPUs run on CPU, in tiles so small that there are several; a race between their copies is an error."""
  from jax.experimental.pallas import tpu as pltpu

  from deepseek_jax.kernels.fp8_matmul import pallas_tpu as matmuls
  from deepseek_jax.kernels.quantize import pallas_tpu as quantizers

  monkeypatch.setattr(matmuls, "TILE", (64, 128))
  monkeypatch.setattr(matmuls, "STEP_BYTES", 2 * (64 + 128) * 256)  # two blocks of 128
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
