"""Cost of more experts at equal active parameters:  python -m benchmarks.experts --config=benchmarks/v3_24m.py

Times the training step of a config with 8, 16, 32 and 64 experts. The number of experts per token and their width stay.
XLA's cost analysis counts the body of a loop once, so the compiled FLOPs show whether work outside of loops grows. The
exit code is 1 if a step with more experts takes LIMITS times as much as a step with 8.
"""

import dataclasses
import statistics

from absl import flags

from benchmarks.train_step import time_steps
from deepseek_jax.flags import define_config_flags, load_config, parse, run_program

LIMITS = (1.6, 1.6, 1.3)  # ratios to 8 experts of wall time, CPU time and compiled FLOPs


def main(argv: list[str]) -> int:
  values = flags.FlagValues()
  define_config_flags(values, "benchmarks/v3_24m.py")
  flags.DEFINE_integer("steps", 5, "steps to time, after one that compiles", lower_bound=1, flag_values=values)
  overrides = parse(argv, values, __doc__)
  config = load_config(values.config, overrides)

  import jax

  from deepseek_jax.mesh import resolve_mesh

  config, baseline, failed = resolve_mesh(config, len(jax.devices())), None, False
  print("experts  wall time per step  CPU time per step  compiled FLOPs  (ratio to 8 experts)")
  for experts in (8, 16, 32, 64):
    moe = dataclasses.replace(config.model.moe, num_routed_experts=experts)
    timings = time_steps(dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe)), values.steps)
    costs = min(timings["wall"]), statistics.median(timings["cpu"]), timings["cost"]["flops"]
    baseline = baseline or costs
    ratios = [value / base for value, base in zip(costs, baseline, strict=True)]
    is_over = any(ratio >= limit for ratio, limit in zip(ratios, LIMITS, strict=True))
    print(
      f"{experts:7d}"
      + "".join(f"  {value:.4g} ({ratio:.2f})" for value, ratio in zip(costs, ratios, strict=True))
      + (f"  TOO MUCH: {', '.join(map(str, LIMITS))} times allowed" if is_over else "")
    )
    failed |= is_over
  return int(failed)


if __name__ == "__main__":
  run_program(main)
