"""One forward and backward pass of a microbatch, of which each device gives checksums of what it computed.

It is the pass of a step (`step.make_gradients`), and nothing is updated. Two executions of the one compiled program on the
same arguments give the same checksums, unless a device computes wrong.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek_jax.kernels.implementations import Replacements
from deepseek_jax.model.transformer import param_axes
from deepseek_jax.sharding import (
  LATENT_RULES,
  axis_rules,
  axis_size,
  is_gathered,
  on_gathered_params,
  pvary,
  reduce_scatter_grads,
  rotate_shards,
  spec,
  spmd,
)
from deepseek_jax.training.checksum import sum_of_hashes
from deepseek_jax.training.step import (
  StepContext,
  make_objective_fn,
  partition_specs,
  pipeline_grads,
  sum_over_copies,
  weights_in_use,
)
from deepseek_jax.training.step_config import StepConfig
from deepseek_jax.typing import Params, PyTree

SEED = np.uint32(0x9E3779B9)

# {"forward", "backward", "sums"}: each uint32 [devices, columns], in the order of the mesh's devices.
Checksums = dict[str, jax.Array]


def checksums(tree: PyTree) -> jax.Array:
  """uint32 [leaves]: of each array of `tree`, on this device."""
  return pvary(jnp.stack([sum_of_hashes(x, SEED) for x in jax.tree.leaves(tree)]))


@jax.custom_vjp
def watch_gradient(x: jax.Array, total: jax.Array) -> jax.Array:
  """`x`. Backward, the checksum of the gradient of `x` is added to that of `total` [2], as two floats of 16 bits."""
  return x


def _watch_forward(x, total):
  return x, None


def _watch_backward(_, gradient):
  checksum = sum_of_hashes(gradient, SEED)
  halves = jnp.stack([checksum >> 16, checksum & 0xFFFF]).astype(jnp.float32)
  return gradient, pvary(halves)


watch_gradient.defvjp(_watch_forward, _watch_backward)


def watched_grads(context: StepContext) -> tuple[Params, PyTree, PyTree]:
  """(gradients in the shards of the trainable parameters, metrics, gradients before any sum over devices).

  The last are those of gathered parameters. ZeRO 3 never has them all: there they are the sum of their checksums, and the
  gradients of parameters that are not gathered.
  """
  weights, frozen = weights_in_use(context)
  objective_fn, total = make_objective_fn(context, frozen), pvary(jnp.zeros(2, jnp.float32))

  def watched_objective(weights, total):
    with on_gathered_params(lambda gathered: watch_gradient(gathered, total)):
      return objective_fn(weights, *context.get_microbatch(0))

  value_and_grad = jax.value_and_grad(watched_objective, (0, 1), has_aux=True)
  (local_objective, metrics), (own_grads, total) = value_and_grad(weights, total)
  metrics = {"total_loss": local_objective, **metrics}
  logical_axes = context.select_trainable(context.logical_axes)
  if not context.gather_once:
    of_leaves = jax.tree.map(lambda g, axes: () if is_gathered(*axes) else g, own_grads, logical_axes)
    return own_grads, metrics, (total, of_leaves)
  grads = jax.tree.map(lambda g, axes: reduce_scatter_grads(g, *axes), own_grads, logical_axes)
  return grads, metrics, own_grads


def make_checked_pass(config: StepConfig, graphdef: nnx.GraphDef) -> Callable[..., Checksums]:
  """`(params, buffers, batch [1, sequence, seq + 1], mtp_weight [], step []) -> Checksums`.

  A device's row has the checksums of
    forward: its loss and what its layers observe, before any sum over devices.
    backward: its gradients before they are summed over devices. With a pipeline: after the sum over `fsdp`.
    sums: the gradient of each trainable parameter, summed over devices, as the optimizer gets it.
  """
  logical_axes = param_axes(config.model)

  def local(*arguments):
    context = StepContext.of(config, graphdef, logical_axes, 1, *arguments)
    if axis_size("stages") > 1:
      grads, metrics = pipeline_grads(context)
      own_grads = grads
    else:
      grads, metrics, own_grads = watched_grads(context)
    observed = {"forward": metrics, "backward": own_grads, "sums": sum_over_copies(context, grads)}
    return {name: checksums(tree)[None] for name, tree in observed.items()}

  def checked_pass(params, buffers, batch, mtp_weight, step):
    with axis_rules(LATENT_RULES[config.parallel.mla_latent]):
      specs = partition_specs(params), partition_specs(buffers), spec(None, "batch", None), spec(), spec()
      out_specs = dict.fromkeys(("forward", "backward", "sums"), spec("devices", None))
      return spmd(local, specs, out_specs)(params, buffers, batch, mtp_weight, step)

  return checked_pass


@functools.lru_cache(maxsize=4)  # as `step.jit_train_step`
def jit_checked_pass(
  config: StepConfig, graphdef: nnx.GraphDef, replacements: Replacements
) -> Callable[..., Checksums]:
  """`make_checked_pass`, compiled. `replacements`: those that are set when it is called."""
  return jax.jit(make_checked_pass(config, graphdef))


@jax.jit
def rotate_batch(batch: jax.Array) -> jax.Array:
  """`batch` [1, sequence, seq + 1] with each device's sequences on the next device."""
  batch_spec = spec(None, "batch", None)
  return spmd(lambda x: rotate_shards(x, "batch"), (batch_spec,), batch_spec)(batch)
