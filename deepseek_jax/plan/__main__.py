"""Memory and step time, without accelerators:  python -m deepseek_jax.plan --config=v3 --topology=v5p:8x8x16

With libtpu (pip install 'jax[tpu]') the step is compiled for a TPU topology, which takes minutes; --analytic does not
compile. Any field of the config can be set: --config.mesh.fsdp=64. --timeline draws the order of a pipeline instead, and
needs no topology. Exit codes: 0, also if the step does not fit; 2 for a user error, such as a mesh that does not divide
the devices.
"""

import json
import os
import shutil
import sys

from absl import flags

from deepseek_jax.config import Config
from deepseek_jax.errors import ConfigError
from deepseek_jax.flags import define_config_flags, load_config, parse, run_program, write_output
from deepseek_jax.plan.topology import COMPILER_ENVIRONMENT, can_compile, parse_topology


def draw_timeline(config: Config) -> str:
  """The timeline of the config's pipeline. Raises ConfigError where it has none."""
  stages, train = config.mesh.stage, config.train
  if stages < 2:
    raise ConfigError(
      f"--timeline draws a pipeline, and mesh.stage={stages}: set the number of stages, for example --config.mesh.stage=4"
    )
  from deepseek_jax.parallel.schedule import Schedule
  from deepseek_jax.parallel.timeline import MAX_WIDTH, format_timeline

  microbatches = train.global_batch // (train.microbatch or train.global_batch)
  schedule = Schedule(stages, config.parallel.virtual_stages, microbatches)
  return format_timeline(schedule, shutil.get_terminal_size((MAX_WIDTH, 0)).columns)


def main(argv: list[str]) -> int:
  values = flags.FlagValues()
  define_config_flags(values)
  flags.DEFINE_string(
    "topology",
    None,
    "v5p:8x8x16 (chips), 2*v5p:8x8x8 (slices), v5e:16x16, v6e:8x8, tpu7x:4x4x4, h100:64x8 (nodes x GPUs), h200",
    flag_values=values,
  )
  flags.DEFINE_string(
    "json", None, "also write the plan to this file; - for stdout, and nothing else", flag_values=values
  )
  flags.DEFINE_boolean(
    "analytic", False, "count the traced step and do not compile, also with libtpu installed", flag_values=values
  )
  flags.DEFINE_boolean(
    "search", False, "try meshes, microbatches and remat policies, and rank them", flag_values=values
  )
  flags.DEFINE_boolean(
    "timeline", False, "draw what each stage of a pipeline (--config.mesh.stage) does in each tick, and nothing else; "
    "as wide as the terminal, or COLUMNS in the environment",
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_string("stage", None, "stage of training to plan, of a config that has `stages`", flag_values=values)
  overrides = parse(argv, values, __doc__)
  examples = {"config": "v3"} if values.timeline else {"config": "v3", "topology": "v5p:8x8x16"}
  for name, example in examples.items():
    if not values[name].value:
      raise ConfigError(f"--{name} is required, for example --{name}={example} (see --help)")
  topology = None if values.timeline else parse_topology(values.topology)
  compile = bool(topology and topology.is_tpu and can_compile() and not values.analytic)
  os.environ.update({"JAX_PLATFORMS": "cpu"} | (COMPILER_ENVIRONMENT if compile else {}))

  # Imported here, since --help and flag errors need no jax, and after the environment is set.
  from deepseek_jax.stages import find_stage, resolve_stages

  config = find_stage(resolve_stages(load_config(values.config, overrides)), values.stage or "").config
  if topology is None:
    print(draw_timeline(config))
    return 0

  from deepseek_jax.plan.plan import format_plan, make_plan
  from deepseek_jax.plan.search import format_ranking, search
  from deepseek_jax.training.step import abstract_step

  if values.search:
    plans = search(config, topology, abstract_step, compile, lambda line: print(line, file=sys.stderr))
    plan, text = plans[0], format_ranking(plans)
  else:
    plan = make_plan(config, topology, abstract_step, compile)
    text = format_plan(plan)
  if values.json != "-":
    print(text)
  if values.json:
    write_output(json.dumps(plan.to_json(), indent=2) + "\n", values.json)
  return 0


if __name__ == "__main__":
  run_program(main)
