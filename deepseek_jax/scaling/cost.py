"""What a sweep costs before it runs, and the size to train for a number of tokens or of hours."""

import dataclasses
import math
import statistics
import tempfile
from collections.abc import Sequence
from typing import Any

from deepseek_jax.config import Config
from deepseek_jax.errors import ConfigError
from deepseek_jax.model_config import ModelConfig
from deepseek_jax.scaling.allocation import AllocationEstimate
from deepseek_jax.scaling.counting import count_params, nonembedding_flops_per_token
from deepseek_jax.scaling.intervals import Interval
from deepseek_jax.scaling.laws import HyperparamLaw, TrainingRun
from deepseek_jax.scaling.shapes import find_shape
from deepseek_jax.scaling.sweep_plan import PlannedRun, SweepPlan, with_length

HERE = "here"
TIMED_STEPS = 12
FIRST_MFU = 0.4  # of a chip's peak, from which the size for a number of hours is looked for


@dataclasses.dataclass(frozen=True)
class Cost:
  """Cost of a sweep.

  Attributes:
    flops_per_second: of one run at a time; 0: not known. `source` says of which run, and how it is known.
  """

  flops: float
  flops_per_second: float = 0.0
  source: str = ""

  @property
  def hours(self) -> float | None:
    """Hours of all runs, one after the other."""
    return self.flops / self.flops_per_second / 3600 if self.flops_per_second else None

  def to_json(self) -> dict[str, Any]:
    """Part of the content of plan --json."""
    return {**dataclasses.asdict(self), "hours": self.hours}


def sweep_cost(plan: SweepPlan, topology: str) -> Cost:
  """The cost on this machine ("here", by timing a few steps) or on a topology, by its plan. Raises ConfigError."""
  run = max(plan.runs, key=lambda r: (r.budget, -abs(r.M - _center(plan, r.budget))))
  if topology == HERE:
    middle = sorted(plan.runs, key=lambda r: r.flops)[len(plan.runs) // 2]
    return Cost(plan.flops, _time_here(plan.config(middle), middle), f"timed here on {middle.run_id}")
  rate = planned_rate(plan.config(run), topology, run.M)
  return Cost(plan.flops, rate, f"planned for {run.run_id} on {topology}; smaller runs reach less")


def _center(plan: SweepPlan, budget: float) -> float:
  scales = sorted(run.M for run in plan.runs if run.budget == budget)
  return scales[len(scales) // 2]


def _time_here(config: Config, run: PlannedRun) -> float:
  """FLOP/s of a short run of the config, on its data."""
  from deepseek_jax.console import SilentConsole
  from deepseek_jax.train import train
  from deepseek_jax.training import metrics

  short = dataclasses.replace(
    config, train=dataclasses.replace(config.train, steps=TIMED_STEPS), log=dataclasses.replace(config.log, every=1),
    eval=dataclasses.replace(config.eval, final_sequences=1),
  )  # fmt: skip
  with tempfile.TemporaryDirectory(prefix="deepseek_jax-") as folder:
    train(short, folder, selftest=False, console=SilentConsole())
    lines = metrics.read_jsonl(f"{folder}/{metrics.METRICS}")
  seconds = statistics.median(
    line["step_seconds"] + line.get("data_seconds", 0.0) for line in lines[TIMED_STEPS // 2 :]
  )
  return run.M * run.batch_tokens / seconds


def planned_rate(config: Config, topology: str, scale: float) -> float:
  """FLOP/s, in `scale` FLOPs per token, of a step on a topology, by its roofline. Raises ConfigError."""
  from deepseek_jax.plan.plan import make_plan
  from deepseek_jax.plan.topology import parse_topology
  from deepseek_jax.training.step import abstract_step

  plan = make_plan(config, parse_topology(topology), abstract_step)
  return scale * plan.tokens_per_step / plan.calibrated.seconds


def format_plan(plan: SweepPlan, cost: Cost | None = None) -> str:
  """A plan for people: a row for each budget, what is left out, and the cost; without one that in FLOPs alone."""
  cost = cost or Cost(plan.flops)
  lines = [
    f"{'budget':>9} {'runs':>5} {'M, FLOPs/token':>21} {'tokens':>21} {'batch':>10} {'lr':>9} {'steps':>15} {'layers x width':>19}"
  ]
  for budget in sorted({run.budget for run in plan.runs}):
    runs = sorted((run for run in plan.runs if run.budget == budget), key=lambda r: r.M)
    batches, rates = {r.batch_tokens for r in runs}, {r.lr for r in runs}
    lines.append(
      f"{budget:9.3g} {len(runs):5} {_range([r.M for r in runs]):>21} {_range([r.tokens for r in runs]):>21} "
      f"{_range(sorted(batches)):>10} {_range(sorted(rates)):>9} {_range([r.steps for r in runs], ',.0f'):>15} "
      f"{f'{runs[0].n_layer} x {runs[0].d_model} to {runs[-1].n_layer} x {runs[-1].d_model}':>19}"
    )
  lines += [f"left out {line}" for line in plan.left_out]
  hours = (
    "" if cost.hours is None else f", {cost.hours:.3g} hours at {cost.flops_per_second:.3g} FLOP/s ({cost.source})"
  )
  lines.append(f"{len(plan.runs)} runs, {plan.flops:.4g} FLOPs{hours}; learning rates and batches by {plan.law}")
  return "\n".join(lines)


def _range(values: Sequence[float], spec: str = ".3g") -> str:
  low, high = format(min(values), spec), format(max(values), spec)
  return low if low == high else f"{low} to {high}"


@dataclasses.dataclass(frozen=True)
class Advice:
  """The size to train. scale_interval: of the model scale; None where the law was published without one."""

  flops: float
  scale: float
  scale_interval: Interval | None
  tokens: float
  layers: int
  width: int
  params: int
  params_active: int
  batch_tokens: float
  lr: float
  law: str
  hours: float | None = None

  def to_json(self) -> dict[str, Any]:
    """The content of plan --json."""
    return dataclasses.asdict(self)

  @property
  def text(self) -> str:
    """For people."""
    interval = (
      f" ({self.scale_interval[0]:.4g} to {self.scale_interval[1]:.4g}, 95%)" if self.scale_interval
      else " (no interval is known; --table=RUNS refits the law, with one)"
    )  # fmt: skip
    time = f"\nhours            {self.hours:.4g}" if self.hours else ""
    return (
      f"compute          {self.flops:.4g} FLOPs\n"
      f"M_opt            {self.scale:.4g} FLOPs per token{interval}\n"
      f"tokens           {self.tokens:.4g}\n"
      f"shape            {self.layers} layers x {self.width}: {self.params:,} parameters, {self.params_active:,} active\n"
      f"batch            {self.batch_tokens:.4g} tokens\n"
      f"learning rate    {self.lr:.4g}\n"
      f"laws             {self.law}{time}"
    )


def advise(
  base: Config, law: HyperparamLaw, allocation: AllocationEstimate, tokens: float, hours: float, topology: str | None
) -> Advice:
  """The compute-optimal size for `tokens`, or for `hours` on a topology. Raises ConfigError."""
  for name, value in (("tokens", tokens), ("hours", hours)):
    if not 0 <= value < math.inf:
      raise ConfigError(f"--{name}={value}: expected a positive number")
  if tokens and hours:
    raise ConfigError("--tokens and --hours exclude each other: a size follows from one of them")
  if tokens:
    return _advice(base, law, allocation, *allocation.for_tokens(tokens), None)
  if not topology or topology == HERE:
    raise ConfigError("--hours needs --topology=KIND:SHAPE, such as v5p:8x8x16: whose hours they are")
  from deepseek_jax.plan.topology import parse_topology

  chips = parse_topology(topology)
  rate = FIRST_MFU * chips.num_devices * chips.chip.peak_flops
  for _ in range(2):  # the rate is that of the size that it leads to
    optimum, _ = allocation.optimal(rate * 3600 * hours)
    model = _shape(base, optimum.scale)
    scale = nonembedding_flops_per_token(model, seq=base.data.seq)
    batch = max(1, round(law.batch_tokens(_about(model, optimum.flops, optimum.tokens)) / base.data.seq))
    batch = max(chips.num_devices, round(batch / chips.num_devices) * chips.num_devices)
    rate = planned_rate(with_length(base, model, 1000, batch, 1e-4, 0), topology, scale)
  return _advice(base, law, allocation, *allocation.optimal(rate * 3600 * hours), hours)


def _advice(
  base: Config, law: HyperparamLaw, allocation: AllocationEstimate, optimum: Any, interval: Interval | None,
  hours: float | None,
) -> Advice:  # fmt: skip
  model = _shape(base, optimum.scale)
  about, counts = _about(model, optimum.flops, optimum.tokens), count_params(model)
  return Advice(
    optimum.flops, optimum.scale, interval, optimum.tokens, model.layers, model.embed, counts.total, counts.active,
    law.batch_tokens(about), law.lr(about), f"M_opt by {allocation.law.name}, batch and learning rate by {law.name}", hours,
  )  # fmt: skip


def _about(model: ModelConfig, flops: float, tokens: float) -> TrainingRun:
  return TrainingRun(flops, count_params(model).active_nonembedding, tokens)


def _shape(base: Config, scale: float) -> ModelConfig:
  model = find_shape(base.model, base.data.seq, scale)
  if model is None:
    raise ConfigError(f"no model of {scale:.3g} FLOPs per token: ask for more tokens or hours")
  return model
