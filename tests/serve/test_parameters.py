import pytest

from deepseek_jax.generate.request import BOUNDS, Sampling
from deepseek_jax.serve import parameters
from deepseek_jax.serve.parameters import RULES, Fields, answer_length, derived_seed, parse_parameters
from deepseek_jax.serve.request_error import RequestError


def test_the_defaults_are_the_model_s_own_distribution():
  parsed = parse_parameters(Fields({}, parameters.COMMON_FIELDS), "m", None, None)
  assert Sampling(1, **parsed.rules) == Sampling(1)
  assert (parsed.n, parsed.stop, parsed.stream, parsed.seed) == (1, (), False, None)


@pytest.mark.parametrize("name", RULES)
def test_bounds_are_those_of_sampling(name):
  smallest, largest = BOUNDS[name]
  fields = lambda value: Fields({name: value}, parameters.COMMON_FIELDS)
  for value in (smallest, largest):
    assert fields(value).number(name, 0.0) == value
  for value in (smallest - 1e-3, largest * 1.01, float("nan")):
    with pytest.raises(RequestError, match=f"{name} must be a number of at"):
      fields(value).number(name, 0.0)


@pytest.mark.parametrize(
  "body, param, message",
  [
    ({"max_token": 3}, "max_token", "did you mean 'max_tokens'"),
    ({"guidance": 3}, "guidance", "expected frequency_penalty, "),
    (
      {"stream": True, "stream_options": {"usage": True}},
      "stream_options.usage",
      "unknown field 'stream_options.usage'",
    ),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "true or false"),
  ],
)
def test_the_field_that_is_wrong_is_named(body, param, message):
  with pytest.raises(RequestError, match=message) as raised:
    parse_parameters(Fields(body, parameters.COMMON_FIELDS), "m", None, None)
  assert raised.value.param == param


def test_null_is_not_given():
  fields = Fields(dict.fromkeys(["logit_bias", "temperature", "tools", "stop"]), parameters.COMMON_FIELDS)
  assert parse_parameters(fields, "m", None, None).rules["temperature"] == 1.0


def test_seeds_of_choices_differ():
  assert len({derived_seed(7, choice) for choice in range(1000)}) == 1000
  assert derived_seed(7, 0) == 7
  assert derived_seed(None, 0) != derived_seed(None, 0)


def test_lengths():
  assert answer_length([1] * 10, None, 16, 400) == 16
  assert answer_length([1] * 390, None, 16, 400) == 10
  assert answer_length([1] * 10, None, None, 400) == 390
  assert answer_length([1] * 399, 0, 16, 400) == 0
  for prompt, max_tokens in ((400, None), (400, 0), (390, 11)):
    with pytest.raises(RequestError, match=f"{prompt} tokens.*400"):
      answer_length([1] * prompt, max_tokens, 16, 400)
  with pytest.raises(RequestError, match="no room for an answer") as raised:
    answer_length([1] * 400, None, None, 400, "messages")
  assert raised.value.param == "messages"


def test_log_probabilities_are_bounded():
  parameters.check_logprobs(128, 10**6, None)
  with pytest.raises(RequestError, match="too many"):
    parameters.check_logprobs(128, 4096, 20)
