"""What more experts cost at equal active size:  python -m benchmarks.experts --config=benchmarks/v3_24m.py

Times the training step of a config with 8, 16, 32 and 64 experts, of which a token still passes as many, of the same width.
Loops count once in what XLA says of a program: its FLOPs show that none of the work outside them grows. The exit code is 1
if a step of more experts takes LIMITS times what one of 8 takes.
"""

import dataclasses
import statistics

from absl import flags

from benchmarks.train_step import time_steps
from deepseek_jax.flags import define_config_flags, load_config, parse, run_program

LIMITS = (1.6, 1.6, 1.3)  # times the wall time, the CPU time and the compiled FLOPs with 8 experts


def main(argv) -> int:
  values = flags.FlagValues()
  define_config_flags(values, "benchmarks/v3_24m.py")
  flags.DEFINE_integer("steps", 5, "steps to time, after one that compiles", lower_bound=1, flag_values=values)
  overrides = parse(argv, values, __doc__)
  config = load_config(values.config, overrides)

  import jax

  from deepseek_jax.mesh import resolve_mesh

  config, first, failed = resolve_mesh(config, len(jax.devices())), None, False
  print("experts  wall a step  CPU a step  compiled FLOPs  (times those of 8)")
  for experts in (8, 16, 32, 64):
    moe = dataclasses.replace(config.model.moe, num_routed_experts=experts)
    timed = time_steps(dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe)), values.steps)
    now = min(timed["wall"]), statistics.median(timed["cpu"]), timed["cost"]["flops"]
    first = first or now
    growth = [value / one for value, one in zip(now, first, strict=True)]
    over = any(times >= limit for times, limit in zip(growth, LIMITS, strict=True))
    print(
      f"{experts:7d}"
      + "".join(f"  {value:.4g} ({times:.2f})" for value, times in zip(now, growth, strict=True))
      + (f"  TOO MUCH: {', '.join(map(str, LIMITS))} times allowed" if over else "")
    )
    failed |= over
  return int(failed)


if __name__ == "__main__":
  run_program(main)
