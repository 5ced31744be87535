"""Plans a run on machines that are not here:  python -m deepseek_jax.plan --config=configs/v3.py --topology=v5p:8x8x16

With libtpu (pip install 'jax[tpu]') a TPU's step is compiled, which takes minutes; --analytic does without. Any field of the config
can be set: --config.mesh.fsdp=64. Exit codes: 0, also where it does not fit; 2 for a mesh that cannot work.
"""

import json
import os
import sys

from absl import flags

from deepseek_jax.errors import ConfigError
from deepseek_jax.flags import load_config, parse, run_program, write_output
from deepseek_jax.plan.topology import COMPILER_ENVIRONMENT, can_compile
from deepseek_jax.plan.topology import parse as parse_topology


def main(argv) -> int:
  values = flags.FlagValues()
  flags.DEFINE_string("config", None, "a config file: configs/NAME.py, or a JSON", flag_values=values)
  flags.DEFINE_string(
    "topology",
    None,
    "what to plan for: v5p:8x8x16 (chips), 2*v5p:8x8x8 (slices), v5e:16x16, v6e:8x8, tpu7x:4x4x4, h100:64x8 (nodes x GPUs), h200",
    flag_values=values,
  )
  flags.DEFINE_string(
    "json", None, "also write the plan to this file; - for stdout, and nothing else", flag_values=values
  )
  flags.DEFINE_boolean("analytic", False, "do not compile, even where libtpu is installed", flag_values=values)
  flags.DEFINE_boolean(
    "search", False, "try meshes, microbatches and remat policies, and print the best", flag_values=values
  )
  overrides = parse(argv, values, __doc__)
  for name, example in (("config", "configs/v3.py"), ("topology", "v5p:8x8x16")):
    if not values[name].value:
      raise ConfigError(f"--{name}=.. says what to plan, e.g. --{name}={example} (see --help)")
  topology, config = parse_topology(values.topology), load_config(values.config, overrides)
  compile = topology.is_tpu and can_compile() and not values.analytic
  os.environ.update({"JAX_PLATFORMS": "cpu"} | (COMPILER_ENVIRONMENT if compile else {}))

  # Imported late: --help and bad flags need no jax.
  from deepseek_jax.plan.plan import make_plan, table
  from deepseek_jax.plan.search import ranking, search
  from deepseek_jax.training.step import abstract_step

  if values.search:
    told = lambda text: print(text, file=sys.stderr)
    plans = search(config, topology, abstract_step, compile, told)
    plan, text = plans[0], ranking(plans)
  else:
    plan = make_plan(config, topology, abstract_step, compile)
    text = table(plan)
  if values.json != "-":
    print(text)
  if values.json:
    write_output(json.dumps(plan.json(), indent=2) + "\n", values.json)
  return 0


if __name__ == "__main__":
  run_program(main)
