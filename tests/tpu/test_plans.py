"""The documented plans: each config on its topology compiles in minutes, fits, and is what the estimate says."""

import jax
import pytest

from deepseek_jax.flags import load_config
from deepseek_jax.mesh import resolve_mesh
from deepseek_jax.plan.memory import estimate_memory
from deepseek_jax.plan.plan import make_plan
from deepseek_jax.plan.topology import parse
from deepseek_jax.training.step import abstract_step

DOCUMENTED = {"7b": "v5e:16x16", "67b": "v5p:8x8x8", "v2": "v5p:8x8x8", "v3": "v5p:8x8x16"}
# Plans that the constants of plan/memory.py were not fitted to.
HELD_OUT = {
  "moe_16b": ("v5p:4x4x4", {
    "mesh.fsdp": 8, "mesh.expert": 8, "model.moe.buffer_factor": 1.5, "train.microbatch": 128, "train.global_batch": 1024,
  }),
}  # fmt: skip


def plan_and_estimate(name, topology, fields):
  config = load_config(f"configs/{name}.py", {path: str(value) for path, value in fields.items()})
  plan = make_plan(config, parse(topology), abstract_step, compile=True)
  estimate = estimate_memory(resolve_mesh(config, parse(topology).devices)).total
  print(
    f"{name} on {topology}: compiled in {plan.compile_seconds:.0f} s, {plan.total / 2**30:.1f} GiB, estimated {estimate / 2**30:.1f}"
  )
  return plan, estimate


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_documented_plan_fits_and_was_estimated(name):
  plan, estimate = plan_and_estimate(name, DOCUMENTED[name], {})
  assert plan.fits and plan.source == "compiled" and jax.device_count() < plan.topology.devices
  assert estimate == pytest.approx(plan.total, rel=0.1)
  assert plan.compiled_flops == pytest.approx(plan.model_flops, rel=1) and plan.compiled_flops > plan.model_flops


@pytest.mark.parametrize("name", HELD_OUT)
def test_a_plan_that_was_held_out(name):
  plan, estimate = plan_and_estimate(name, *HELD_OUT[name])
  assert estimate == pytest.approx(plan.total, rel=0.2)
