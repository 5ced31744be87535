"""Muon, as DeepSeek-V4 uses it: the momentum of every hidden matrix, orthogonalized, is its update.

Of each matrix W [n, m], with the clipped gradient G, momentum M and rate eta (V4 report, Algorithm 1):

  M = mu M + G
  O = newton_schulz(mu M + G)             Nesterov's momentum (Jordan et al. 2024)
  W = (1 - eta decay) W - eta gamma sqrt(max(n, m)) O

What is from where:
- The V4 report, which was read in two translations on GitHub that agree, and not in the original: the steps above, the ten
  Newton-Schulz steps, AdamW for embedding, head and norms and Muon for all else (section 2.4), so that routers have Muon;
  mu 0.95 (`optimizer.momentum`), gamma 0.18 (`optimizer.update_rms`), decay 0.1 (section 4.2.2); products in bfloat16,
  matrices of one shape in one batch, on whole matrices that the devices share (section 3.5.1).
- Moonlight (arXiv:2502.16982): the root mean square of an orthogonal [n, m] is 1 / sqrt(max(n, m)). Scaled to gamma, which
  is near that of AdamW's updates, one learning rate serves both.
- A projection to or from all heads is one matrix, as in Moonlight's code. V4 says "each logically independent weight"
  and not whether heads are. Gate and up are two matrices, MLA's up-projection of keys and values is one, and experts
  have their own.
- V4 has no clipping of attention logits (QK-Clip), since it has norms on queries and keys. Models up to V3 have neither.

Clipping by the global norm comes before orthogonalization, in `make_optimizer`. It limits the share of one step's gradient
in the momentum. Orthogonalization undoes any scale of the momentum as a whole.

Matrix products are in `model.compute_dtype`, with sums in at least float32: bfloat16 by default, float64 in a float64 run.
"""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Self

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.config_sections import OptimizerConfig
from deepseek_jax.model.linear import at_least_float32, matmul_precision
from deepseek_jax.model.transformer import param_axes
from deepseek_jax.model_config import ModelConfig
from deepseek_jax.sharding import axis_size, mesh_axes, shard_stack, spec, spmd, unshard_stack
from deepseek_jax.typing import Params, PyTree

# (a, b, c) of each step (V4 report, eq. 28 and below): eight that converge fast, two that end at 1.
COEFFICIENTS = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2
MIN_NORM = 1e-18  # float32 has the squares of larger elements
# Matrices that are multiplied at once have at most so many elements, which bounds the memory of their products.
MAX_BATCH_ELEMENTS = 2**26


def muon(config: OptimizerConfig, model: ModelConfig) -> optax.GradientTransformation:
  """Muon for hidden matrices, Adam for the rest: embedding, head and every vector."""

  def labels(params):
    axes = _select(param_axes(model, stacked=False), params)
    return jax.tree.map(lambda _, a: "muon" if is_hidden_matrix(a) else "adamw", params, axes)

  def orthogonalized(updates, params):
    layouts = matrix_layouts(model, updates)
    specs = jax.tree.map(lambda layout: spec(*layout.axes), layouts)

    def local(shards):
      results = orthogonalize_shards(jax.tree.leaves(layouts), model, config.update_rms, jax.tree.leaves(shards))
      return jax.tree.unflatten(jax.tree.structure(shards), results)

    return spmd(local, (specs,), specs, differentiable=False)(updates)

  momentum = optax.trace(config.momentum, nesterov=True)
  return optax.partition(
    {
      "adamw": optax.scale_by_adam(config.beta1, config.beta2, config.eps),
      "muon": optax.chain(momentum, optax.stateless(orthogonalized)),
    },
    labels,
  )


def _select(tree: PyTree, params: Params) -> PyTree:
  """The tuples in the nested dicts `tree` at the paths of `params`, which may hold a part of them."""
  leaves = dict(jax.tree.leaves_with_path(tree, is_leaf=lambda node: isinstance(node, tuple)))
  return jax.tree.map_with_path(lambda path, _: leaves[path], params)


def is_hidden_matrix(axes: Sequence[str | None]) -> bool:
  """Whether a parameter with these logical axes, without that of stacked layers, is a matrix between hidden states.

  Raises:
    ValueError: it is neither matrix nor vector, and Muon has to be told what it is.
  """
  dimensions = matrix_dimensions(axes)
  if len(dimensions) > 2:
    raise ValueError(f"a parameter with logical axes {axes} is neither matrix nor vector: see matrix_dimensions")
  return len(dimensions) == 2 and "vocab" not in axes


def matrix_dimensions(axes: Sequence[str | None]) -> list[tuple[str | None, ...]]:
  """The logical axes of each dimension of a matrix or vector: heads and head_dim are one, experts are a stack of them."""
  dimensions: list[tuple[str | None, ...]] = []
  for name in axes:
    if name == "head_dim" and dimensions:
      dimensions[-1] = (*dimensions[-1], name)
    elif name != "experts":
      dimensions.append((name,))
  return dimensions


@dataclasses.dataclass(frozen=True)
class MatrixLayout:
  """A parameter as a stack of matrices."""

  axes: tuple[str | None, ...]  # logical axes of all dimensions: those of the stack first
  rows: tuple[str | None, ...]  # those that make a matrix's rows, of which the first may be sharded
  columns: tuple[str | None, ...]

  @classmethod
  def of(cls, axes: tuple[str | None, ...], own_axes: tuple[str | None, ...]) -> Self:
    """axes: of the whole parameter. own_axes: without that of stacked layers."""
    return cls(axes, *matrix_dimensions(own_axes))

  def stack_shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
    """(matrices, rows, columns) of a parameter's shard of this `shape`."""
    ends = len(shape) - len(self.rows + self.columns), len(shape) - len(self.columns)
    return math.prod(shape[: ends[0]]), math.prod(shape[ends[0] : ends[1]]), math.prod(shape[ends[1] :])

  def as_wide(self, shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[str | None, ...], bool]:
    """(sizes, logical axes, whether they are transposed for it) of the whole matrices, made wide, of a shard's `shape`."""
    names = self.rows[0], self.columns[0]
    sizes = tuple(size * axis_size(name) for size, name in zip(self.stack_shape(shape)[1:], names, strict=True))
    return (sizes[::-1], names[::-1], True) if sizes[0] > sizes[1] else (sizes, names, False)


def matrix_layouts(model: ModelConfig, matrices: Params) -> PyTree:
  """The tree of `matrices`, hidden ones of the parameters, with the MatrixLayout of each."""
  axes = (_select(param_axes(model, stacked=stacked), matrices) for stacked in (True, False))
  return jax.tree.map(lambda _, *axes: MatrixLayout.of(*axes), matrices, *axes)


def orthogonalize_shards(
  layouts: Sequence[MatrixLayout], model: ModelConfig, update_rms: float, shards: Sequence[jax.Array]
) -> list[jax.Array]:
  """Each of `shards`, one device's part of stacks of matrices, orthogonalized and scaled. Called inside `spmd`.

  Matrices of the same shape and sharding are one batch. A wide matrix and the transpose of a tall one are the same shape.
  """
  groups: dict[tuple, list[tuple]] = collections.defaultdict(list)
  for i, (layout, shard) in enumerate(zip(layouts, shards, strict=True)):
    sizes, names, is_tall = layout.as_wide(shard.shape)
    stack = shard.reshape(layout.stack_shape(shard.shape))
    groups[sizes, tuple(map(mesh_axes, names))].append((i, names, is_tall, stack.mT if is_tall else stack))
  results = list(shards)
  for ((_, longer), _), members in groups.items():
    stack = jnp.concatenate([stack for *_, stack in members]).astype(model.compute_dtype)
    with matmul_precision(model):
      stack = orthogonalize_stack(stack, *members[0][1])
    ends = itertools.accumulate(len(stack) for *_, stack in members)
    for (i, _, is_tall, _), part in zip(members, jnp.split(stack, list(ends)[:-1]), strict=True):
      part = (part.mT if is_tall else part).reshape(shards[i].shape).astype(shards[i].dtype)
      results[i] = update_rms * math.sqrt(longer) * part
  return results


def orthogonalize_stack(stack: jax.Array, rows: str | None, columns: str | None) -> jax.Array:
  """The matrices of `stack` [stack, rows, columns] orthogonalized, on the devices that share logical axes of theirs.

  Each device gets whole matrices for shards of all, and gives shards back: an all-to-all per sharded dimension, both
  ways. Zero matrices fill the stack where the devices do not divide it. Devices with copies, as those of `data`, compute
  the same, as V4's do beyond its limit of ZeRO. Sharing their work too would save 0.18 s of a step's 121 s of `v3` on
  v5p:8x8x16, where MLA's up-projections have copies, and under 1% of `1b` on two slices (derived from the plan).
  """
  num_matrices, devices = len(stack), axis_size(rows, columns)
  stack = jnp.pad(stack, ((0, -num_matrices % devices), (0, 0), (0, 0)))
  stack = newton_schulz(shard_stack(stack, rows, columns))
  return unshard_stack(stack, rows, columns)[:num_matrices]


def newton_schulz(stack: jax.Array) -> jax.Array:
  """U V^T of each matrix U S V^T of `stack` [stack, n, m], n <= m, about: singular values that are not tiny end near 1."""
  dtype, wide = stack.dtype, at_least_float32(stack.dtype)
  matmul = functools.partial(jnp.matmul, preferred_element_type=wide)

  def orthogonalize(matrix):
    matrix = matrix.astype(wide)
    matrix /= jnp.maximum(jnp.sqrt(jnp.sum(matrix**2)), MIN_NORM)

    def step(x, coefficients):
      a, b, c = coefficients
      narrow = x.astype(dtype)
      gram = matmul(narrow, narrow.T)
      polynomial = b * gram + c * matmul(gram.astype(dtype), gram.astype(dtype))
      return a * x + matmul(polynomial.astype(dtype), narrow), None

    return jax.lax.scan(step, matrix, jnp.array(COEFFICIENTS, wide))[0].astype(dtype)

  batch_size = max_batch_size(stack.shape[1:])
  if len(stack) <= batch_size:
    return jax.vmap(orthogonalize)(stack)
  return jax.lax.map(orthogonalize, stack, batch_size=batch_size)


def max_batch_size(sizes: Sequence[int]) -> int:
  """How many whole matrices of these `sizes` are multiplied at once."""
  return max(MAX_BATCH_ELEMENTS // math.prod(sizes), 1)


def update_bytes(model: ModelConfig, params: Params) -> int:
  """Bytes that Muon's update holds on a device at its peak, beside parameters, gradients and state.

  That is one batch in `newton_schulz`, of the group for which it is largest: of each matrix [n, m] the iterate before and
  after a step and its copy in the compute dtype, and as much for [n, n]. Where a group is several batches, also three
  copies of its matrices in the compute dtype: shards, whole, orthogonalized. libtpu 0.0.50 allocates 0.97 times as much
  for the update of `1b` on v5e:4x4, where each group is one batch, and 1.25 times on v5e:2x2, where one is three.

  Args:
    params: the trainable ones, abstract, on the mesh that is set.
  """
  narrow = jnp.dtype(model.compute_dtype).itemsize
  wide = jnp.dtype(at_least_float32(jnp.dtype(model.compute_dtype))).itemsize
  axes = _select(param_axes(model, stacked=False), params)
  matrices = jax.tree.map(lambda param, axes: param if is_hidden_matrix(axes) else None, params, axes)
  groups: dict[tuple, int] = collections.defaultdict(int)
  for layout, param in zip(jax.tree.leaves(matrix_layouts(model, matrices)), jax.tree.leaves(matrices), strict=True):
    shape = param.sharding.shard_shape(param.shape) if param.sharding else param.shape
    sizes, names, _ = layout.as_wide(shape)
    groups[sizes, tuple(map(mesh_axes, names)), axis_size(*names)] += layout.stack_shape(shape)[0]
  peak = 0
  for ((n, m), _, devices), num_matrices in groups.items():
    gathered = -(-num_matrices // devices)
    batch_size = min(gathered, max_batch_size((n, m)))
    stacks = 3 * gathered * n * m * narrow if gathered > batch_size else 0
    peak = max(peak, stacks + batch_size * (n * m + n * n) * (2 * wide + narrow))
  return peak
