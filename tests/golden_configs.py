"""Rewrites tests/golden/*.json from configs/*.py. Review the diff."""

import json
import pathlib
import sys

sys.path.insert(0, ".")
from deepseek_jax.flags import load_config
from deepseek_jax.schema import flatten_config

pathlib.Path("tests/golden").mkdir(exist_ok=True)
for path in sorted(pathlib.Path("configs").glob("*.py")):
  dump = json.dumps(flatten_config(load_config(str(path))), indent=1)
  pathlib.Path("tests/golden", path.stem + ".json").write_text(dump + "\n")
