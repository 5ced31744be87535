"""What is wrong with a run, as far as its records say: each finding with its evidence, and the config fields to change.

A rule of HEALTH_RULES is a function of the records. Thresholds are far beyond what healthy runs of the shipped configs
show, so that a finding is worth a look; a run without findings may still be poor.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import numpy as np

from deepseek_jax.schema import config_leaves
from deepseek_jax.training.expert_loads import DEAD, ExpertLoads
from deepseek_jax.training.run_records import Column, RunRecords
from deepseek_jax.training.running import BLOCK, spikes

LOSS_SPIKE = dict(sigmas=8.0, factor=1.1)  # above the running median
GRAD_SPIKE = dict(sigmas=10.0, factor=10.0)
DIVERGED = 0.3  # nats above the lowest median of a tenth of the run
LARGE_START = 30.0  # RMS of a layer's output at the first logged step; shipped configs start below 1
LARGE_JUMP = 20.0  # from one layer's output to the next
LARGE_CHANGE = (
  100.0  # of a layer's output or gradients over the run; of gradients also over depth, to this power of 1.5
)
IMBALANCE = 1.5, 3.0  # max violation, of at most half of its largest value
BIAS_TRAVEL = 0.5  # distance that router biases must have been able to move before an imbalance counts as persistent
LOSS_STEPS = 300  # the same for balance losses, in steps
SLOW, LASTING = 0.5, 60.0  # of the median throughput, for so many seconds: less is what else a machine does
NAMED = 4  # steps, layers or experts that are named; of others the number


@dataclasses.dataclass(frozen=True)
class Finding:
  """What is wrong, with its evidence (steps, layers, numbers) and what to change. All are plain text."""

  title: str
  evidence: str
  advice: str


@dataclasses.dataclass(frozen=True)
class Run:
  """What rules look at: the records, the fields of the config by their paths, and the loads of experts if there are any."""

  records: RunRecords
  fields: dict[str, object]
  loads: ExpertLoads | None

  def column(self, name: str) -> Column:
    """The metric `name`; without values where it was not logged."""
    return self.records.columns.get(name, Column(np.zeros(0, np.int64), np.zeros(0)))

  def by_layer(self, group: str, name: str) -> dict[str, Column]:
    """{layer: its metric GROUP/LAYER/NAME}, in order of depth."""
    keys = [key.split("/") for key in self.records.columns if key.count("/") == 2]
    return {layer: self.column(f"{g}/{layer}/{n}") for g, layer, n in keys if (g, n) == (group, name)}

  def field(self, path: str) -> str:
    """The field as it would be set, "schedule.peak (now 0.001)"."""
    value = self.fields.get(path, "")
    return path if value == "" else f"{path} (now {value})"


def find(records: RunRecords, loads: ExpertLoads | None) -> list[Finding]:
  """The findings of all rules, worst first. loads: of `read_expert_loads`."""
  run = Run(records, dict(config_leaves(records.config)), loads)
  return [finding for rule in HEALTH_RULES for finding in rule(run)]


def loss_spikes(loss: Column) -> np.ndarray:
  """Indices of the spikes of a loss."""
  return spikes(loss.values, **LOSS_SPIKE)


def not_finite(run: Run) -> Iterator[Finding]:
  """A loss, a gradient norm or another metric that was not finite."""
  seen = {name: column.steps[np.isnan(column.values)] for name, column in run.records.columns.items()}
  seen = {name: steps for name, steps in seen.items() if len(steps)}
  if not seen:
    return
  first = min(seen, key=lambda name: (seen[name][0], name))
  evidence = "; ".join(f"{name} {_at_steps(steps)}" for name, steps in itertools.islice(seen.items(), NAMED))
  yield Finding(
    "Values that are not finite",
    f"{evidence}. The first is {first} at step {seen[first][0]:,}.",
    f"Lower {run.field('schedule.peak')}, or warm up for longer by {run.field('schedule.warmup_steps')}; "
    f"try {run.field('model.compute_dtype')}=float32 to tell overflow from divergence.",
  )


def skipped_updates(run: Run) -> Iterator[Finding]:
  """Updates that were skipped, and whether experts overflowed in them."""
  skipped = run.column("skipped")
  rises = np.flatnonzero(np.diff(np.nan_to_num(skipped.values), prepend=0) > 0)
  if not len(rises):
    return
  overflow = run.column("overflow")
  overflowed = overflow.steps[overflow.values > 0]
  advice = (
    f"Raise {run.field('model.moe.buffer_factor')}: assignments overflowed expert buffers {_at_steps(overflowed)}."
    if len(overflowed)
    else f"Lower {run.field('schedule.peak')} or {run.field('optimizer.clip')}: gradients were not finite."
  )
  count = int(np.nanmax(skipped.values))
  yield Finding(
    "Skipped updates", f"{count:,} in all, the first ones logged {_at_steps(skipped.steps[rises])}.",
    f"{advice} The run ends after {run.field('train.max_skipped')} in a row.",
  )  # fmt: skip


def corruption(run: Run) -> Iterator[Finding]:
  """Devices that the check for silent corruption has found."""
  found = [e for e in run.records.events if e["event"] == "corruption"]
  if found:
    where = "; ".join(
      f"at step {e['step']:,} on {', '.join(str(device.get('host')) for device in e.get('devices', ()))}" for e in found
    )
    yield Finding(
      "A device computed wrong", f"The check for silent corruption has found it {where}.",
      "Replace these hosts, and go back to a checkpoint from before: docs/howto/find_silent_corruption.md.",
    )  # fmt: skip


def diverged(run: Run) -> Iterator[Finding]:
  """A loss that ends far above its lowest."""
  ends = [e for e in run.records.events if e["event"] == "end"]
  loss = run.column("loss")
  advice = (
    f"Go back by --resume_from to a checkpoint before the rise, and lower {run.field('schedule.peak')} or "
    f"{run.field('optimizer.clip')}."
  )
  if ends and ends[-1].get("reason") == "diverged":
    yield Finding("The run diverged", f"It ended at step {ends[-1]['step']:,} after too many skipped updates.", advice)
    return
  parts = loss.stretches(10, least=4)
  if len(parts) < 4:
    return
  medians = [float(np.median(part.values)) for part in parts]
  noise = 1.4826 * float(np.median(np.abs(parts[-1].values - medians[-1])))
  lowest = int(np.argmin(medians))
  rise = medians[-1] - medians[lowest]
  if rise > max(DIVERGED, 4 * noise):
    yield Finding(
      "The loss diverged",
      f"Its median rose from {medians[lowest]:.4g} at steps {_range(parts[lowest])} to {medians[-1]:.4g} at steps "
      f"{_range(parts[-1])}.",
      advice,
    )


def large_spikes(run: Run) -> Iterator[Finding]:
  """Losses and gradient norms far above their running medians."""
  for name, title, limits, advice in (
    (
      "loss", "Loss spikes", LOSS_SPIKE,
      f"Lower {run.field('optimizer.clip')} or {run.field('schedule.peak')}, raise {run.field('schedule.warmup_steps')}; "
      "look at the data of these steps.",
    ),
    (
      "grad_norm", "Gradient norm far above its running median", GRAD_SPIKE,
      f"Clipping keeps such updates small: {run.field('optimizer.clip')}. If the loss follows, lower "
      f"{run.field('schedule.peak')}.",
    ),
  ):  # fmt: skip
    column = run.column(name)
    found = spikes(column.values, **limits)
    if not len(found):
      continue
    largest = sorted(found, key=lambda i: -column.values[i])[:NAMED]
    named = ", ".join(
      f"{column.values[i]:.4g} at step {column.steps[i]:,} (median before: {np.nanmedian(column.values[max(0, i - BLOCK) : i]):.4g})"
      for i in sorted(largest)
    )
    yield Finding(title, f"{len(found):,} in all{_largest(len(found))}: {named}.", advice)


def initialisation(run: Run) -> Iterator[Finding]:
  """Outputs of layers that are large at the first logged step already."""
  starts = {layer: c.values[0] for layer, c in run.by_layer("rms", "activations").items() if len(c)}
  large = {layer: rms for layer, rms in starts.items() if rms > LARGE_START or np.isnan(rms)}
  if not large:
    return
  step = int(run.by_layer("rms", "activations")[next(iter(large))].steps[0])
  yield Finding(
    "The initialisation is too large",
    f"At step {step:,} the RMS of the residual stream is large after {_layers(large)}. A healthy start is about 1 or below.",
    f"Lower {run.field('model.init_std')}: about 0.02 at widths below 1,000, 0.006 above.",
  )


def activations_over_depth(run: Run) -> Iterator[Finding]:
  """Outputs that grow or vanish from one layer to the next."""
  last = {layer: _end(c) for layer, c in run.by_layer("rms", "activations").items() if layer.startswith("layer_")}
  last = {layer: rms for layer, rms in last.items() if not np.isnan(rms)}
  jumps = {
    b: (last[a], last[b])
    for a, b in itertools.pairwise(last)
    if last[a] > 0 and not 1 / LARGE_JUMP < last[b] / last[a] < LARGE_JUMP
  }
  if jumps:
    named = ", ".join(
      f"from {a:.3g} to {b:.3g} in {_layer(layer)}" for layer, (a, b) in itertools.islice(jumps.items(), NAMED)
    )
    grow = next(iter(jumps.values()))[1] > next(iter(jumps.values()))[0]
    grown = f"Lower {run.field('model.init_std')} or {run.field('schedule.peak')}, or raise {run.field('optimizer.weight_decay')}"
    vanished = f"Raise {run.field('model.init_std')}, or lower {run.field('optimizer.weight_decay')}"
    yield Finding(
      f"Activations {'grow' if grow else 'vanish'} over depth",
      f"At the end the RMS of the residual stream goes {named}.",
      f"{grown if grow else vanished}; look at the initial scale of that layer's output projections.",
    )


def changes_over_time(run: Run) -> Iterator[Finding]:
  """Outputs or gradients of a layer that grow, or outputs that vanish, over the run."""
  for name, word in (("activations", "Activations"), ("gradients", "Gradients")):
    grown, vanished = {}, {}
    for layer, column in run.by_layer("rms", name).items():
      parts = column.stretches(10, least=4)
      if len(parts) < 4:
        continue
      start, end = (float(np.median(p.values)) for p in (parts[1], parts[-1]))  # the first tenth is the warm-up's
      if start > 0 and end / start > LARGE_CHANGE:
        grown[layer] = end / start
      elif (
        start > 0 and end / start < 1 / LARGE_CHANGE and name == "activations"
      ):  # gradients shrink as a run converges
        vanished[layer] = end / start
    for layers, verb in ((grown, "grow"), (vanished, "vanish")):
      if layers:
        yield Finding(
          f"{word} {verb} over time",
          f"From the second tenth of the run to the last the RMS changes by a factor of: {_layers(layers)}.",
          f"Lower {run.field('schedule.peak')}, or change {run.field('optimizer.weight_decay')}.",
        )


def gradients_over_depth(run: Run) -> Iterator[Finding]:
  """Gradients of some layers that are far below those of others."""
  last = {layer: _end(c) for layer, c in run.by_layer("rms", "gradients").items() if layer.startswith("layer_")}
  last = {layer: rms for layer, rms in last.items() if not np.isnan(rms)}
  if len(last) < 2 or not max(last.values()) > 0:
    return
  top = max(last, key=lambda layer: last[layer])
  small = {layer: rms for layer, rms in last.items() if rms < last[top] / LARGE_CHANGE**1.5}
  if small:
    names = list(last)
    grow = names.index(top) < names.index(next(iter(small)))
    yield Finding(
      "Gradients grow towards the first layers" if grow else "Gradients vanish towards the first layers",
      f"At the end the RMS of gradients is {last[top]:.3g} in {_layer(top)}, but in {_layers(small)}.",
      f"Change {run.field('model.init_std')}, lower {run.field('schedule.peak')}; frozen parameters, optimizer.trainable, "
      "have no gradient.",
    )


def dead_experts(run: Run) -> Iterator[Finding]:
  """Experts that no token chose in any record of the last quarter."""
  if run.loads is None or len(run.loads.steps) < 8:
    return
  records = max(len(run.loads.steps) // 4, 4)
  dead = {layer: np.flatnonzero((codes[-records:] == DEAD).all(0)) for layer, codes in run.loads.codes.items()}
  dead = {layer: experts for layer, experts in dead.items() if len(experts)}
  if not dead:
    return
  named = "; ".join(
    f"{_layer(layer)}: {_some([str(e) for e in experts])} of {run.loads.codes[layer].shape[1]}"
    for layer, experts in itertools.islice(dead.items(), NAMED)
  )
  total = sum(map(len, dead.values()))
  yield Finding(
    "Dead experts",
    f"{total:,} got no token in any record from step {run.loads.steps[-records]:,} on, in {len(dead):,} layer{'s' if len(dead) > 1 else ''}. Experts in "
    f"{named}{'; ...' if len(dead) > NAMED else ''}.",
    _balance_advice(run),
  )


def imbalance(run: Run) -> Iterator[Finding]:
  """A layer whose busiest expert stays far above the mean, although balancing had the steps that it needs."""
  experts, chosen = (run.fields.get(f"model.moe.{name}") for name in ("num_routed_experts", "num_experts_per_token"))
  is_learned = run.fields.get("model.moe.router") != "hash"
  if not (isinstance(experts, int) and isinstance(chosen, int) and chosen and len(run.records.steps) and is_learned):
    return
  rate = run.fields.get("balance.bias_update_rate")
  needed = BIAS_TRAVEL / rate if isinstance(rate, float) and rate else LOSS_STEPS
  limit = min(max((experts / chosen - 1) / 2, IMBALANCE[0]), IMBALANCE[1])
  last_step, worst = int(run.records.steps[-1]), {}
  for layer, column in run.by_layer("router", "max_vio").items():
    recent = column.values[column.steps > max(last_step // 2, last_step - needed)]
    if last_step >= needed and len(recent) >= BLOCK and np.nanmedian(recent) > limit:
      worst[layer] = float(np.nanmedian(recent))
  if worst:
    yield Finding(
      "Experts stay unbalanced",
      "Max violation (the load of the busiest expert over the mean, less 1) in the newer half of the run: "
      f"{_layers(worst)}. At most {limit:.3g} is usual by then.",
      _balance_advice(run),
    )


def throughput_drops(run: Run) -> Iterator[Finding]:
  """A stretch of steps at less than half of the usual speed."""
  speed, seconds = run.column("tokens_per_second"), run.column("step_seconds")
  parts = speed.stretches(40, least=10)[1:]  # the first has what is slow once
  if len(parts) < 4:
    return
  usual = float(np.nanmedian(speed.values))
  slow = [
    part
    for part in parts
    if np.median(part.values) < SLOW * usual
    and np.nansum(seconds.values[slice(*np.searchsorted(seconds.steps, [part.steps[0], part.steps[-1] + 1]))]) > LASTING
  ]
  if slow:
    worst = min(slow, key=lambda part: float(np.median(part.values)))
    data = np.nansum(run.column("data_seconds").values) / max(np.nansum(seconds.values), 1e-9)
    yield Finding(
      "Throughput drops",
      f"{np.median(worst.values):,.0f} tokens per second at steps {_range(worst)}, {usual:,.0f} in the median of the run; "
      f"{len(slow)} of {len(parts)} stretches are slow. Waits for data take {data:.0%} of the time of steps.",
      f"If it waits for data, put {run.field('data.cache')} on a faster disk. Otherwise look at what else runs on the machine.",
    )


def stragglers(run: Run) -> Iterator[Finding]:
  """Processes that held the others up in several lines in a row, as `stragglers.py` names them."""
  slow, largest, usual = (run.column(name) for name in ("straggler", "host_seconds_max", "host_seconds_median"))
  processes, lines = np.unique(slow.values, return_counts=True)
  if not len(processes):
    return
  worst = int(processes[np.argmax(lines)])
  steps = slow.steps[slow.values == worst]
  seconds, median = (float(np.median(c.values[np.isin(c.steps, steps)])) for c in (largest, usual))
  yield Finding(
    "A process holds the others up",
    f"Process {worst}, logged {_at_steps(steps)}: {seconds:.3g} s of its own in a step, {median:.3g} s in the median of all"
    f"{f'; {len(processes) - 1} other processes at other steps' if len(processes) > 1 else ''}.",
    f"Look at what else runs on its host, and at its disk ({run.field('data.cache')}) and network.",
  )


HEALTH_RULES: tuple[Callable[[Run], Iterator[Finding]], ...] = (
  corruption, diverged, not_finite, initialisation, skipped_updates, large_spikes, activations_over_depth, gradients_over_depth,
  changes_over_time, dead_experts, imbalance, throughput_drops,
  stragglers,
)  # fmt: skip


def _balance_advice(run: Run) -> str:
  return (
    f"Raise {run.field('balance.bias_update_rate')} with {run.field('model.moe.router_bias')}, or "
    f"{run.field('balance.expert_loss')}."
  )


def _end(column: Column) -> float:
  """The median of the last tenth of what is finite; NaN without."""
  finite = column.values[~np.isnan(column.values)]
  return float(np.median(finite[-max(len(finite) // 10, 1) :])) if len(finite) else float("nan")


def _range(column: Column) -> str:
  return f"{column.steps[0]:,} to {column.steps[-1]:,}"


def _largest(count: int) -> str:
  return f", the largest {NAMED}" if count > NAMED else ""


def _at_steps(steps: np.ndarray) -> str:
  return (
    f"at step{'s' if len(steps) > 1 else ''} {_some([f'{step:,}' for step in steps[: NAMED + 1].tolist()], len(steps))}"
  )


def _some(names: list[str], count: int | None = None) -> str:
  """The first NAMED of `names`, of which there are `count` in all, and how many more there are."""
  count = len(names) if count is None else count
  rest = f" and {count - NAMED:,} more" if count > NAMED else ""
  return ", ".join(names[:NAMED]) + rest


def _layers(values: dict[str, float]) -> str:
  """Layers with their values."""
  return _some([f"{_layer(layer)}: {value:.3g}" for layer, value in values.items()])


def _layer(name: str) -> str:
  return name.replace("_", " ")
