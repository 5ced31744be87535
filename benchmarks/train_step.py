"""Times the training step of a config on random tokens:  python -m benchmarks.train_step --config=tiny

Any field can be set as in training, e.g. --config.model.remat=none. The roof is the FLOP/s of a large square matmul in
the compute dtype, measured in the same process just before. On shared machines compare ratios to it, not seconds.
--json=FILE has the same numbers, and MFU if the peak FLOP/s of the chip are known. It is written after each step.
"""

import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

from absl import flags

from benchmarks.results import write_json
from deepseek_jax.config import Config
from deepseek_jax.console import format_bytes
from deepseek_jax.flags import define_config_flags, load_config, parse, run_program
from deepseek_jax.model_config import ModelConfig


def main(argv: list[str]) -> int:
  values = flags.FlagValues()
  define_config_flags(values, "tiny")
  flags.DEFINE_integer("steps", 5, "steps to time, after one that compiles", lower_bound=1, flag_values=values)
  flags.DEFINE_string("json", None, "file of the results", flag_values=values)
  overrides = parse(argv, values, __doc__)
  config = load_config(values.config, overrides)

  import jax

  from deepseek_jax.cpu_backend import keep_freed_memory
  from deepseek_jax.mesh import check_x64, resolve_mesh

  check_x64(config.model)
  config = resolve_mesh(config, len(jax.devices()))
  on_cpu = jax.default_backend() == "cpu"
  if on_cpu:
    keep_freed_memory()  # as a run does
  # Virtual CPU devices share the same cores: one device measures all of them.
  roof = matmul_flops_per_second(config.model, 2048 if on_cpu else 8192) * (1 if on_cpu else len(jax.devices()))

  def report(timings):
    if values.json:
      write_json(values.json, summarize(config, roof, timings))

  print(format_summary(summarize(config, roof, time_steps(config, values.steps, report))))
  return 0


def summarize(config: Config, roof: float, timings: dict[str, Any]) -> dict[str, Any]:
  """The content of --json. Seconds are of one step; `seconds` and `cpu_seconds` are medians.

  Before the first step there are no step times. `mfu` is relative to the bfloat16 peak, with FP8 GEMMs too; None if the
  peak is not known. `peak_bytes` is of a device, or of the process on a CPU.

  Args:
    roof: FLOP/s of a large matmul on all devices.
    timings: of `time_steps`.
  """
  import jax

  from deepseek_jax.plan.flops import count_parameters, training_flops
  from deepseek_jax.plan.topology import peak_flops

  device, parameters = jax.devices()[0], count_parameters(config.model)
  memory = device.memory_stats() or {}
  summary = {
    "config": config.name, "precision": config.model.precision, "compute_dtype": config.model.compute_dtype,
    "parameters": parameters.total + parameters.mtp, "chip": device.device_kind, "devices": len(jax.devices()),
    "jax": jax.__version__, "compile_seconds": timings["compile"], "roof_flops_per_second": roof,
    "peak_bytes": memory.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024),
    "peak_bytes_of": "device" if memory else "process", "steps": len(timings["wall"]),
  }  # fmt: skip
  if not timings["wall"]:
    return summary
  seconds, tokens = statistics.median(timings["wall"]), config.train.global_batch * config.data.seq
  rate = tokens * training_flops(config.model, config.data.seq).causal / seconds
  peak = peak_flops(device.device_kind)
  return summary | {
    "seconds": seconds, "seconds_least": min(timings["wall"]), "seconds_most": max(timings["wall"]),
    "cpu_seconds": statistics.median(timings["cpu"]), "tokens_per_second": tokens / seconds, "model_flops_per_second": rate,
    "mfu": peak and rate / (peak * len(jax.devices())), "losses": timings["loss"],
  }  # fmt: skip


def format_summary(s: dict[str, Any]) -> str:
  """The lines that the command prints."""
  lines = [
    f"config            {s['config']} on {s['devices']} x {s['chip']}, jax {s['jax']}",
    f"wall time/step    {s['seconds']:.4f} s median of {s['steps']} ({s['seconds_least']:.4f} to {s['seconds_most']:.4f})",
    f"CPU time/step     {s['cpu_seconds']:.4f} s",
    f"tokens/s          {s['tokens_per_second']:,.0f}",
    f"model FLOP/s      {s['model_flops_per_second']:.4g} (causal attention, no recomputation)"
    + (f", MFU {s['mfu']:.1%}" if s["mfu"] else ""),
    f"matmul roof       {s['roof_flops_per_second']:.4g} FLOP/s in {s['compute_dtype']}; the step reaches "
    f"{s['model_flops_per_second'] / s['roof_flops_per_second']:.1%} of it",
    f"compile           {s['compile_seconds']:.1f} s",
    f"peak memory       {format_bytes(s['peak_bytes'])}{' (of the process)' if s['peak_bytes_of'] == 'process' else ''}",
  ]
  return "\n".join(lines)


def time_steps(config: Config, steps: int, report: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
  """Times training steps on random tokens, after one step that is not timed.

  Args:
    config: with resolved mesh sizes.
    report: is called with the result so far, after compilation and after each step.

  Returns:
    {"compile": seconds, "cost": XLA's cost analysis, and lists with an entry per step: "wall": seconds, "cpu": seconds
    of CPU time, "loss"}.
  """
  import jax
  import numpy as np
  from jax.sharding import NamedSharding

  from deepseek_jax.cpu_backend import quick_compile_options
  from deepseek_jax.mesh import make_mesh
  from deepseek_jax.model.transformer import graphdef
  from deepseek_jax.sharding import spec
  from deepseek_jax.training.schedule import StepInputs
  from deepseek_jax.training.state import init_state
  from deepseek_jax.training.step import make_train_step
  from deepseek_jax.training.step_config import StepConfig

  mesh, train, step_config = make_mesh(config.mesh), config.train, StepConfig.of(config, bos=0)
  with jax.set_mesh(mesh):
    init = jax.jit(init_state, static_argnums=0, compiler_options=quick_compile_options())
    state = jax.block_until_ready(init(step_config, jax.random.key(0)))
    microbatch = train.microbatch or train.global_batch
    shape = (train.global_batch // microbatch, microbatch, config.data.seq + 1)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab, shape, np.int32)
    batch = jax.device_put(tokens, NamedSharding(mesh, spec(None, "batch", None)))
    step = make_train_step(step_config, graphdef(config.model))
    step = jax.jit(step, donate_argnames="state", static_argnames="microbatches")
    inputs = StepInputs.at(config, 0, 0, 1).as_arrays(config.model.param_dtype)
    start = time.perf_counter()
    compiled = step.lower(state, batch, shape[0], inputs).compile()
    timings: dict[str, Any] = {
      "compile": time.perf_counter() - start,
      "cost": compiled.cost_analysis(),
      "wall": [],
      "cpu": [],
      "loss": [],
    }
    report = report or (lambda timings: None)
    report(timings)
    state, _ = jax.block_until_ready(compiled(state, batch, inputs))
    for _ in range(steps):
      wall_start, cpu_start = time.perf_counter(), time.process_time()
      state, metrics = jax.block_until_ready(compiled(state, batch, inputs))
      timings["wall"].append(time.perf_counter() - wall_start)
      timings["cpu"].append(time.process_time() - cpu_start)
      timings["loss"].append(float(metrics["loss"]))
      report(timings)
  return timings


def matmul_flops_per_second(config: ModelConfig, size: int = 2048, repeats: int = 5) -> float:
  """FLOP/s of one device on a [size, size] matmul in the model's compute dtype and precision: the best of `repeats`."""
  import jax

  from deepseek_jax.model.linear import matmul_precision

  def square(a):
    with matmul_precision(config):
      return a @ a

  # Random numbers, since a GPU multiplies ones faster.
  a, matmul = jax.random.normal(jax.random.key(0), (size, size), config.compute_dtype), jax.jit(square)
  matmul(a).block_until_ready()
  best = float("inf")
  for _ in range(repeats):
    start = time.perf_counter()
    matmul(a).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return 2 * size**3 / best


if __name__ == "__main__":
  run_program(main)
