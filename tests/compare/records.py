"""Folders of runs as training writes them, without training."""

import dataclasses
import json
import math

from deepseek_jax.flags import load_config
from deepseek_jax.training.metrics import JsonlWriter

FLOPS_PER_TOKEN = 1e6
TOKENS_PER_STEP = 2048


def write_run(folder, overrides=None, final=4.0, steps=40, end="finished", evals=(20, 40), config="tiny", **extra):
  """A run of `steps` updates whose held-out bits per byte end at `final`; extra: more metrics, functions of the step."""
  folder.mkdir(parents=True, exist_ok=True)
  config = load_config(config, {"train.steps": steps, **(overrides or {})})
  (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
  writer = JsonlWriter(folder, resume_step=0)
  writer.event("start", 0, devices="1 x cpu", parameters=1234)
  for step in range(1, steps + 1):
    bits = final + 1 / step
    values = {"loss": bits * math.log(2), "bits_per_byte": bits, "tokens": step * TOKENS_PER_STEP, "skipped": 0}
    values |= {"step_seconds": 0.5, "data_seconds": 0.25, "eval_seconds": 3.0, "tokens_per_second": 1000.0}
    values |= {"model_flops_per_second": 1000.0 * FLOPS_PER_TOKEN} | {k: f(step) for k, f in extra.items()}
    writer.write(step, values, {})
    if step in evals:
      bits = final + (steps - step) / steps
      writer.event("eval", step, loss=bits * math.log(2), bits_per_byte=bits, sequences=64)
  if end:
    writer.event("end", steps, reason=end)
  writer.close()
  return folder


def write_seeds(folder, name, finals, overrides=None, **rest):
  """Runs NAME-SEED with the `finals` {seed: held-out bits per byte}."""
  for seed, final in finals.items():
    write_run(folder / f"{name}-{seed}", {"seed": seed, **(overrides or {})}, final, **rest)
