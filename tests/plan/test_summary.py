"""The lines of --dry_run."""

import dataclasses

from deepseek_jax.config import Config
from deepseek_jax.config_sections import DataConfig, TrainConfig
from deepseek_jax.console import format_bytes
from deepseek_jax.flags import load_config
from deepseek_jax.mesh import resolve_mesh
from deepseek_jax.plan.memory import estimate_memory, with_xla_attention
from deepseek_jax.plan.summary import config_summary, format_differences, format_planned_tokens, planned_tokens


def test_planned_tokens_of_a_ramp():
  """4 updates of 4 sequences, 2 of 8, 2 of 12 by hand, then 16: tokens seen 0, 4, .. of a ramp over 48 sequences."""
  ramp = dict(global_batch=16, microbatch=4, batch_ramp_from=4, batch_ramp_tokens=48 * 256)
  sizes = [4, 4, 4, 4, 8, 8, 12, 12]
  for steps in (1, 5, 8, 20):
    config = Config(train=TrainConfig(steps=steps, **ramp))
    assert planned_tokens(config) == 256 * (sum(sizes[:steps]) + 16 * max(0, steps - len(sizes)))


def test_planned_tokens_after_a_resume_at_another_length():
  """4 updates of 4 sequences of 256 were done. Then, of 64: by hand 3 of 8 and 4 of 12 in the ramp, and 3 of 16."""
  ramp = dict(global_batch=16, microbatch=4, batch_ramp_from=4, batch_ramp_tokens=8192)
  config = Config(train=TrainConfig(steps=14, **ramp), data=DataConfig(seq=64))
  assert planned_tokens(config, 4, 4096) == 4096 + 64 * (3 * 8 + 4 * 12 + 3 * 16)
  line = "tokens planned   11,776 in 14 steps; to go: 7,680 in 10 steps ("
  assert format_planned_tokens(config, 4, 4096).startswith(line)
  finished = Config(train=TrainConfig(steps=4))
  assert planned_tokens(finished, 4, 4096) == planned_tokens(finished, 6, 4096) == 4096


def test_differences_are_three_lines_at_most():
  base = Config()
  assert format_differences(base, base, "tiny") == "config           tiny"
  changed = dataclasses.replace(base, seed=7, name="mine")
  assert format_differences(changed, base, "tiny") == "config           tiny, but name='mine', seed=7"
  many = load_config("v3")
  lines = format_differences(many, base, "the defaults").splitlines()
  assert len(lines) == 3 and max(map(len, lines)) <= 120 and lines[-1].endswith(" ... (all: --print_config)")


def test_memory_is_that_of_the_devices_kernels():
  """Attention scores are in memory unless a kernel keeps them out: a TPU's, and a GPU's where the config names it."""
  config = resolve_mesh(load_config("1b"), 1)

  def memory(device_kind=None):
    return next(line for line in config_summary(config, device_kind).splitlines() if line.startswith("memory estimate"))

  assert memory("TPU v5p") == memory().replace(", as on TPUs", "") != memory()
  assert memory("cpu") == memory("NVIDIA A100-SXM4-80GB") != memory("TPU v5p")
  assert f"{format_bytes(estimate_memory(with_xla_attention(config)).total_bytes)} per device, of 1 (" in memory("cpu")
