"""How router biases move (balancing without an auxiliary loss): a table of rules, of which V3's is the first."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from deepseek_jax.errors import ConfigError
from deepseek_jax.model.router import RouterBias
from deepseek_jax.model_config import MoEConfig
from deepseek_jax.training.schedule import StepInputs
from deepseek_jax.typing import Params, PyTree


@dataclasses.dataclass(frozen=True)
class BiasRule:
  """A rule for the bias of each router, after each update.

  observation: what it reads: a name of `layer_aux.observations`, by layer, summed over the batch.
  update: (bias [layers, experts], observed [layers, ...], update rate [], section model.moe) -> bias.
  rate: the field of schedule.StepInputs that is the update rate.
  routers: the keys of ROUTERS whose biases it moves; a config with another router that has a RouterBias is an error.
  is_exact: every mesh computes the same bits, as of integers. Otherwise meshes differ by rounding.
  """

  observation: str
  update: Callable[[jax.Array, jax.Array, jax.Array, MoEConfig], jax.Array]
  rate: str
  routers: tuple[str, ...]
  is_exact: bool


def move_by_sign(bias: jax.Array, load: jax.Array, update_rate: jax.Array, moe: MoEConfig) -> jax.Array:
  """`bias` changed by `update_rate`: up where the load is below the mean, down where above (V3 section 2.1.2)."""
  load = load.astype(bias.dtype)
  return bias + update_rate.astype(bias.dtype) * jnp.sign(load.mean(-1, keepdims=True) - load)


# By balance.bias_rule. Config checks read `routers` from the source (`config.BIAS_RULE_ROUTERS`).
BIAS_RULES = {"sign": BiasRule("load", move_by_sign, rate="bias_update_rate", routers=("topk",), is_exact=True)}


def update_router_biases(
  bias_rule: str, moe: MoEConfig, buffers: Params, types: PyTree, metrics: Mapping[str, PyTree], inputs: StepInputs
) -> Params:
  """`buffers` whose router biases the rule of `balance.bias_rule` has moved; others stay.

  types: the type of each buffer (`transformer.buffer_types`). metrics, inputs: of the step.

  Raises ConfigError where layers with a RouterBias do not give the observation that the rule reads, by layer.
  """
  rule = BIAS_RULES[bias_rule]

  def leaf(path, buffer, kind):
    if not issubclass(kind, RouterBias):
      return buffer
    stack, observed = path[0].key, metrics.get(rule.observation)
    if not isinstance(observed, Mapping) or stack not in observed:
      raise ConfigError(
        f"balance.bias_rule={bias_rule} reads the observation {rule.observation!r} by layer, which {stack} with "
        f"model.moe.router={moe.router} do not give: use another rule, or have training.layer_aux.LAYER_AUX declare it"
      )
    return rule.update(buffer, observed[stack], getattr(inputs, rule.rate), moe)

  return jax.tree.map_with_path(leaf, buffers, types)
