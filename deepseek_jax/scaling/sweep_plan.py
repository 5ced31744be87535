"""The runs of a sweep, planned before any of them starts: budgets, allocations, shapes, batch sizes and learning rates."""

import dataclasses
import json
import math
import os
import re
from typing import Any

from deepseek_jax.config import Config
from deepseek_jax.errors import ConfigError
from deepseek_jax.scaling.counting import count_params, nonembedding_flops_per_token
from deepseek_jax.scaling.laws import DEEPSEEK_ALLOCATION, AllocationLaw, HyperparamLaw, TrainingRun
from deepseek_jax.scaling.shapes import MoEVariant, find_shape
from deepseek_jax.schema import flatten_config, from_dict, with_leaves

VERSION = 1
PLAN_FILE = "plan.json"  # in the folder of a sweep
MIN_STEPS = 300  # below it a loss is one of the warm-up, and no profile is a parabola
FLOPS_TOLERANCE = 0.01
RUN_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")


@dataclasses.dataclass(frozen=True)
class PlannedRun:
  """A run of a sweep. Columns of the table of runs have these names.

  Attributes:
    budget: FLOPs that were asked for. `flops`: those that it realises, M * tokens.
    M: non-embedding FLOPs per token in DeepSeek's convention.
    params, params_active, params_nonembedding: see `ModelParameters`; the last is of the active ones.
    overrides: {path of a config field: value}, on top of the plan's base config.
  """

  run_id: str
  budget: float
  flops: float
  M: float
  params: int
  params_active: int
  params_nonembedding: int
  tokens: int
  n_layer: int
  d_model: int
  seq_len: int
  batch_tokens: int
  lr: float
  seed: int
  experts: int
  granularity: int
  overrides: dict[str, Any]

  @property
  def steps(self) -> int:
    """Updates of the run."""
    return self.tokens // self.batch_tokens


@dataclasses.dataclass(frozen=True)
class SweepPlan:
  """The runs of a sweep, and what they have in common.

  Attributes:
    base: the config that each run's overrides change, as nested dicts.
    law: name of the law that gave batch sizes and learning rates.
    left_out: why allocations have no run, a line each.
    prediction: of `preregister`; None: there is none.
  """

  base: dict[str, Any]
  law: str
  runs: tuple[PlannedRun, ...]
  left_out: tuple[str, ...] = ()
  prediction: dict[str, Any] | None = None

  @property
  def flops(self) -> float:
    """FLOPs of all runs."""
    return sum(run.flops for run in self.runs)

  def config(self, run: PlannedRun) -> Config:
    """The config of a run. Raises ConfigError where it is none."""
    return from_dict(Config, with_leaves(self.base, run.overrides))

  def to_json(self) -> dict[str, Any]:
    """The content of a plan's file."""
    return {"version": VERSION, **dataclasses.asdict(self)}

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes the plan, in one step. Raises ConfigError where it cannot be written."""
    try:
      with open(f"{path}.partial", "w", encoding="utf-8") as file:
        json.dump(self.to_json(), file, indent=1)
        file.write("\n")
      os.replace(file.name, path)
    except OSError as error:
      raise ConfigError(f"--out={path} cannot be written: {error.strerror}") from None


def load_plan(path: str | os.PathLike[str]) -> SweepPlan:
  """Reads a plan and checks it, the config of each run included. Raises ConfigError."""
  try:
    with open(path, encoding="utf-8") as file:
      tree = json.load(file)
  except OSError as error:
    raise ConfigError(f"--plan={path} cannot be read: {error.strerror}; scaling plan --out={path} writes one") from None
  except ValueError as error:
    raise ConfigError(f"--plan={path} is not JSON: {error}; scaling plan --out={path} writes one") from None
  if not isinstance(tree, dict) or tree.get("version") != VERSION:
    raise ConfigError(f"--plan={path} is no plan of version {VERSION}: write one with scaling plan --out={path}")
  try:
    runs = tuple(PlannedRun(**run) for run in tree["runs"])
    plan = SweepPlan(tree["base"], tree["law"], runs, tuple(tree["left_out"]), tree["prediction"])
    for run in runs:
      plan.config(run)
  except (KeyError, TypeError, AttributeError) as error:
    raise ConfigError(f"--plan={path} is damaged: {error}; write it again with scaling plan --out={path}") from None
  ids = [run.run_id for run in runs]
  wrong = next((i for i in ids if ids.count(i) > 1 or not isinstance(i, str) or not RUN_ID.fullmatch(i)), None)
  if wrong is not None:
    raise ConfigError(f"--plan={path}: run_id {wrong!r} is there twice, or is no name of a folder; rename it")
  return plan


@dataclasses.dataclass(frozen=True)
class SweepOptions:
  """What a sweep varies.

  Attributes:
    budgets: FLOPs.
    per_budget: allocations of each, on a log grid of the model scale around the optimum of `allocation`.
    span: the grid goes from the optimum over `span` to `span` times it.
    seeds: of the allocation nearest to the optimum; the others have one.
    lr_scale, batch_scale: factors of what the law gives.
    grid_budget: the budget whose central allocation also has a grid of learning rates and batches; 0: none.
    grid_lr, grid_batch: factors of that grid.
    batch_multiple: sequences of a batch are a multiple of it, as of the devices that share it.
    variants: of a mixture of experts; each has all the allocations.
  """

  budgets: tuple[float, ...]
  per_budget: int = 10
  span: float = 4.0
  seeds: int = 1
  lr_scale: float = 1.0
  batch_scale: float = 1.0
  grid_budget: float = 0.0
  grid_lr: tuple[float, ...] = (0.5, 1.0, 2.0)
  grid_batch: tuple[float, ...] = (0.5, 1.0, 2.0)
  batch_multiple: int = 1
  variants: tuple[MoEVariant, ...] = (MoEVariant(),)
  allocation: AllocationLaw = DEEPSEEK_ALLOCATION

  def __post_init__(self) -> None:
    positive = {"span": self.span, "lr_scale": self.lr_scale, "batch_scale": self.batch_scale}
    positive |= {"per_budget": self.per_budget, "seeds": self.seeds, "batch_multiple": self.batch_multiple}
    lists = {"budgets": self.budgets, "grid_lr": self.grid_lr, "grid_batch": self.grid_batch}
    wrong = [(k, v) for k, v in positive.items() if not (v > 0 and math.isfinite(v))]
    wrong += [(k, x) for k, values in lists.items() for x in values if not (x > 0 and math.isfinite(x))]
    if wrong or not self.budgets:
      name, value = wrong[0] if wrong else ("budgets", "none")
      raise ConfigError(f"--{name} must be positive and finite, got {value}")
    if self.grid_budget and self.grid_budget not in self.budgets:
      given = ", ".join(f"{b:g}" for b in self.budgets)
      raise ConfigError(f"--grid_budget={self.grid_budget:g} is not one of --budgets: {given}")


def plan_sweep(base: Config, law: HyperparamLaw, options: SweepOptions) -> SweepPlan:
  """The runs of a sweep on the data, schedule and model kind of `base`.

  Each realises its budget to FLOPS_TOLERANCE with MIN_STEPS updates at least, of a batch that the law gives or, where the
  tokens are too few for that, of a smaller one.
  """
  runs: dict[str, PlannedRun] = {}
  left_out: list[str] = []
  for variant in options.variants:
    for budget in options.budgets:
      optimum = options.allocation.optimal(budget).scale
      for target, is_center in _scale_grid(optimum, options.per_budget, options.span):
        seeds = options.seeds if is_center else 1
        pairs = [(1.0, 1.0)]
        if is_center and budget == options.grid_budget:
          pairs += [(x, y) for x in options.grid_lr for y in options.grid_batch if (x, y) != (1.0, 1.0)]
        model = find_shape(base.model, base.data.seq, target, variant)
        if model is None:
          left_out.append(f"{budget:.3g} FLOPs, M {target:.3g}: no shape within 20% of that scale")
          continue
        for seed, (lr_factor, batch_factor) in [(s, (1.0, 1.0)) for s in range(seeds)] + [(0, p) for p in pairs[1:]]:
          config, flops = _run_config(base, model, budget, law, options, seed, lr_factor, batch_factor)
          if config is None:
            left_out.append(f"{budget:.3g} FLOPs, M {target:.3g}: fewer than {MIN_STEPS} steps of one sequence")
            continue
          run = _planned_run(base, config, budget, flops, variant, lr_factor, batch_factor)
          if run.run_id in runs:
            left_out.append(f"{budget:.3g} FLOPs, M {target:.3g}: the nearest shape is that of {run.run_id}")
          runs.setdefault(run.run_id, run)
  return SweepPlan(
    dataclasses.asdict(base), law.name, tuple(sorted(runs.values(), key=lambda r: r.flops)), tuple(left_out)
  )


def _scale_grid(optimum: float, count: int, span: float) -> list[tuple[float, bool]]:
  """(scale, whether it is the central one) on a log grid from optimum / span to optimum * span."""
  if count == 1:
    return [(optimum, True)]
  factors = [span ** (2 * i / (count - 1) - 1) for i in range(count)]
  return [(optimum * factor, i == (count - 1) // 2) for i, factor in enumerate(factors)]


def _run_config(
  base: Config, model: Any, budget: float, law: HyperparamLaw, options: SweepOptions, seed: int,
  lr_factor: float, batch_factor: float,
) -> tuple[Config | None, float]:  # fmt: skip
  """(the config of a run, its FLOPs); None where it would have too few steps."""
  seq, multiple, microbatch = base.data.seq, options.batch_multiple, base.train.microbatch
  scale = nonembedding_flops_per_token(model, seq=seq)
  tokens = budget / scale
  about = TrainingRun(budget, count_params(model).active_nonembedding, tokens)
  wanted = law.batch_tokens(about) * options.batch_scale * batch_factor / seq
  if microbatch and wanted > microbatch:  # as many microbatches of one size as keep each within the base's
    multiple *= math.ceil(wanted / microbatch)
  largest = math.floor(tokens / (seq * MIN_STEPS) / multiple) * multiple
  batch = min(max(multiple, round(wanted / multiple) * multiple), largest)
  if batch < 1:
    return None, 0.0
  steps = max(MIN_STEPS, round(tokens / (seq * batch)))
  flops = scale * steps * batch * seq
  if abs(flops / budget - 1) > FLOPS_TOLERANCE:
    return None, flops
  peak = law.lr(about) * options.lr_scale * lr_factor
  return with_length(base, model, steps, batch, float(f"{peak:.6g}"), seed), flops


def with_length(base: Config, model: Any, steps: int, batch: int, peak: float, seed: int) -> Config:
  """`base` with this model, as many steps of this batch, and all that is counted in steps or tokens in proportion."""
  schedule, train = base.schedule, base.train
  tokens = steps * batch * base.data.seq
  base_tokens = schedule.tokens or train.steps * train.global_batch * base.data.seq
  warmup = schedule.warmup_steps or round(schedule.warmup_tokens / (train.global_batch * base.data.seq))
  microbatches = math.ceil(batch / train.microbatch) if train.microbatch else 1
  microbatch = batch // microbatches if microbatches > 1 and batch % microbatches == 0 else 0
  return dataclasses.replace(
    base, model=model, seed=seed,
    # 2,000 steps of warm-up are for runs of hundreds of thousands.
    schedule=dataclasses.replace(
      schedule, peak=peak, steps=steps, tokens=0, warmup_steps=min(warmup, steps // 10), warmup_tokens=0
    ),
    train=dataclasses.replace(
      train, steps=steps, global_batch=batch, microbatch=microbatch, batch_ramp_from=0, batch_ramp_tokens=0
    ),
    balance=dataclasses.replace(
      base.balance, bias_update_tokens=_in_proportion(base.balance.bias_update_tokens, tokens, base_tokens)
    ),
    mtp=dataclasses.replace(
      base.mtp, tokens=tuple(_in_proportion(t, tokens, base_tokens) for t in base.mtp.tokens)
    ),
    checkpoint=dataclasses.replace(base.checkpoint, every=max(100, steps // 4), keep=1, keep_every=0),
    eval=dataclasses.replace(base.eval, every=steps),
    log=dataclasses.replace(base.log, every=max(1, steps // 50), tensorboard=False),
    sample=dataclasses.replace(base.sample, max_tokens=0),
  )  # fmt: skip


def _in_proportion(tokens: int, total: int, base_total: int) -> int:
  return max(1, round(tokens * total / base_total)) if tokens else 0


def _planned_run(
  base: Config, config: Config, budget: float, flops: float, variant: MoEVariant, lr_factor: float, batch_factor: float
) -> PlannedRun:
  model, train = config.model, config.train
  counts, batch_tokens = count_params(model), train.global_batch * config.data.seq
  parts = [f"{budget:.3g}".replace("+", ""), f"l{model.layers}", f"d{model.embed}"]
  parts += [f"e{variant.experts}"] * bool(variant.experts) + [f"g{variant.granularity}"] * bool(variant.granularity)
  parts += [f"lr{lr_factor:g}", f"b{batch_factor:g}"] if (lr_factor, batch_factor) != (1.0, 1.0) else []
  run_id = "-".join([*parts, f"s{config.seed}"])
  config = dataclasses.replace(config, name=run_id)
  before, after = flatten_config(base), flatten_config(config)
  return PlannedRun(
    run_id=run_id, budget=budget, flops=flops, M=flops / (train.steps * batch_tokens), params=counts.total,
    params_active=counts.active, params_nonembedding=counts.active_nonembedding, tokens=train.steps * batch_tokens,
    n_layer=model.layers, d_model=model.embed, seq_len=config.data.seq, batch_tokens=batch_tokens,
    lr=config.schedule.peak, seed=config.seed, experts=model.moe.num_routed_experts,
    granularity=variant.granularity, overrides={k: v for k, v in after.items() if before[k] != v},
  )  # fmt: skip
