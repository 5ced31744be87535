"""DeepSeek-V3 at its own widths, one dense and four MoE layers and multi-token prediction, for 64 chips of a v5p pod."""

import json
import time

import pytest

from deepseek_jax.flags import load_config
from tests.tpu.compiled import pod
from tests.tpu.test_step import step_for

HBM = 95 * 2**30  # bytes of a v5p chip
SEQ = 1024  # the time to compile grows with the tokens that are sorted
MESHES = {
  "fsdp and experts": (dict(fsdp=4, expert=16), {}),
  "experts": (dict(expert=64), {"parallel.zero": "1"}),
  "experts and heads": (dict(fsdp=2, expert=16, tensor=2), {"parallel.latent": "sharded"}),
  "stages and experts": (dict(stage=4, expert=16), {"parallel.zero": "1"}),
}


def config_of(sizes, more):
  rows = 64 // sizes.get("stage", 1) // sizes.get("tensor", 1)
  batch = rows * max(sizes.get("stage", 1), 2)
  fields = {"model.layers": 5, "model.first_dense_layers": 1, "data.seq": SEQ, "model.moe.buffer_factor": 2}
  fields |= {
    "train.global_batch": batch,
    "train.microbatch": rows,
    "train.batch_ramp_from": 0,
    "train.batch_ramp_tokens": 0,
  }
  fields |= {f"mesh.{axis}": size for axis, size in ({"data": 1, "fsdp": 1} | sizes).items()} | more
  return load_config("configs/v3.py", {path: str(value) for path, value in fields.items()})


@pytest.fixture(scope="module", params=MESHES)
def step(request):
  sizes, more = MESHES[request.param]
  started = time.monotonic()
  program, held = step_for(pod("v5p:4x4x4", **sizes), config_of(sizes, more))
  memory = program.memory
  peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  print(json.dumps({"mesh": request.param, "seconds": time.monotonic() - started, "held": held, "peak": peak}))
  print(dict(program.written), dict(program.collectives))
  return program, peak, sizes


def test_fits(step):
  _, peak, _ = step
  assert peak < HBM


def test_no_layout_is_changed_through_whole_arrays(step):
  assert "nvoluntary full rematerialization" not in step[0].log


def test_collectives_are_those_written(step):
  program, _, sizes = step
  found = program.collectives
  assert not {name: count for name, count in found.items() if count > program.written[name]}
  # Dispatch with its weights and choices, and combine: forward, recomputed, backward, in the layers and in prediction.
  assert found["ragged-all-to-all"] >= 2 * 2 * 3
  assert ("collective-permute" in found) == ("stage" in sizes)
