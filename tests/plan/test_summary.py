"""The lines of --dry_run."""

import dataclasses

from deepseek_jax.config import Config
from deepseek_jax.config_sections import DataConfig, TrainConfig
from deepseek_jax.flags import load_config
from deepseek_jax.plan.summary import format_differences, format_planned_tokens, planned_tokens


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
