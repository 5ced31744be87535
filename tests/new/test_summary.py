import pytest

from deepseek_jax.new.questions import parse_amount
from deepseek_jax.new.summary import exact


@pytest.mark.parametrize(
  ("number", "text"), [(2e9, "2e+09"), (24.0, "24"), (123456789.0, "123456789.0"), (0.1 + 0.2, "0.30000000000000004")]
)
def test_the_command_of_a_config_gives_its_numbers_again(number, text):
  assert exact(number) == text and parse_amount(text, "tokens", 1e16) == number
