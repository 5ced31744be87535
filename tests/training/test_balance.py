"""The balance losses against the papers' sums, written out; the bias rule; what is logged of the loads."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config_sections import BalanceConfig
from deepseek_jax.model.router import Routing
from deepseek_jax.model_config import ModelConfig, MoEConfig
from deepseek_jax.training.balance import balance_loss, expert_counts, load_metrics

MOE = MoEConfig(num_routed_experts=6, num_experts_per_token=2, mlp=4, num_expert_groups=3, topk_groups=2)
B, T, E, K = 2, 7, 6, 2


def routing(score="softmax"):
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(B, T, E))
  e = np.exp(logits)
  scores = e / e.sum(-1, keepdims=True) if score == "softmax" else 1 / (1 + np.exp(-logits))
  indices = np.argsort(-scores, -1)[..., :K]
  arrays = (indices, np.take_along_axis(scores, indices, -1), logits, scores)
  return Routing(*(jnp.asarray(a) for a in arrays))


def parts(r, b):
  """(f of each expert, P of each expert) of a sequence: MoE eq. 13 and 14, V3 eq. 18 to 20."""
  scores = np.asarray(r.scores[b], np.float64)
  p = (scores / scores.sum(-1, keepdims=True)).mean(0)
  f = np.array([sum(e in r.indices[b, t] for t in range(T)) * E / (K * T) for e in range(E)])
  return f, p


def device(r, b):
  f, p = parts(r, b)
  return sum(f[2 * d : 2 * d + 2].mean() * p[2 * d : 2 * d + 2].sum() for d in range(3))


def communication(r, b):
  _, p = parts(r, b)
  sent = [sum(any(int(e) // 2 == d for e in r.indices[b, t]) for t in range(T)) for d in range(3)]
  return sum(3 / (2 * T) * sent[d] * p[2 * d : 2 * d + 2].sum() for d in range(3))


EXPECTED = {
  "expert_loss": lambda r, b: (parts(r, b)[0] * parts(r, b)[1]).sum(),
  "device_loss": device,
  "communication_loss": communication,
  "router_z_loss": lambda r, b: np.mean(np.log(np.exp(np.asarray(r.logits[b], np.float64)).sum(-1)) ** 2),
}


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_each_loss(name, score):
  r = routing(score)
  ours = balance_loss(r, expert_counts(r.indices, E), MOE, BalanceConfig(**{name: 0.25}))
  np.testing.assert_allclose(ours, [0.25 * EXPECTED[name](r, b) for b in range(B)], rtol=1e-5)


def test_losses_add_up_and_groups_may_be_set():
  r = routing()
  weights = {"expert_loss": 0.1, "device_loss": 0.2, "communication_loss": 0.3, "router_z_loss": 0.4}
  counts = expert_counts(r.indices, E)
  together = balance_loss(r, counts, MOE, BalanceConfig(**weights))
  apart = sum(balance_loss(r, counts, MOE, BalanceConfig(**{name: w})) for name, w in weights.items())
  np.testing.assert_allclose(together, apart, rtol=1e-6)
  one_group = dataclasses.replace(MOE, num_expert_groups=1, topk_groups=1)
  np.testing.assert_allclose(
    balance_loss(r, counts, one_group, BalanceConfig(device_loss=1.0, device_groups=3)), [device(r, b) for b in range(B)],
    rtol=1e-5,
  )  # fmt: skip


def test_an_even_load_has_loss_one_and_a_worse_one_more():
  even = jnp.full((1, 3, E), 1 / E)
  indices = jnp.array([[[0, 1], [2, 3], [4, 5]]])
  r = Routing(indices, even[..., :2], even, even)
  balance = BalanceConfig(expert_loss=1.0)
  np.testing.assert_allclose(balance_loss(r, expert_counts(indices, E), MOE, balance), [1.0], rtol=1e-6)


def test_load_metrics():
  model = ModelConfig(layers=3, first_dense_layers=1, num_mtp_layers=1, moe=MOE)
  loads = {
    "moe_layers": np.array([[2, 2, 2, 2, 2, 2], [12, 0, 0, 0, 0, 0]]),
    "mtp_layers": np.array([[6, 6, 0, 0, 0, 0]]),
  }
  scalars, shares = load_metrics(model, loads)
  assert scalars["router/layer_1/max_vio"] == pytest.approx(0) and scalars["router/layer_1/entropy"] == pytest.approx(1)
  assert scalars["router/layer_2/max_vio"] == pytest.approx(5) and scalars["router/layer_2/entropy"] == pytest.approx(0)
  assert scalars["router/layer_2/dead_experts"] == 5 and scalars["router/mtp_1/dead_experts"] == 4
  assert scalars["max_vio"] == pytest.approx((0 + 5 + 2) / 3)
  assert shares["router/layer_2/load"].tolist() == [1, 0, 0, 0, 0, 0]
  assert load_metrics(ModelConfig(), {}) == ({}, {})


def test_load_metrics_of_any_stack():
  """Layers are numbered through all stacks, whichever of them observe a load."""
  model = ModelConfig(layers=3, first_dense_layers=2, num_mtp_layers=2, moe=MOE)
  load = np.ones((2, 6))
  _, shares = load_metrics(model, {"mtp_layers": load, "dense_layers": load, "moe_layers": load[:1]})
  assert list(shares) == [f"router/{name}/load" for name in ("mtp_1", "mtp_2", "layer_0", "layer_1", "layer_2")]
