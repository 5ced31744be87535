"""Starts a benchmark as a user does, at a size that takes seconds."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def benchmark(name, *arguments, codes=(0,)):
  """(stdout, stderr) of `python -m benchmarks.<name>` on one device, which ends with one of `codes`."""
  env = dict(os.environ)
  env["XLA_FLAGS"] = " ".join(flag for flag in env["XLA_FLAGS"].split() if "device_count" not in flag)
  env.pop("NPROC", None)
  done = subprocess.run(
    [sys.executable, "-m", f"benchmarks.{name}", *arguments],
    cwd=ROOT, env=env, capture_output=True, text=True, timeout=200,
  )  # fmt: skip
  assert done.returncode in codes, done.stderr
  return done.stdout, done.stderr
