import numpy as np

from deepseek_jax.scaling.batched_bfgs import minimize


def rosenbrock(x, problems):
  a, b = x[:, 0], x[:, 1]
  value = (1 - a) ** 2 + 100 * (b - a**2) ** 2
  return value, np.stack([-2 * (1 - a) - 400 * a * (b - a**2), 200 * (b - a**2)], axis=1)


def test_all_problems_reach_their_minimum():
  starts = np.random.default_rng(0).uniform(-2, 2, (40, 2))
  x, values = minimize(rosenbrock, starts, 500)
  np.testing.assert_allclose(x, np.ones((40, 2)), atol=1e-6)
  assert x.dtype == values.dtype == np.float64 and values.max() < 1e-12


def test_problems_differ_by_their_index_and_do_not_influence_each_other():
  centers = np.random.default_rng(1).normal(size=(7, 3))

  def bowl(x, problems):
    off = x - centers[problems]
    return (off**4 + off**2).sum(1), 4 * off**3 + 2 * off

  together, _ = minimize(bowl, np.zeros((7, 3)), 200)
  np.testing.assert_allclose(together, centers, atol=1e-6)
  alone, _ = minimize(lambda x, problems: bowl(x, problems + 3), np.zeros((1, 3)), 200)
  np.testing.assert_array_equal(alone[0], together[3])


def test_a_start_without_a_finite_value_stays_and_others_go_on():
  def undefined_left(x, problems):
    with np.errstate(invalid="ignore"):
      return np.where(x[:, 0] < 0, np.nan, (x[:, 0] - 1) ** 2), 2 * (x - 1)

  x, _ = minimize(undefined_left, np.array([[-1.0], [3.0]]), 100)
  assert x[0, 0] == -1.0 and abs(x[1, 0] - 1) < 1e-8
