"""Times of FP8 kernels: every row is printed, with its error."""

from benchmarks import fp8_matmul
from tests.benchmarks.programs import benchmark
from tests.end_to_end.test_run import call


def test_fp8_matmul():
  out, _ = benchmark("fp8_matmul", "--small")
  head, columns, *rows = out.splitlines()
  assert head.startswith("cpu, jax ") and columns.split() == ["ours", "bf16", "torch", "goal", "floor", "error"]
  names = [
    "forward or dgrad",
    "grouped",
    "grouped wgrad",
    "wgrad",
    "quantize both",
    "SwiGLU both",
    "linear layer",
  ]
  assert len(rows) == len(names) and all(row.startswith(name) for row, name in zip(rows, names, strict=True))
  errors = [float(row.split()[-1]) for row in rows[:-1]]
  assert all(error < bound for error, bound in zip(errors, (2e-3, 2e-3, 1e-6, 1e-6, 1e-9, 1e-9), strict=True)), errors


def test_fp8_matmul_goes_on_after_a_row_that_fails():
  out = call(fp8_matmul.main, "--small", "--implementation=pallas", code=1)
  rows = out.splitlines()[2:]
  assert len(rows) == 7 and all("failed: ValueError: " in row and "no Pallas kernel for cpu" in row for row in rows)
