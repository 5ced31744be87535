"""Learning rates at the points that the papers name."""

import pytest

from deepseek_jax.config_sections import ScheduleConfig
from deepseek_jax.flags import load_config
from deepseek_jax.training.schedule import learning_rate

BATCH = 1000


def at(config, step, tokens=None):
  return learning_rate(config, step, step * BATCH if tokens is None else tokens, BATCH)


def test_constant_with_warmup_in_steps_and_in_tokens():
  for warmup in (dict(warmup_steps=10), dict(warmup_tokens=10 * BATCH)):
    config = ScheduleConfig(kind="constant", peak=2.0, **warmup)
    assert [at(config, step) for step in (0, 4, 9, 10, 5000)] == pytest.approx([0.2, 1.0, 2.0, 2.0, 2.0])


def test_warmup_cosine_starts_after_warmup_and_holds_its_end():
  for unit in (dict(steps=110, warmup_steps=10), dict(tokens=110 * BATCH, warmup_tokens=10 * BATCH)):
    config = ScheduleConfig(kind="warmup_cosine", peak=1.0, factors=(0.1,), **unit)
    assert [at(config, step) for step in (0, 10, 60, 110, 999)] == pytest.approx([0.1, 1.0, 0.55, 0.1, 0.1])


@pytest.mark.parametrize(("name", "peak"), [("7b", 4.2e-4), ("67b", 3.2e-4)])
def test_multi_step_of_the_paper(name, peak):
  """arXiv:2401.02954 section 2.3: 2000 steps of warm-up, 31.6% of the peak after 80% of the tokens, 10% after 90%."""
  config = load_config(f"configs/{name}.py").schedule
  for step, tokens, share in (
    (0, 0, 1 / 2000), (1999, 1.9e10, 1), (80_000, 1.599e12, 1), (80_000, 1.6e12, 0.316), (90_000, 1.799e12, 0.316),
    (90_000, 1.8e12, 0.1), (99_999, 2.1e12, 0.1),
  ):  # fmt: skip
    assert learning_rate(config, step, tokens, 1e7) == pytest.approx(peak * share)


def test_wsd_of_v3():
  """arXiv:2412.19437 section 4.2: 2.2e-4 to 10T, cosine over 4.3T to 2.2e-5, 333B of it, 167B of 7.3e-6."""
  config = ScheduleConfig(
    kind="wsd", peak=2.2e-4, warmup_steps=2000, tokens=14.8e12,
    milestones=(10 / 14.8, 14.3 / 14.8, 14.633 / 14.8), factors=(0.1, 7.3e-6 / 2.2e-4),
  )  # fmt: skip
  for tokens, rate in (
    (9.9e12, 2.2e-4), (12.15e12, (2.2e-4 + 2.2e-5) / 2), (14.4e12, 2.2e-5), (14.632e12, 2.2e-5), (14.7e12, 7.3e-6),
  ):  # fmt: skip
    assert learning_rate(config, 10**6, tokens, 1e7) == pytest.approx(rate, rel=1e-6)
