"""What no engine is asked for."""

import dataclasses

import pytest

from deepseek_jax.errors import ConfigError
from deepseek_jax.generate.request import EngineStats, Sampling


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("max_tokens", 0, "max_tokens must be at least 1, got 0"),
    ("temperature", -0.1, "temperature must be at least 0 and at most 1e[+]06, got -0.1"),
    ("temperature", float("nan"), "temperature must be .*, got nan"),
    ("top_p", 1.5, "top_p must be at least 0 and at most 1, got 1.5"),
    ("top_k", 2**31, "top_k must be at least 0"),
    ("presence_penalty", 2.1, "at least -2 and at most 2"),
    ("repetition_penalty", 0.0, "repetition_penalty must be at least"),
    ("logprobs", 21, "logprobs must be at least 0 and at most 20, got 21"),
    ("seed", -1, "seed must be at least 0"),
  ],
)
def test_values_out_of_bounds_are_refused(field, value, message):
  with pytest.raises(ConfigError, match=message):
    Sampling(**{"max_tokens": 1, field: value})


def test_bounds_themselves_are_taken():
  Sampling(1, 0.0, 0, 0.0, 1.0, 1e38, -2.0, 2.0, 2**32 - 1, 20, 0)


def test_stats_are_plain_numbers():
  assert EngineStats(steps=3).to_json()["steps"] == 3
  assert set(EngineStats().to_json()) == {field.name for field in dataclasses.fields(EngineStats)}
