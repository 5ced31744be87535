"""A loop over the pairs of a group and `step` rows in which it has some."""

import jax
import jax.numpy as jnp

from deepseek_jax.kernels.fp8_matmul.xla import accumulated, of_rows, padded, product, whole
from deepseek_jax.kernels.implementations import vary
from deepseek_jax.kernels.qtensor import QTensor


def matmul(a, b, group_sizes, step, out_dtype):
  a, b, rows = whole(a), whole(b), a.shape[0]
  # Rows have scales of their own.
  values, scales = (padded(x, 0, -rows % step) for x in (a.values, a.scales))
  visits, of_visit = _visits(group_sizes, step)

  def visit(i, y):
    group, start, own = of_visit(i)
    part = QTensor(*(jax.lax.dynamic_slice_in_dim(x, start, step) for x in (values, scales)), a.tile)
    new = accumulated(part, b[group]).astype(out_dtype)
    old = jax.lax.dynamic_slice_in_dim(y, start, step)
    return jax.lax.dynamic_update_slice_in_dim(y, jnp.where(own[:, None], new, old), start, 0)

  zeros = jnp.zeros((values.shape[0], b.shape[1]), out_dtype)
  return jax.lax.fori_loop(0, visits, visit, vary(zeros, a, b, group_sizes)[0])[:rows]


def wgrad(a, b, group_sizes, step, out_dtype):
  values = [padded(q.values, 1, -a.shape[1] % step) for q in (a, b)]
  visits, of_visit = _visits(group_sizes, step)

  def visit(i, dw):
    group, start, own = of_visit(i)
    # Both, since zero times NaN is NaN.
    parts = (jnp.where(own, jax.lax.dynamic_slice_in_dim(x, start, step, 1), 0) for x in values)
    tile = start // a.tile[1]
    return dw.at[group].add(product(*parts) * of_rows(a, tile)[:, None] * of_rows(b, tile))  # in place

  zeros = jnp.zeros((group_sizes.size, a.shape[0], b.shape[0]))
  return jax.lax.fori_loop(0, visits, visit, vary(zeros, a, b, group_sizes)[0]).astype(out_dtype)


def _visits(group_sizes, step):
  """(number of visits, visit -> (group, first of the `step` rows, which of them are the group's [step] bool))."""
  ends = jnp.cumsum(group_sizes)
  starts = ends - group_sizes
  first = starts // step
  counts = jnp.where(group_sizes > 0, -(-ends // step) - first, 0)
  until = jnp.cumsum(counts)

  def of_visit(i):
    group = jnp.searchsorted(until, i, side="right")
    start = (first[group] + i - (until[group] - counts[group])) * step
    row = start + jnp.arange(step)
    return group, start, (row >= starts[group]) & (row < ends[group])

  return until[-1], of_visit
