"""Rewrites tests/golden/*.json from the defaults and configs/*.py. Review the diff."""

import dataclasses
import json
import pathlib
import sys

sys.path.insert(0, ".")
from deepseek_jax.config import Config
from deepseek_jax.flags import load_config
from deepseek_jax.schema import flatten_config


def of_stage(stage):
  """What a stage of training sets, as JSON."""
  return {name: value for name, value in dataclasses.asdict(stage).items() if value}


def golden_dumps():
  """{name: {field: value}}: every default, and of each config what differs from it."""
  defaults = json.loads(json.dumps(flatten_config(Config())))
  dumps = {"defaults": defaults}
  for path in sorted(pathlib.Path(__file__).parents[1].joinpath("configs").glob("*.py")):
    fields = json.loads(json.dumps(flatten_config(load_config(str(path))), default=of_stage))
    dumps[path.stem] = {name: value for name, value in fields.items() if value != defaults[name]}
  return dumps


if __name__ == "__main__":
  for name, dump in golden_dumps().items():
    pathlib.Path("tests/golden", name + ".json").write_text(json.dumps(dump, indent=1) + "\n")
