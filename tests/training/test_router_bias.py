"""How router biases move, and that nothing else does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.config_sections import MeshConfig
from deepseek_jax.errors import ConfigError
from deepseek_jax.mesh import make_mesh
from deepseek_jax.model.router import RouterBias
from deepseek_jax.model.router_kinds import ROUTERS
from deepseek_jax.model.transformer import buffer_types
from deepseek_jax.training.layer_aux import observations
from deepseek_jax.training.router_bias import BIAS_RULES, update_router_biases
from deepseek_jax.training.schedule import StepInputs
from tests.configs import MOE, V3


class Statistic(nnx.Variable):
  """Another kind of buffer."""


def test_the_sign_rule_moves_biases_against_the_load_and_no_other_buffer():
  buffers = {"moe_layers": {"moe": {"router": {"bias": jnp.zeros((2, 4)), "seen": jnp.zeros((2, 4))}}}}
  types = {"moe_layers": {"moe": {"router": {"bias": RouterBias, "seen": Statistic}}}}
  metrics = {"load": {"moe_layers": jnp.array([[5, 1, 3, 3], [3, 3, 3, 3]], jnp.int32)}}

  @jax.jit
  def update(buffers, metrics, inputs):
    return update_router_biases("sign", MOE, buffers, types, metrics, inputs)

  moved = update(buffers, metrics, StepInputs(bias_update_rate=0.5).as_arrays("float32"))["moe_layers"]["moe"]["router"]
  np.testing.assert_array_equal(moved["bias"], [[-0.5, 0.5, 0, 0], [0, 0, 0, 0]])
  np.testing.assert_array_equal(moved["seen"], 0)


@pytest.mark.parametrize(
  "metrics", [{}, {"load": 3.0}, {"load": {"mtp_layers": 3.0}}], ids=("not", "a sum", "elsewhere")
)
def test_a_rule_that_reads_what_the_router_does_not_give_says_so(metrics):
  buffers, types = ({"moe_layers": {"bias": leaf}} for leaf in (jnp.zeros((2, 4)), RouterBias))
  with pytest.raises(ConfigError, match="bias_rule=sign reads the observation 'load'.*moe_layers.*router=topk"):
    update_router_biases("sign", MOE, buffers, types, metrics, StepInputs(bias_update_rate=0.5).as_arrays("float32"))


def test_every_rule_names_routers_and_an_observation_by_layer():
  for rule in BIAS_RULES.values():
    assert rule.routers and set(rule.routers) <= set(ROUTERS)
    assert observations()[rule.observation].by_layer


def test_the_buffers_of_a_model_are_known_by_type():
  with jax.set_mesh(make_mesh(MeshConfig(data=1), jax.devices()[:1])):
    types = buffer_types(V3)
  assert types["moe_layers"]["moe"]["router"] == {"bias": RouterBias}
  assert jax.tree.leaves(types) == [RouterBias] * 2  # of the stack and of multi-token prediction
