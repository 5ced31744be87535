"""The checksums of a pass: the same in two executions on every layout, and others where one device computes wrong."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from deepseek_jax.mesh import make_mesh
from deepseek_jax.model.transformer import graphdef
from deepseek_jax.sharding import spec
from deepseek_jax.training.checked_pass import make_checked_pass, rotate_batch
from deepseek_jax.training.corruption import compare_repeated, compare_rotated
from deepseek_jax.training.step_config import StepConfig
from tests.device_faults import FAULTY, Fault
from tests.meshes import CONFIGS, changed, name, tokens
from tests.steps import make_state


def make_pass(model, mesh_axes, parallel):
  """A function that executes a pass of one batch and returns the checksums; rotate=True: each device's are of the
  sequences of the device before."""
  config = changed(CONFIGS[model], mesh_axes, **parallel)
  mesh = make_mesh(config.mesh, jax.devices()[: int(np.prod(dataclasses.astuple(config.mesh)))])
  with jax.set_mesh(mesh):
    state = make_state(config, mesh)
    checked = jax.jit(make_checked_pass(StepConfig.of(config, bos=0), graphdef(config.model)))
    batch = jax.device_put(tokens(0), NamedSharding(mesh, spec(None, "batch", None)))

  def execute(rotate=False):
    with jax.set_mesh(mesh):
      arguments = rotate_batch(batch) if rotate else batch, np.float32(0.3), state.step
      return jax.device_get(checked(state.params, state.buffers, *arguments))

  return execute


@pytest.mark.parametrize(
  "case", [("dense", dict(stage=2, tensor=2), {}), ("hash", dict(expert=2, context=2), dict(kind="ring"))], ids=name
)
def test_two_passes_have_the_same_checksums(case):
  execute = make_pass(*case)
  first = execute()
  assert compare_repeated(first, execute()) is None
  assert len(np.unique(first["sums"][0])) > 5  # checksums of something


# With ZeRO 2 a device has its own gradients as a whole, with ZeRO 3 it sends them away layer by layer.
@pytest.mark.parametrize("zero", [2, 3])
def test_the_device_that_computes_wrong_is_named(zero, monkeypatch):
  fault = Fault(monkeypatch)
  execute = make_pass("dense", dict(data=2, fsdp=2), dict(zero=zero))
  first, rotated = execute(), execute(rotate=True)
  assert compare_repeated(first, execute()) is None and compare_rotated(first, rotated) is None
  assert (first["forward"] != rotated["forward"]).any(1).all()  # other sequences than in the first pass
  for where in ("forward", "backward"):
    fault.where = where
    wrong, wrong_again, wrong_rotated = execute(), execute(), execute(rotate=True)
    suspects, what = compare_repeated(first, wrong)
    assert suspects == [FAULTY] and where in what
    # A fault that repeats is not seen by the same device, but by the next one.
    assert compare_repeated(wrong, wrong_again) is None
    assert compare_rotated(wrong, wrong_rotated)[0] == [FAULTY]
    # One that happened once is between two devices.
    assert compare_rotated(first, wrong_rotated)[0] == [FAULTY - 1, FAULTY]
