"""What deepseek_jax computes for a case, through its public API, in the form of reference.compute."""

import functools
from unittest import mock

import jax
import numpy as np

import deepseek_jax
from deepseek_jax.checkpoint.hf_files import HFReader

# Largest errors that are allowed: float32 leaves roundings, float64 almost nothing.
LIMITS = {
  "float32": {"logits": 2e-5, "loss": 2e-5, "weights": 2e-5, "grads": 2e-5},
  "float64": {"logits": 1e-9, "loss": 1e-9, "weights": 1e-9, "grads": 1e-8},
}


# Tests compile without LLVM's optimization (tests/conftest.py), which also sums less exactly: of V2's float32 gradients
# the largest error is then 2.7e-5, and 8e-6 as users compile (jax 0.12.0, AMD EPYC).
AS_USERS_COMPILE = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 1})


def compute(folder, case, dtype, scratch=None):
  """Outputs in `dtype`; gradients get their published names by being saved to `scratch` as if they were the parameters.

  Without `scratch`: of the forward pass alone.
  """
  with jax.enable_x64(dtype == "float64"), mock.patch("jax.jit", AS_USERS_COMPILE if dtype == "float32" else jax.jit):
    model = deepseek_jax.load_pretrained(folder, dtype=dtype)
    outputs = {"logits": np.asarray(model.logits(case.tokens))}
    if model.config.num_moe_layers:
      outputs |= sorted_routing(*map(np.asarray, model.routing(case.tokens)))
    if scratch is None:
      return outputs
    total, grads = model.loss_and_grads(case.tokens, mtp_weight=case.mtp_weight)
    model.params = grads
    model.save_pretrained(scratch, dtype=dtype)
  return outputs | {"loss": np.asarray(total), "grads": trained(read_tensors(scratch), case)}


def sorted_routing(indices, weights):
  order = np.argsort(indices, -1)
  return {"indices": np.take_along_axis(indices, order, -1), "weights": np.take_along_axis(weights, order, -1)}


def read_tensors(folder):
  reader = HFReader(folder)
  return {name: reader.read(name) for name in reader.names}


def trained(tensors, case):
  """Of `tensors` those with a gradient of their own: no bias of a router, no copies for multi-token prediction."""
  copies = ("embed_tokens.weight", "shared_head.head.weight", "e_score_correction_bias")
  main = ("model.embed_tokens.weight", "lm_head.weight")
  return {name: a for name, a in tensors.items() if name in main or not name.endswith(copies)}


def assert_same_tensors(folder, expected):
  """Every name, dtype and bit of the safetensors files in `folder` is that of `expected`."""
  found = read_tensors(folder)
  assert found.keys() == expected.keys()
  different = [
    name for name, a in found.items() if a.dtype != expected[name].dtype or a.tobytes() != expected[name].tobytes()
  ]
  assert not different
