"""Times the training step of a config on random tokens:  python -m benchmarks.train_step --config=configs/tiny.py

Any field can be set as in training, e.g. --config.model.remat=none. The roof is the rate of a large square matrix product
in the compute dtype, measured in the same process just before: on shared machines compare ratios, not seconds.
"""

import resource
import statistics
import time

from absl import flags

from deepseek_jax.flags import load_config, parse, run_program


def main(argv) -> int:
  values = flags.FlagValues()
  flags.DEFINE_string("config", "configs/tiny.py", "a config file", flag_values=values)
  flags.DEFINE_integer("steps", 5, "steps to time, after one that compiles", lower_bound=1, flag_values=values)
  overrides = parse(argv, values, __doc__)
  config = load_config(values.config, overrides)

  import jax

  from deepseek_jax.mesh import check_x64, resolve_mesh
  from deepseek_jax.plan.flops import training_flops

  check_x64(config.model)
  config = resolve_mesh(config, len(jax.devices()))
  # Virtual CPU devices share the cores that one of them measures.
  roof = matmul_rate(config.model) * (1 if jax.default_backend() == "cpu" else len(jax.devices()))
  timed = time_steps(config, values.steps)
  seconds, tokens = statistics.median(timed["wall"]), config.train.global_batch * config.data.seq
  flops = tokens * training_flops(config.model, config.data.seq).causal / seconds
  device = jax.devices()[0]
  memory = device.memory_stats() or {}
  peak = memory.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
  print(f"config            {config.name} on {len(jax.devices())} x {device.device_kind}, jax {jax.__version__}")
  print(
    f"wall a step       {seconds:.4f} s median of {values.steps} ({min(timed['wall']):.4f} to {max(timed['wall']):.4f})"
  )
  print(f"CPU a step        {statistics.median(timed['cpu']):.4f} s")
  print(f"tokens/s          {tokens / seconds:,.0f}")
  print(f"model FLOP/s      {flops:.4g} (causal attention, no recomputation)")
  print(
    f"matmul roof       {roof:.4g} FLOP/s in {config.model.compute_dtype}; the step reaches {flops / roof:.1%} of it"
  )
  print(f"compile           {timed['compile']:.1f} s")
  print(f"peak memory       {peak / 2**30:.2f} GiB{'' if memory else ' (of the process)'}")
  return 0


def time_steps(config, steps):
  """Seconds of each of `steps` steps, "wall" and "cpu", and of their "compile"; and what XLA says of the program, "cost".

  The mesh sizes of `config` are resolved. Tokens are random.
  """
  import jax
  import numpy as np
  from jax.sharding import NamedSharding

  from deepseek_jax.mesh import make_mesh
  from deepseek_jax.model.transformer import graphdef
  from deepseek_jax.sharding import spec
  from deepseek_jax.training.schedule import rates
  from deepseek_jax.training.state import new_state
  from deepseek_jax.training.step import make_train_step

  mesh, train = make_mesh(config.mesh), config.train
  with jax.set_mesh(mesh):
    state = jax.block_until_ready(jax.jit(new_state, static_argnums=0)(config, jax.random.key(0)))
    micro = train.microbatch or train.global_batch
    shape = (train.global_batch // micro, micro, config.data.seq + 1)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab, shape, np.int32)
    batch = jax.device_put(tokens, NamedSharding(mesh, spec(None, "batch", None)))
    step = make_train_step(config, graphdef(config.model), bos=0)
    step = jax.jit(step, donate_argnames="state", static_argnames="microbatches")
    now = {name: np.asarray(rate, config.model.param_dtype) for name, rate in rates(config, 0, 0, 1).items()}
    started = time.perf_counter()
    compiled = step.lower(state, batch, shape[0], now).compile()
    timed = {"compile": time.perf_counter() - started, "cost": compiled.cost_analysis(), "wall": [], "cpu": []}
    state, _ = jax.block_until_ready(compiled(state, batch, now))
    for _ in range(steps):
      clocks = time.perf_counter(), time.process_time()
      state, _ = jax.block_until_ready(compiled(state, batch, now))
      timed["wall"].append(time.perf_counter() - clocks[0])
      timed["cpu"].append(time.process_time() - clocks[1])
  return timed


def matmul_rate(config, size=2048, repeats=5) -> float:
  """FLOP/s of one device on a [size, size] product as the model of `config` does it: the best of `repeats`."""
  import jax
  import jax.numpy as jnp

  from deepseek_jax.model.linear import matmul_precision

  def square(a):
    with matmul_precision(config):
      return a @ a

  a, product = jnp.ones((size, size), config.compute_dtype), jax.jit(square)
  product(a).block_until_ready()
  best = float("inf")
  for _ in range(repeats):
    started = time.perf_counter()
    product(a).block_until_ready()
    best = min(best, time.perf_counter() - started)
  return 2 * size**3 / best


if __name__ == "__main__":
  run_program(main)
