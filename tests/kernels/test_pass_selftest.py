"""Every Pallas kernel, interpreted, passes the self-test: right kernels can meet its bounds with its inputs."""

import contextlib

import jax
import jax.numpy as jnp
import pytest

from deepseek_jax.kernels.implementations import Call
from deepseek_jax.selftest import check
from deepseek_jax.selftest.cases import Case
from tests.selftest.test_check import CALLS

CASES = [(name, number) for name in CALLS for number in range(len(CALLS[name]))]
# Kernels of jax's library, which are interpreted on CPUs by themselves. On GPUs attention is tokamax's, which needs
# stand-ins for that (test_attention_gpu.py), and grouped matmuls want widths of whole tiles.
LIBRARY = [(name, number) for name, number in CASES if name.startswith(("attention", "grouped"))]
OURS = [case for case in CASES if case not in LIBRARY]


def outcome(name, number, implementation, monkeypatch):
  monkeypatch.setattr(check, "seconds_per_call", lambda *_: 1.0)
  call = Call(*name.split("."), implementation, CALLS[name][number])
  case = Case(call, (call.key,))
  return check.check_case(case, check.compile_case(case, contextlib.nullcontext))


@pytest.mark.parametrize(("name", "number"), LIBRARY)
def test_library_kernels_pass(name, number, monkeypatch):
  assert outcome(name, number, "pallas_tpu", monkeypatch).verdict == "ok"


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
@pytest.mark.parametrize(("name", "number"), OURS)
def test_our_kernels_pass(name, number, implementation, monkeypatch):
  assert outcome(name, number, implementation, monkeypatch).verdict == "ok"


@pytest.mark.kernels
@pytest.mark.parametrize(("seq", "heads"), [(512, 16), (1024, 8)])
def test_attention_passes_at_the_widths_of_v3(seq, heads, monkeypatch):
  shapes = [jax.ShapeDtypeStruct((1, seq, heads, width), jnp.bfloat16) for width in (192, 192, 128)]
  monkeypatch.setitem(CALLS, "attention.attention", [(*shapes, None, 192**-0.5)])
  result = outcome("attention.attention", 0, "pallas_tpu", monkeypatch)
  assert result.verdict == "ok" and result.error < result.bound / 2
