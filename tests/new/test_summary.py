"""The words and numbers of what a new config amounts to."""

import pytest

from deepseek_jax.new.questions import parse_amount
from deepseek_jax.new.summary import exact, short


@pytest.mark.parametrize(
  ("number", "text"), [(2e9, "2e+09"), (24.0, "24"), (123456789.0, "123456789.0"), (0.1 + 0.2, "0.30000000000000004")]
)
def test_the_command_of_a_config_gives_its_numbers_again(number, text):
  assert exact(number) == text and parse_amount(text, "tokens", 1e16) == number


@pytest.mark.parametrize(
  ("number", "text"),
  [(7, "7"), (999, "999"), (999.6, "1k"), (132_416, "132k"), (6.9e9, "6.9B"), (999_996e6, "1T"), (1e18, "1,000,000T")],
)
def test_counts_have_three_digits(number, text):
  assert short(number) == text
