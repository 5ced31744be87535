"""Schedules that do not fit the run, and what is said of them. Rates by hand."""

import dataclasses

import pytest

from deepseek_jax.config import Config
from deepseek_jax.config_sections import DataConfig, ScheduleConfig, TrainConfig
from deepseek_jax.errors import ConfigError
from deepseek_jax.training.schedule_check import changed_rate_warning, check_warmup, schedule_warnings

COSINE = ScheduleConfig(kind="warmup_cosine", peak=1.0, warmup_steps=10, steps=110, factors=(0.1,))
DROPS = ScheduleConfig(kind="multi_step", peak=1.0, milestones=(0.8, 0.9), factors=(0.3, 0.1), tokens=100 * 4 * 8)
WSD = ScheduleConfig(kind="wsd", peak=1.0, milestones=(0.5, 1.0), factors=(0.0,), steps=100)


def config_of(schedule, steps, **train):
  """32 tokens a step."""
  return Config(
    schedule=schedule, data=DataConfig(seq=8), train=TrainConfig(steps=steps, **({"global_batch": 4} | train))
  )


@pytest.mark.parametrize(
  ("schedule", "steps", "words"),
  [
    (COSINE, 110, None),
    (COSINE, 109, None),
    (COSINE, 105, None),  # the rate is as good as the last
    (
      COSINE,
      111,
      ["schedule.steps=110 ends before the run, at 111 steps", "learning rate, 0.1;", "schedule.steps=111"],
    ),
    (
      COSINE,
      61,
      ["ends at 55% of schedule.steps=110, at a learning rate of 0.55,", "ends at 0.1;", "schedule.steps=61"],
    ),
    (COSINE, 9, ["train.steps=9 ends within the warm-up, at a learning rate of 0.9 on the way to 1;"]),
    (dataclasses.replace(COSINE, steps=12), 12, None),  # its last step is halfway, but it is the schedule's last
    (DROPS, 100, None),
    (DROPS, 95, None),
    (DROPS, 120, ["schedule.tokens=3200 ends before the run, at 3840 tokens", "0.1;", "schedule.tokens=3840"]),
    (DROPS, 85, ["ends at 85% of schedule.tokens=3200, at a learning rate of 0.3,"]),
    (WSD, 100, None),
    (WSD, 50, ["ends at 50% of schedule.steps=100, at a learning rate of 1, where the schedule ends at 0;"]),
    (ScheduleConfig(), 5000, None),  # constant
    (ScheduleConfig(warmup_steps=10), 5, ["within the warm-up"]),
    (ScheduleConfig(warmup_tokens=320), 10, None),
    (ScheduleConfig(warmup_tokens=321), 10, ["within the warm-up"]),
  ],
)
def test_a_run_that_its_schedule_does_not_fit(schedule, steps, words):
  lines = schedule_warnings(config_of(schedule, steps))
  assert len(lines) == bool(words)
  for word in words or ():
    assert word in lines[0] and "\n" not in lines[0]


def test_tokens_are_those_that_the_run_has_seen():
  """A schedule in tokens of a run that goes on at another length: 50 steps of 64 tokens and 50 of 32 are 150 of 32."""
  half_seen = schedule_warnings(config_of(DROPS, 100), step=50, tokens=3200)
  assert "ends before the run, at 4800 tokens" in half_seen[0]
  ramp = config_of(DROPS, 100, batch_ramp_from=2, microbatch=2, batch_ramp_tokens=800)  # 50 steps of 16, 50 of 32
  assert "ends at 75% of" in schedule_warnings(ramp)[0] and not schedule_warnings(config_of(DROPS, 100))


@pytest.mark.parametrize(
  ("changes", "fits"),
  [
    (dict(warmup_steps=109), True),
    (dict(warmup_steps=110), False),
    (dict(warmup_steps=200), False),
    (dict(kind="constant", factors=(), warmup_steps=200), True),
    (dict(warmup_tokens=3200, tokens=3200), False),
    (dict(warmup_tokens=3199, tokens=3200), True),
    (dict(kind="wsd", milestones=(0.5, 1.0), warmup_steps=100, tokens=3200), False),  # 100 steps of 32 tokens
    (dict(kind="wsd", milestones=(0.5, 1.0), warmup_steps=99, tokens=3200), True),
    (dict(kind="wsd", milestones=(0.5, 1.0), warmup_tokens=3520), False),  # of 110 steps
    (dict(kind="wsd", milestones=(0.5, 1.0), warmup_tokens=3519), True),
  ],
)
def test_a_warmup_is_shorter_than_its_schedule(changes, fits):
  config = config_of(dataclasses.replace(COSINE, **changes), 110)
  if fits:
    check_warmup(config)
  else:
    with pytest.raises(ConfigError, match=r"schedule\.warmup_\w+=\d+ is not shorter than schedule\.\w+=\d+: ") as error:
      check_warmup(config)
    assert "\n" not in str(error.value)


def test_a_changed_schedule_names_both_rates_of_the_next_step():
  longer = config_of(dataclasses.replace(COSINE, steps=210), 210)
  changes = [("schedule.steps", 110, 210), ("train.steps", 110, 210), ("schedule.gone", 1, None)]
  [line] = changed_rate_warning(longer, changes, 110, 110 * 32)
  assert line == "the schedule has changed: step 111 has a learning rate of 0.55, by the checkpoint's it was 0.1"
  assert not changed_rate_warning(longer, changes, 5, 5 * 32)  # in the warm-up, which is as before
  assert not changed_rate_warning(longer, changes[1:], 110, 110 * 32)
  assert not changed_rate_warning(longer, changes, 0, 0)
