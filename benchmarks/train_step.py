"""Times the training step of a config on random tokens:  python -m benchmarks.train_step --config=tiny

Any field can be set as in training, e.g. --config.model.remat=none. The roof is the rate of a large square matrix product
in the compute dtype, measured in the same process just before: on shared machines compare ratios, not seconds. --json=FILE
has the same numbers, is written after each step, and has MFU where the peak of the chip is known.
"""

import resource
import statistics
import time

from absl import flags

from benchmarks.results import write_json
from deepseek_jax.flags import define_config_flags, load_config, parse, run_program


def main(argv) -> int:
  values = flags.FlagValues()
  define_config_flags(values, "tiny")
  flags.DEFINE_integer("steps", 5, "steps to time, after one that compiles", lower_bound=1, flag_values=values)
  flags.DEFINE_string("json", None, "file of the results", flag_values=values)
  overrides = parse(argv, values, __doc__)
  config = load_config(values.config, overrides)

  import jax

  from deepseek_jax.mesh import check_x64, resolve_mesh

  check_x64(config.model)
  config = resolve_mesh(config, len(jax.devices()))
  # Virtual CPU devices share the cores that one of them measures.
  on_cpu = jax.default_backend() == "cpu"
  roof = matmul_rate(config.model, 2048 if on_cpu else 8192) * (1 if on_cpu else len(jax.devices()))

  def report(timed):
    if values.json:
      write_json(values.json, summary(config, roof, timed))

  print(table(summary(config, roof, time_steps(config, values.steps, report))))
  return 0


def summary(config, roof, timed) -> dict:
  """What the JSON has. Seconds are of a step, the median; without steps so far there is `compile_seconds` alone, and memory.

  `mfu`: of the bfloat16 peak, also in fp8; None where it is not known. `peak_bytes`: of a device, or on a CPU of the process.
  """
  import jax

  from deepseek_jax.plan.flops import count_parameters, training_flops
  from deepseek_jax.plan.topology import peak_flops

  device, parameters = jax.devices()[0], count_parameters(config.model)
  memory = device.memory_stats() or {}
  found = {
    "config": config.name, "precision": config.model.precision, "compute_dtype": config.model.compute_dtype,
    "parameters": parameters.total + parameters.mtp, "chip": device.device_kind, "devices": len(jax.devices()),
    "jax": jax.__version__, "compile_seconds": timed["compile"], "roof_flops_per_second": roof,
    "peak_bytes": memory.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024),
    "peak_bytes_of": "device" if memory else "process", "steps": len(timed["wall"]),
  }  # fmt: skip
  if not timed["wall"]:
    return found
  seconds, tokens = statistics.median(timed["wall"]), config.train.global_batch * config.data.seq
  rate = tokens * training_flops(config.model, config.data.seq).causal / seconds
  peak = peak_flops(device.device_kind)
  return found | {
    "seconds": seconds, "seconds_least": min(timed["wall"]), "seconds_most": max(timed["wall"]),
    "cpu_seconds": statistics.median(timed["cpu"]), "tokens_per_second": tokens / seconds, "model_flops_per_second": rate,
    "mfu": peak and rate / (peak * len(jax.devices())), "losses": timed["loss"],
  }  # fmt: skip


def table(s: dict) -> str:
  """A summary for people."""
  lines = [
    f"config            {s['config']} on {s['devices']} x {s['chip']}, jax {s['jax']}",
    f"wall a step       {s['seconds']:.4f} s median of {s['steps']} ({s['seconds_least']:.4f} to {s['seconds_most']:.4f})",
    f"CPU a step        {s['cpu_seconds']:.4f} s",
    f"tokens/s          {s['tokens_per_second']:,.0f}",
    f"model FLOP/s      {s['model_flops_per_second']:.4g} (causal attention, no recomputation)"
    + (f", MFU {s['mfu']:.1%}" if s["mfu"] else ""),
    f"matmul roof       {s['roof_flops_per_second']:.4g} FLOP/s in {s['compute_dtype']}; the step reaches "
    f"{s['model_flops_per_second'] / s['roof_flops_per_second']:.1%} of it",
    f"compile           {s['compile_seconds']:.1f} s",
    f"peak memory       {s['peak_bytes'] / 2**30:.2f} GiB{' (of the process)' if s['peak_bytes_of'] == 'process' else ''}",
  ]
  return "\n".join(lines)


def time_steps(config, steps, report=lambda timed: None):
  """Seconds of each of `steps` steps, "wall" and "cpu", and of their "compile"; what XLA says of the program, "cost"; and the
  "loss" of each step.

  The mesh sizes of `config` are resolved. Tokens are random. `report` is called with what is known so far, after each step.
  """
  import jax
  import numpy as np
  from jax.sharding import NamedSharding

  from deepseek_jax.mesh import make_mesh
  from deepseek_jax.model.transformer import graphdef
  from deepseek_jax.sharding import spec
  from deepseek_jax.training.schedule import schedules
  from deepseek_jax.training.state import init_state
  from deepseek_jax.training.step import make_train_step

  mesh, train = make_mesh(config.mesh), config.train
  with jax.set_mesh(mesh):
    state = jax.block_until_ready(jax.jit(init_state, static_argnums=0)(config, jax.random.key(0)))
    micro = train.microbatch or train.global_batch
    shape = (train.global_batch // micro, micro, config.data.seq + 1)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab, shape, np.int32)
    batch = jax.device_put(tokens, NamedSharding(mesh, spec(None, "batch", None)))
    step = make_train_step(config, graphdef(config.model), bos=0)
    step = jax.jit(step, donate_argnames="state", static_argnames="microbatches")
    now = {name: np.asarray(rate, config.model.param_dtype) for name, rate in schedules(config, 0, 0, 1).items()}
    started = time.perf_counter()
    compiled = step.lower(state, batch, shape[0], now).compile()
    timed = {
      "compile": time.perf_counter() - started,
      "cost": compiled.cost_analysis(),
      "wall": [],
      "cpu": [],
      "loss": [],
    }
    report(timed)
    state, _ = jax.block_until_ready(compiled(state, batch, now))
    for _ in range(steps):
      clocks = time.perf_counter(), time.process_time()
      state, metrics = jax.block_until_ready(compiled(state, batch, now))
      timed["wall"].append(time.perf_counter() - clocks[0])
      timed["cpu"].append(time.process_time() - clocks[1])
      timed["loss"].append(float(metrics["loss"]))
      report(timed)
  return timed


def matmul_rate(config, size=2048, repeats=5) -> float:
  """FLOP/s of one device on a [size, size] product as the model of `config` does it: the best of `repeats`."""
  import jax

  from deepseek_jax.model.linear import matmul_precision

  def square(a):
    with matmul_precision(config):
      return a @ a

  # Not ones: a GPU multiplies them faster than other numbers.
  a, product = jax.random.normal(jax.random.key(0), (size, size), config.compute_dtype), jax.jit(square)
  product(a).block_until_ready()
  best = float("inf")
  for _ in range(repeats):
    started = time.perf_counter()
    product(a).block_until_ready()
    best = min(best, time.perf_counter() - started)
  return 2 * size**3 / best


if __name__ == "__main__":
  run_program(main)
