"""Which updates and which samples each stage of training has."""

import dataclasses

import pytest

from deepseek_jax.data.pipeline import Consumed, batch_size
from deepseek_jax.errors import ConfigError
from deepseek_jax.flags import load_config
from deepseek_jax.runs import with_overrides
from deepseek_jax.stages import find_stage, resolve_stages, stage_after, stage_before
from deepseek_jax.training.schedule import StepInputs
from deepseek_jax.training.schedule_check import check_warmup, schedule_warnings

RAMP = {"train.global_batch": 16, "train.batch_ramp_from": 4, "train.microbatch": 4, "train.batch_ramp_tokens": 30_000}
STAGES = (
  {"name": "base", "until_tokens": 20_000},
  {"name": "more", "until_tokens": 60_000, "data": {"seq": 512}},
  {
    "name": "long",
    "until_tokens": 90_000,
    "data": {"seq": 1024},
    "schedule": {"peak": 1e-4, "steps": 4, "warmup_steps": 1},
  },
)


def staged(**fields):
  return load_config("tiny", RAMP | {"stages": STAGES, "train.steps": 0, **fields})


def one_by_one(config, step, consumed, until_tokens):
  samples, tokens = consumed
  while tokens < until_tokens:
    batch = batch_size(config.train, tokens)
    step, samples, tokens = step + 1, samples + batch, tokens + batch * config.data.seq
  return step, Consumed(samples, tokens)


def test_a_stage_ends_with_the_update_that_reaches_its_tokens_also_in_a_batch_ramp():
  stages, step, consumed = resolve_stages(staged()), 0, Consumed()
  assert [stage.name for stage in stages] == ["base", "more", "long"]
  for stage, until in zip(stages, (20_000, 60_000, 90_000), strict=True):
    assert (stage.first_step, stage.first) == (step, consumed)
    step, consumed = one_by_one(stage.config, step, consumed, until)
    assert (stage.config.train.steps, stage.last) == (step, consumed)
  assert [stage.is_last for stage in stages] == [False, False, True]


def test_a_schedule_that_a_stage_sets_starts_with_it_and_the_others_count_from_the_start_of_the_run():
  base, more, long = resolve_stages(staged())
  assert more.config.schedule == base.config.schedule
  assert (long.config.schedule.start_step, long.config.schedule.start_tokens) == (long.first_step, long.first.tokens)
  at = [StepInputs.at(long.config, long.first_step + i, long.first.tokens + i * 16_384, 16_384) for i in range(3)]
  end = 0.02  # the factor of tiny's cosine
  assert [inputs.learning_rate for inputs in at] == pytest.approx([1e-4, 1e-4, 1e-4 * (end + (1 - end) * 0.75)])
  check_warmup(long.config)
  (warning,) = schedule_warnings(long.config, long.first_step, long.first.tokens, long.name)
  assert "ends at" in warning and "change until_tokens of the stage long, or set schedule.steps=" in warning
  with pytest.raises(ConfigError, match="is not shorter than"):
    check_warmup(dataclasses.replace(long.config, schedule=dataclasses.replace(long.config.schedule, steps=1)))


def test_train_steps_ends_the_run_without_moving_a_stage():
  whole = resolve_stages(staged())
  steps = whole[1].first_step + 2
  cut = resolve_stages(staged(**{"train.steps": steps}))
  assert len(cut) == 2 and cut[-1].is_last and cut[-1].config.train.steps == steps < whole[1].config.train.steps
  assert [stage.last for stage in cut] == [stage.last for stage in whole[:2]]


def test_a_run_that_starts_with_a_stage_leaves_out_those_before():
  fields = {"first_stage": "more", "init_from": "somewhere"}
  assert resolve_stages(staged(**fields)) == resolve_stages(staged(init_from="somewhere"))[1:]


def test_stages_are_found_by_name_and_by_tokens():
  stages = resolve_stages(staged())
  ends = [stage.last.tokens for stage in stages]
  assert [stage_before(stages, tokens) for tokens in (0, ends[0], ends[0] + 1, ends[1], ends[2])] == [0, 0, 1, 1, 2]
  assert [stage_after(stages, tokens) for tokens in (0, ends[0], ends[0] + 1, ends[1], ends[2])] == [0, 1, 1, 2, 2]
  assert find_stage(stages, "more") is stages[1]
  for name, words in (("", "choose one with --stage=NAME"), ("x", "the config has the stages base, more, long")):
    with pytest.raises(ConfigError, match=words):
      find_stage(stages, name)
  [only] = resolve_stages(load_config("tiny"))
  assert find_stage((only,), "") is only and only.last.samples == only.config.train.steps * 8
  with pytest.raises(ConfigError, match="has no stages"):
    find_stage((only,), "x")


@pytest.mark.parametrize(
  ("stages", "words"),
  [
    ([{"name": "a"}], "stages.until_tokens must be above 0"),
    ([{"name": "a b", "until_tokens": 1}], "stages.name must be a word"),
    ([{"name": "a", "until_tokens": 1}] * 2, "stages must have different names, got a, a"),
    ([{"nam": "a"}], "did you mean 'stages.name'"),
    ([{"name": "a", "until_tokens": 1, "data": 3}], "stages.data must be a section of fields"),
    ([{"name": "a", "until_tokens": 1, "data": {"sq": 3}}], r"stages\[0\] \(a\): unknown config field 'data.sq'"),
    ([{"name": "a", "until_tokens": 1, "train": {"steps": 3}}], "no stage can change train.steps"),
    ([{"name": "a", "until_tokens": 1, "schedule": {"start_step": 3}}], "no stage can change schedule.start_step"),
    (3, "stages must be a list of objects with the fields stages.name"),
  ],
)
def test_stages_that_are_no_stages_are_one_message(stages, words):
  with pytest.raises(ConfigError, match=words):
    staged(stages=stages)


def test_fields_of_a_stage_are_set_in_a_config_that_is_loaded():
  config = with_overrides(staged(), {"stages.more.data.seq": 1024, "seed": 3})
  assert [stage.data for stage in config.stages] == [{}, {"seq": 1024}, {"seq": 1024}] and config.seed == 3
  assert config.stages[2] == staged().stages[2]


@pytest.mark.parametrize(
  ("leaf", "words"),
  [
    ("data.sq", "did you mean 'data.seq'"),
    ("checkpoint.every", "no stage can change checkpoint.every"),
    ("data", "'data' is a section: set one of its fields, sources"),
    ("until_token", "did you mean 'stages.until_tokens'"),
  ],
)
def test_a_field_that_no_stage_has_is_named(leaf, words):
  with pytest.raises(ConfigError, match=f"--config.stages.more.{leaf}: .*{words}"):
    staged(**{f"stages.more.{leaf}": 3})


def test_a_run_without_stages_needs_steps():
  with pytest.raises(ConfigError, match="must be at least 1, got 0"):
    load_config("tiny", {"train.steps": 0})
