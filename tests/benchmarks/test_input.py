"""The rate of the data pipeline, and errors of its arguments."""

import pytest

from benchmarks import input
from tests.benchmarks.programs import benchmark
from tests.end_to_end.test_run import call


def test_input(text, tmp_path):
  out, _ = benchmark("input", f"--source={text}", f"--cache={tmp_path}", "--seq=32", "--batch=4", "--steps=5")
  first, second = out.splitlines()
  assert first.startswith("windows of 32 tokens, batches of 4: ") and first.endswith(" million tokens per core-second")
  assert second.startswith("5 steps, 0.0 million tokens: ")


@pytest.mark.parametrize("argument", ["--steps=0", "--source=/no/such/folder"])
def test_input_says_what_is_wrong_in_one_line(argument):
  out = call(input.main, argument, code=2)
  assert out.startswith("error: ") and out.count("\n") == 1
