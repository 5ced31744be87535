"""Compile time of the self-test for an H200, without a GPU:  python -m benchmarks.selftest_compilation --config=v3

Traces the config's step for an H200, makes the cases of the self-test, and compiles their kernels and XLA
implementations with jax's CUDA plugin, one after the other (in the environment of `make kernels`). Not included are
XLA's autotuning on a device, and running the programs. Seconds are CPU time. The self-test compiles up to BATCH cases
of selftest/child.py in parallel.
"""

import collections
import json
import os
import pathlib
import tempfile
import time

from absl import flags

from deepseek_jax.flags import define_config_flags, load_config, parse, run_program


def main(argv: list[str]) -> int:
  values = flags.FlagValues()
  define_config_flags(values, "v3")
  flags.DEFINE_string("json", None, "also write each case's seconds to this file", flag_values=values)
  overrides = parse(argv, values, __doc__)
  config = load_config(values.config, overrides)

  from tests.kernels import gpu_aot

  folder = pathlib.Path(tempfile.mkdtemp())
  gpu_aot.install_tools(folder)
  os.environ |= {"CUDA_ROOT": str(folder), "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
  os.environ.pop("JAX_PLATFORMS", None)

  import jax
  from jax.experimental import topologies

  from deepseek_jax.mesh import min_devices, resolve_mesh
  from deepseek_jax.model.linear import matmul_precision
  from deepseek_jax.selftest.cases import make_cases, program_calls
  from deepseek_jax.selftest.check import traceable_functions

  target = {"platform": "cuda", "topology_name": "h200", "topology": "1x1x1"}
  topology = topologies.get_topology_desc(target_config=gpu_aot.H200, **target)
  sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
  config = resolve_mesh(config, min_devices(config.mesh))
  clock = Clock()
  cases = make_cases(program_calls(config, jax.sharding.AbstractDevice("NVIDIA H200", 132, "gpu")))
  step_seconds = clock.lap()
  seconds: dict[str, dict[str, float]] = {}  # {case: {phase: CPU seconds}}
  for case in cases:
    inputs, forms = traceable_functions(case, lambda: matmul_precision(config.model))
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in inputs]
    phases = {"inputs": clock.lap()}
    for file, form in forms.items():
      lowered = jax.jit(form).trace(*shapes).lower(lowering_platforms=("cuda",))
      phases[f"{file} traced"] = clock.lap()
      lowered.compile()
      phases[f"{file} compiled"] = clock.lap()
    seconds[case.key] = phases
    print(
      f"{sum(phases.values()):6.1f} s  {', '.join(f'{k} {v:.1f}' for k, v in phases.items())}  {case.key}", flush=True
    )
  totals: collections.Counter[str] = collections.Counter()
  for phases in seconds.values():
    totals.update(phases)
  print(
    f"{len(cases)} cases, step traced {step_seconds:.1f} s, " + ", ".join(f"{k} {v:.1f} s" for k, v in totals.items())
  )
  if values.json:
    pathlib.Path(values.json).write_text(json.dumps({"step traced": step_seconds} | seconds, indent=1))
  return 0


class Clock:
  """A stopwatch of CPU time."""

  def __init__(self):
    self._last = time.process_time()

  def lap(self) -> float:
    """CPU seconds since the last call."""
    now = time.process_time()
    last, self._last = self._last, now
    return now - last


if __name__ == "__main__":
  run_program(main)
