"""Numbers of a new config: those of the laws, within what steps and devices allow."""

import pytest

from deepseek_jax.errors import ConfigError
from deepseek_jax.new.advice import advise, nice_number, peak_rate, round_batch, training_run
from deepseek_jax.new.hardware import find_hardware
from deepseek_jax.new.questions import Answers, Length, Tokenizer
from deepseek_jax.new.size import find_size


def answers(topology, seq=256, model="dense", **length):
  return Answers(model, find_hardware(topology), Length(**length), (), Tokenizer("byte", 257), seq, "mine")


def test_laws_at_a_compute_within_their_data():
  advice = advise(answers("h100:1x8", seq=4096, tokens=2.6e9))
  # 1e18 FLOPs: by arXiv 2401.02954, eq. 1 and 4, M = 0.1715 C^0.5243.
  compute = (2.6e9 * 0.1715) ** (1 / 0.4757)
  assert advice.size.wanted == pytest.approx(compute / 2.6e9, rel=1e-6)
  assert advice.size.scale == pytest.approx(advice.size.wanted, rel=0.2)
  config = advice.config
  assert config.schedule.peak == pytest.approx(0.3118 * advice.flops**-0.125, rel=0.01)
  law_batch = 0.2920 * (advice.size.scale * 2.6e9) ** 0.3271
  assert advice.law_batch == pytest.approx(law_batch) and not advice.reduced
  assert config.train.global_batch == pytest.approx(law_batch / 4096, rel=0.25) and config.train.global_batch % 8 == 0
  assert config.schedule.warmup_steps == min(2000, advice.steps // 10) and config.schedule.kind == "multi_step"
  assert advice.hours == pytest.approx(advice.steps * advice.layout.seconds / 3600)


def test_hours_are_those_that_were_asked_for():
  advice = advise(answers("v5p:2x2x1", seq=1024, hours=3.0))
  assert advice.hours == pytest.approx(3.0, rel=0.01)
  assert advice.size.scale * advice.tokens == pytest.approx(advice.flops, rel=0.01)
  # Both axes of the allocation: tokens are near the optimum of the compute.
  assert advice.tokens == pytest.approx(5.8316 * advice.flops**0.4757, rel=0.3)


def test_a_run_too_small_for_the_law_has_its_smallest_rate():
  size = find_size("dense", 256, 272, 1.0, find_hardware("h200"))
  assert peak_rate(size, 10.0) == peak_rate(size, 1e5) == pytest.approx(0.3118 * 1e12**-0.125, rel=0.01)
  assert training_run(size, 10.0).flops == pytest.approx(10 * size.scale)


def test_too_few_tokens_say_how_many_would_do():
  with pytest.raises(ConfigError, match=r"^1e\+05 tokens are 3 steps of 128 sequences .*ask for 3\.28e\+05 tokens"):
    advise(answers("v5p:4x4x8", tokens=1e5))


@pytest.mark.parametrize(
  ("wanted", "multiple", "largest", "batch"),
  [(30.5, 1, 1e9, 32), (0.2, 1, 1e9, 1), (915, 512, 1e9, 1024), (20, 512, 1e9, 512), (50, 1, 24.5, 24), (9, 8, 3, 8)],
)
def test_batches_that_microbatches_divide(wanted, multiple, largest, batch):
  assert round_batch(wanted, multiple, largest) == batch


def test_nice_numbers():
  assert [nice_number(n) for n in (0.1, 1, 4.9, 5, 19, 99, 100, 730)] == [1, 1, 2, 5, 10, 50, 100, 500]
