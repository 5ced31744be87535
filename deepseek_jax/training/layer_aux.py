"""What training does with what layers observe: `LAYER_AUX` has a row for each name in `LayerOutput.aux`.

A row declares observations, each once: what a layer contributes to it, whether it is a loss, how it is summed over
layers, devices and microbatches, what is logged, and whether it skips an update. The step, the pipeline, evaluation and
logging follow from that. `STEP_METRICS` declares the metrics of the step itself.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import Config
from deepseek_jax.model.layer_output import LayerOutput
from deepseek_jax.model_config import ModelConfig
from deepseek_jax.sharding import axis_size, psum
from deepseek_jax.training.balance import balance_loss, expert_counts, load_metrics
from deepseek_jax.training.layer_rms import activation_metrics, gradient_metrics, observe_block_output
from deepseek_jax.training.step_config import StepConfig
from deepseek_jax.typing import PyTree

# ({name: scalar}, {name: heights of bars}) that are logged.
Logged = tuple[dict[str, float | int], dict[str, np.ndarray]]
# (why an update was skipped, what to do if it persists).
SkipCause = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Observation:
  """Declares an array that layers give, of one device's part of a microbatch. It is summed over the batch of the step.

  is_loss: it is [batch], the mean over the tokens of each full sequence, alike on all devices that share a sequence. It
    is a term of the objective, and a metric as a mean over the tokens of the batch. Otherwise it is a sum. A layer has a
    part of the positions, "seq", and of the heads, "heads": a loss is summed over those that it is made of.
  is_mean: that sum is divided by the tokens of the batch.
  by_layer: it stays apart by layer, as {stack: [layers, ...]}. Otherwise it is summed over layers.
  partial_over: logical axes of the mesh over which devices have parts of it, in addition to "batch".
  skip_cause: (config, value) -> SkipCause. A step in which it is not 0 is skipped, and explained so. A held-out loss is
    NaN then: the cause is asked for with value None, since an evaluation keeps the loss alone. It is None where the
    config rules it out. Without skip_cause no step is skipped.
  log: (model, {stack: [layers, ...]}) -> what is logged of it, with by_layer. None: the scalar itself.
  """

  is_loss: bool = False
  is_mean: bool = False
  by_layer: bool = False
  partial_over: tuple[str, ...] = ()
  skip_cause: Callable[[Config, Any], SkipCause | None] | None = None
  log: Callable[[ModelConfig, dict[str, np.ndarray]], Logged] | None = None

  def __post_init__(self):
    if self.by_layer and (self.is_loss or self.skip_cause):
      raise ValueError(
        "an observation by layer is no loss and skips no update: declare a second one, summed over layers"
      )
    if self.by_layer != (self.log is not None):
      raise ValueError("an observation by layer needs `log`, and only such a one takes it")


@dataclasses.dataclass(frozen=True)
class LayerAux:
  """What becomes of one name in `LayerOutput.aux`.

  observe: (its value, config) -> {observation: array}. It runs in the layer, so that little is kept of a large value.
  """

  observe: Callable[[Any, StepConfig], dict[str, jax.Array]]
  observations: Mapping[str, Observation]


# Of each metric of the step itself (`step.make_train_step`): what is logged of its value. None: the scalar itself.
STEP_METRICS: dict[str, Callable[[ModelConfig, Any], dict[str, float | int]] | None] = {
  "loss": None,
  "total_loss": None,
  "mtp_loss": lambda model, losses: {f"mtp_loss_{depth}": float(loss) for depth, loss in enumerate(losses, 1)},
  "grad_norm": None,
  "gradients": gradient_metrics,
  "skipped": lambda model, counts: {"skipped": int(counts["total"])},
}


def overflow_cause(config: Config, overflow: int | None) -> SkipCause | None:
  """The SkipCause of assignments, and of rows on their way, that overflowed the expert buffers in all microbatches."""
  factor = config.model.moe.buffer_factor
  if not factor:
    return None
  assignments = "assignments" if overflow is None else f"{overflow:,} assignments"
  return (
    f"{assignments} overflowed the expert buffers of {factor:g} times an even load",
    f"raise model.moe.buffer_factor above {factor:g} (0: worst-case size, never overflows)",
  )


def observe_routing(routing: Any, config: StepConfig) -> dict[str, jax.Array]:
  """Of a router.Routing: the load [experts] int32, the balance losses [batch], the overflow [] int32."""
  counts = expert_counts(routing.indices, config.model.moe.num_routed_experts)  # [batch, experts]
  loss = balance_loss(routing, counts, config.model.moe, config.balance)
  return {"load": counts.sum(0, dtype=jnp.int32), "balance_loss": loss, "overflow": jnp.int32(routing.overflow)}


LAYER_AUX = {
  "output": LayerAux(
    observe_block_output,
    {
      # The mean square of each layer's output. Of a sequence each device has the positions of its "stream".
      "activations": Observation(by_layer=True, is_mean=True, partial_over=("stream",), log=activation_metrics),
    },
  ),
  "routing": LayerAux(
    observe_routing,
    {
      "load": Observation(by_layer=True, log=load_metrics),  # assignments to each expert
      "balance_loss": Observation(is_loss=True),
      # Assignments that overflowed the expert buffer, of this device's positions.
      "overflow": Observation(partial_over=("seq",), skip_cause=overflow_cause),
    },
  ),
}


def observations() -> dict[str, Observation]:
  """{name: Observation} of all rows. Raises ValueError where a name is declared twice, or is a metric of the step."""
  by_name: dict[str, Observation] = {}
  for row in LAYER_AUX.values():
    if taken := row.observations.keys() & (by_name.keys() | STEP_METRICS.keys()):
      raise ValueError(f"training.layer_aux.LAYER_AUX declares {', '.join(sorted(taken))}, which is a metric already")
    by_name |= row.observations
  return by_name


def make_aux_fn(config: StepConfig) -> Callable[[LayerOutput], dict[str, jax.Array]]:
  """The aux_fn of training: {observation: array} of a layer's output. Raises KeyError for an aux without a row."""

  def aux_fn(output):
    observed: dict[str, jax.Array] = {}
    for name, value in output.aux.items():
      if name not in LAYER_AUX:
        raise KeyError(f"a layer's aux has {name!r}, for which training.layer_aux.LAYER_AUX has no row")
      observed |= LAYER_AUX[name].observe(value, config)
    return observed

  return aux_fn


def sum_over_layers(observed: Mapping[str, jax.Array], stack: str, seq: int) -> tuple[jax.Array | float, PyTree]:
  """(this device's term of the objective [], metrics: sums over this device's part of the batch).

  observed: {observation: [layers, ...]} of the stack that is named `stack`. seq: length of the full sequences.
  """
  objective: jax.Array | float = 0.0
  metrics: dict[str, PyTree] = {}
  by_name = observations()
  for name, value in observed.items():
    if by_name[name].by_layer:
      metrics[name] = {stack: value}
      continue
    total = value.sum(dtype=value.dtype)
    if by_name[name].is_loss:
      total = seq * total  # of [layers, batch]
      objective += total / axis_size("stream")
    metrics[name] = total
  return objective, metrics


def add_metrics(a: PyTree, b: PyTree) -> PyTree:
  """The sum of two trees of metrics, of which each may lack what the other has."""
  if not isinstance(a, dict):
    return a + b
  return {
    name: add_metrics(a[name], b[name]) if name in a and name in b else (a | b)[name]
    for name in [*a, *(b.keys() - a.keys())]
  }


def sum_over_devices(metrics: PyTree, *axes: str) -> PyTree:
  """`metrics` summed over the devices of the logical `axes`, and of those over which an observation is partial."""
  by_name = observations()
  partial = {
    name: psum(x, *by_name[name].partial_over) if name in by_name and by_name[name].partial_over else x
    for name, x in metrics.items()
  }
  return psum(partial, *axes)


def mean_over_tokens(metrics: PyTree, tokens: jax.Array | int) -> PyTree:
  """`metrics` of a step, of whose sums those of the step itself, losses and means are divided by `tokens`."""
  by_name = observations()
  sums = {name for name, observation in by_name.items() if not (observation.is_loss or observation.is_mean)}
  return {name: x if name in sums else jax.tree.map(lambda x: x / tokens, x) for name, x in metrics.items()}


def must_skip(metrics: PyTree) -> jax.Array | bool:
  """Whether an observation says that the update is to be skipped."""
  skip = False
  for name, observation in observations().items():
    if observation.skip_cause and name in metrics:
      skip |= metrics[name] != 0
  return skip


def skip_causes(config: Config, metrics: Mapping[str, Any] | None) -> list[SkipCause]:
  """Why observations skipped a step, from its `metrics` on the host; without these, why they might have."""
  causes = []
  for name, observation in observations().items():
    if not observation.skip_cause or (metrics is not None and not metrics.get(name)):
      continue
    if cause := observation.skip_cause(config, None if metrics is None else metrics[name].item()):
      causes.append(cause)
  return causes


def logged_metrics(model: ModelConfig, metrics: Mapping[str, Any]) -> Logged:
  """What is logged of the `metrics` of a step, on the host: as STEP_METRICS and observations say, other scalars as they are."""
  scalars: dict[str, float | int] = {}
  histograms: dict[str, np.ndarray] = {}
  by_name = observations()
  for name, value in metrics.items():
    if log_step := STEP_METRICS.get(name):
      scalars |= log_step(model, value)
    elif name in by_name and (log := by_name[name].log):
      of_layers, bars = log(model, value)
      scalars |= of_layers
      histograms |= bars
    else:
      scalars[name] = float(value)
  return scalars, histograms
