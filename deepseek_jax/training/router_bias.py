"""How router biases move (V3's balancing without an auxiliary loss): a table of rules."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from deepseek_jax.model.router import RouterBias
from deepseek_jax.training.schedule import StepInputs
from deepseek_jax.typing import Params, PyTree


@dataclasses.dataclass(frozen=True)
class BiasRule:
  """A rule for the bias of each router, after each update.

  observation: what it reads: a name of `layer_aux.observations`, by layer, summed over the batch.
  update: (bias [layers, experts], observed [layers, ...], update rate []) -> bias.
  rate: the field of schedule.StepInputs that is the update rate.
  is_exact: every mesh computes the same bits, as of integers. Otherwise meshes differ by rounding.
  """

  observation: str
  update: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
  rate: str
  is_exact: bool


def move_by_sign(bias: jax.Array, load: jax.Array, update_rate: jax.Array) -> jax.Array:
  """`bias` changed by `update_rate`: up where the load is below the mean, down where above (V3 section 2.1.2)."""
  load = load.astype(bias.dtype)
  return bias + update_rate.astype(bias.dtype) * jnp.sign(load.mean(-1, keepdims=True) - load)


# By balance.bias_rule.
BIAS_RULES = {"sign": BiasRule("load", move_by_sign, rate="bias_update_rate", is_exact=True)}


def update_router_biases(rule: BiasRule, buffers: Params, types: PyTree, metrics: PyTree, inputs: StepInputs) -> Params:
  """`buffers` whose router biases `rule` has moved; others stay.

  types: the type of each buffer (`transformer.buffer_types`). metrics, inputs: of the step.
  """

  def leaf(path, buffer, kind):
    if not issubclass(kind, RouterBias):
      return buffer
    return rule.update(buffer, metrics[rule.observation][path[0].key], getattr(inputs, rule.rate))

  return jax.tree.map_with_path(leaf, buffers, types)
