"""Pallas kernels run in its interpreters, with the race detector on; all but the QUICK cases in `make kernels` alone."""

import contextlib

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
)


def pytest_collection_modifyitems(items):
  for item in items:
    if _implementation(item).startswith("pallas_") and not item.name.startswith(QUICK):
      item.add_marker(pytest.mark.kernels)


def _implementation(item):
  return str(item.callspec.params.get("implementation", "")) if hasattr(item, "callspec") else ""


@contextlib.contextmanager
def interpreted_gpu():
  """Kernels for GPUs run on CPU, every thread, barrier and copy of them; a race between them is an error."""
  if jax.__version_info__ < (0, 11):
    pytest.skip(f"kernels for GPUs are interpreted by jax 0.11 and newer, and this is {jax.__version__}")
  from jax.experimental.pallas import mosaic_gpu as plgpu

  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
    yield


@pytest.fixture(autouse=True)
def interpreted(request):
  """Interprets the kernels of a test whose `implementation` is a Pallas one."""
  if _implementation(request.node) == "pallas_gpu":
    request.getfixturevalue("on_gpu")


@pytest.fixture
def on_gpu():
  with interpreted_gpu():
    yield
