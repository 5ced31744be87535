import pytest

from deepseek_jax.errors import ConfigError
from deepseek_jax.scaling.laws import DEEPSEEK_ALLOCATION, TrainingRun, hyperparam_law, optimal_allocation


@pytest.mark.parametrize(
  ("compute", "batch", "used_batch", "lr", "used_lr"),
  [(8.456e22, 9.223e6, 2304 * 4096, 4.246e-4, 4.2e-4), (9.946e23, 2.065e7, 4608 * 4096, 3.120e-4, 3.2e-4)],
)
def test_deepseek_s_law_at_7b_and_67b(compute, batch, used_batch, lr, used_lr):
  law, run = hyperparam_law("deepseek"), TrainingRun(compute, 1.0, 1.0)
  assert law.batch_tokens(run) == pytest.approx(batch, rel=1e-3)
  assert law.batch_tokens(run) == pytest.approx(used_batch, rel=0.1)
  assert law.lr(run) == pytest.approx(lr, rel=1e-3) and law.lr(run) == pytest.approx(used_lr, rel=0.1)


def test_steplaw_depends_on_parameters_and_tokens():
  law = hyperparam_law("steplaw")
  run = TrainingRun(0.0, 1e9, 1e11)
  assert law.lr(run) == pytest.approx(1.79 * 1e9**-0.713 * 1e11**0.307)
  assert law.batch_tokens(run) == pytest.approx(0.58 * 1e11**0.571)


def test_the_allocation_spends_the_budget_and_its_inverse_finds_it():
  for flops in (1e17, 3e20):
    allocation = optimal_allocation(flops)
    assert allocation.scale * allocation.tokens == pytest.approx(flops, rel=1e-12)
    assert allocation.tokens == pytest.approx(5.8316 * flops**0.4757, rel=1e-3)
    assert DEEPSEEK_ALLOCATION.for_tokens(allocation.tokens).flops == pytest.approx(flops, rel=1e-9)


def test_unknown_laws_and_budgets_are_refused():
  with pytest.raises(ConfigError, match="expected one of deepseek, steplaw"):
    hyperparam_law("kaplan")
  with pytest.raises(ConfigError, match="positive"):
    optimal_allocation(0)
