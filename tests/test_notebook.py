import types

import jax
import pytest

from deepseek_jax import notebook
from deepseek_jax.notebook import find_device, is_smoke_run


def device(**attributes):
  return types.SimpleNamespace(**attributes)


@pytest.mark.parametrize(
  ("found", "dtype", "note"),
  [
    (device(platform="gpu", device_kind="Tesla T4", compute_capability="7.5"), "float32", "Tesla T4 has no bfloat16 units"),
    (device(platform="gpu", device_kind="NVIDIA H200", compute_capability="9.0"), "bfloat16", ""),
    (device(platform="gpu", device_kind="NVIDIA B200", compute_capability="10.0"), "bfloat16", ""),
    (device(platform="gpu", device_kind="AMD Instinct MI250X", compute_capability="gfx90a"), "bfloat16", ""),
    (device(platform="tpu", device_kind="TPU v5 lite"), "bfloat16", ""),
  ],
)  # fmt: skip
def test_the_dtype_is_what_the_device_multiplies(monkeypatch, found, dtype, note):
  monkeypatch.setattr(jax, "devices", lambda: [found] * 2)
  result = find_device()
  assert (result.count, result.kind, result.compute_dtype) == (2, found.device_kind, dtype)
  assert result.note.startswith(note) and bool(result.note) == bool(note)
  assert str(result).startswith(
    f"2 x {found.device_kind} ({found.platform}), jax {jax.__version__}, computes in {dtype}"
  )


@pytest.mark.parametrize(("here", "command"), [("GPU", "jax[cuda13]"), ("TPU", "jax[tpu]")])
def test_an_accelerator_that_jax_does_not_use_is_named(monkeypatch, here, command):
  monkeypatch.setattr(notebook, "_accelerator_without_jax", lambda: here)
  assert f"this machine has a {here}" in find_device().note and f"pip install '{command}'" in str(find_device())


def test_a_smoke_run_is_asked_for_by_the_environment(monkeypatch):
  for value, expected in (("1", True), ("0", False), ("", False)):
    monkeypatch.setenv(notebook.SMOKE, value)
    assert is_smoke_run() == expected
