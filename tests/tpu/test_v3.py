"""DeepSeek-V3 at its own widths, one dense and four MoE layers and MTP, for 64 chips of a v5p pod."""

import re

import pytest

from deepseek_jax.flags import load_config
from deepseek_jax.plan.topology import CHIPS
from tests.tpu.pods import REMATERIALIZED, check_collectives, step_for

SEQ = 1024  # the time to compile grows with the tokens that are sorted
MESHES = {
  "fsdp and experts": (dict(fsdp=4, expert=16), {}),
  "experts": (dict(expert=64), {"parallel.zero": "1"}),
  "experts and heads": (dict(fsdp=2, expert=16, tensor=2), {"parallel.mla_latent": "sharded"}),
  "stages and experts": (dict(stage=4, expert=16), {"parallel.zero": "1"}),
}


def config_of(sizes, more):
  rows = 64 // sizes.get("stage", 1) // sizes.get("tensor", 1)  # one a device
  fields = {
    "model.layers": 5, "model.first_dense_layers": 1, "data.seq": SEQ, "model.moe.buffer_factor": 2,
    "train.global_batch": rows * max(sizes.get("stage", 1), 2), "train.microbatch": rows, "train.batch_ramp_from": 0,
    "train.batch_ramp_tokens": 0,
  }  # fmt: skip
  fields |= {f"mesh.{axis}": size for axis, size in ({"data": 1, "fsdp": 1, "context": 1} | sizes).items()} | more
  return load_config("configs/v3.py", {path: str(value) for path, value in fields.items()})


@pytest.fixture(scope="module", params=MESHES)
def step(request):
  sizes, more = MESHES[request.param]
  step = step_for("v5p:4x4x4", sizes, config_of(sizes, more))
  print(
    f"{request.param}: compiled in {step.compiled.compile_seconds:.0f} s, {step.compiled.peak_bytes / 2**30:.1f} GiB a chip"
  )
  return step


def test_fits(step):
  assert step.held < step.compiled.peak_bytes < CHIPS["v5p"].hbm_capacity


def test_no_layout_is_changed_through_whole_arrays(step):
  assert REMATERIALIZED not in step.compiled.log


def test_collectives_are_those_written(step):
  check_collectives(step)


@pytest.mark.parametrize(("topology", "chip"), [("v5p:4x4x4", "v5p"), ("tpu7x:4x4x2", "tpu7x")])
def test_in_fp8_tokens_go_to_experts_in_half_the_bytes(topology, chip):
  sizes = dict(fsdp=4, expert=16)
  step = step_for(topology, sizes, config_of(sizes, {"model.precision": "fp8"}))
  assert step.held < step.compiled.peak_bytes < CHIPS[chip].hbm_capacity
  found = re.findall(r"= (u8|bf16|f32)\[\d+,(\d+),(\d+)\]\S* ragged-all-to-all\(", step.compiled.hlo)
  rows = {dtype: {int(a) * int(b) for kind, a, b in found if kind == dtype} for dtype in ("u8", "bf16", "f32")}
  # What a row takes: of a token in FP8, of an expert's output, and of weights, choices and scales, in whole lanes.
  assert rows == {"u8": {step.config.model.embed}, "bf16": {step.config.model.embed}, "f32": {128}}
  token, facts = step.config.model.embed, 128 * 4
  assert token + facts <= 0.52 * (2 * token + facts)
