"""BFGS on many small problems at once, in numpy: all starts, or all bootstrap samples, of a fit step together.

float64 throughout, whatever jax's flags say.
"""

from collections.abc import Callable

import numpy as np

# (points [b, p], which problems they belong to [b]) -> (values [b], gradients [b, p])
Objective = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]

ARMIJO = 1e-4
MAX_HALVINGS = 25
STALL = 5  # iterations in a row without progress after which a problem has converged


def minimize(
  objective: Objective, starts: np.ndarray, max_iterations: int = 300, tolerance: float = 1e-12
) -> tuple[np.ndarray, np.ndarray]:
  """Minimizes `objective` from each of `starts`.

  Args:
    starts: [b, p].
    tolerance: relative decrease of the value below which an iteration has made no progress.

  Returns:
    (points [b, p], values [b]), both float64.
  """
  x = np.array(starts, np.float64)
  count, size = x.shape
  value, gradient = objective(x, np.arange(count))
  inverse = np.broadcast_to(np.eye(size), (count, size, size)).copy()
  stalled = np.where(np.isfinite(value), 0, STALL)
  is_first = np.ones(count, bool)
  for _ in range(max_iterations):
    active = np.flatnonzero(stalled < STALL)
    if not active.size:
      break
    g, h = gradient[active], inverse[active]
    direction = -np.einsum("bij,bj->bi", h, g)
    slope = np.einsum("bi,bi->b", direction, g)
    uphill = ~(slope < 0)  # the estimate has lost its positive definiteness: steepest descent
    h[uphill], direction[uphill] = np.eye(size), -g[uphill]
    slope[uphill] = -np.einsum("bi,bi->b", g[uphill], g[uphill])
    # A first step of length 1 at most, since nothing is known of the curvature.
    largest = np.maximum(np.abs(direction).max(axis=1), 1e-300)
    length = np.where(is_first[active], np.minimum(1.0, 1 / largest), 1.0)
    new_x, new_value, new_gradient, moved = _line_search(
      objective, x[active], value[active], gradient[active], direction, slope, length, active
    )
    step, change = new_x - x[active], new_gradient - g
    inverse[active] = _update(h, step, change, is_first[active])
    inverse[active[~moved]] = np.eye(size)
    progress = value[active] - new_value > tolerance * np.maximum(np.abs(new_value), 1e-300)
    stalled[active] = np.where(progress, 0, stalled[active] + 1)
    stalled[active[~moved & is_first[active]]] = STALL  # steepest descent finds nothing lower: a minimum
    is_first[active] = ~moved
    x[active], value[active], gradient[active] = new_x, new_value, new_gradient
  return x, value


def _line_search(
  objective: Objective, x: np.ndarray, value: np.ndarray, gradient: np.ndarray, direction: np.ndarray, slope: np.ndarray,
  length: np.ndarray, problems: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
  """Halves the step until the value has decreased enough (Armijo). Returns points, values, gradients, and who has moved."""
  new_x, new_value, new_gradient = x.copy(), value.copy(), gradient.copy()
  moved, searching = np.zeros(len(x), bool), np.arange(len(x))
  for _ in range(MAX_HALVINGS):
    trial = x[searching] + length[searching, None] * direction[searching]
    trial_value, trial_gradient = objective(trial, problems[searching])
    enough = trial_value <= value[searching] + ARMIJO * length[searching] * slope[searching]  # false for NaN
    enough &= np.isfinite(trial_gradient).all(axis=1)
    found = searching[enough]
    new_x[found], new_value[found], new_gradient[found] = trial[enough], trial_value[enough], trial_gradient[enough]
    moved[found] = True
    searching = searching[~enough]
    if not searching.size:
      break
    length[searching] *= 0.5
  return new_x, new_value, new_gradient, moved


def _update(inverse: np.ndarray, step: np.ndarray, change: np.ndarray, is_first: np.ndarray) -> np.ndarray:
  """The BFGS update of the inverse Hessians, where the curvature along the step is positive."""
  curvature = np.einsum("bi,bi->b", step, change)
  with np.errstate(over="ignore"):
    norms = np.linalg.norm(step, axis=1) * np.linalg.norm(change, axis=1)
  valid = curvature > np.maximum(1e-10 * norms, 1e-290)
  with np.errstate(all="ignore"):  # far from all data the numbers may be too large or too small: no update then
    rho = 1 / curvature
    scale = np.where(is_first & valid, curvature / np.einsum("bi,bi->b", change, change), 1.0)
    scaled = inverse * scale[:, None, None]
    hy = np.einsum("bij,bj->bi", scaled, change)
    yhy = np.einsum("bi,bi->b", change, hy)
    outer, cross = np.einsum("bi,bj->bij", step, step), np.einsum("bi,bj->bij", hy, step)
    bend = (rho + rho**2 * yhy)[:, None, None] * outer
    updated = scaled + bend - rho[:, None, None] * (cross + cross.transpose(0, 2, 1))
  valid &= np.isfinite(updated).all(axis=(1, 2))
  return np.where(valid[:, None, None], updated, inverse)
