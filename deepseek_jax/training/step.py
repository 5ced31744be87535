"""One update: microbatches, gradients, optimizer. A pure function of state and batch."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Self

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.typing import DTypeLike

from deepseek_jax.config import Config
from deepseek_jax.kernels.implementations import Replacements
from deepseek_jax.model.transformer import buffer_types, graphdef, param_axes
from deepseek_jax.optimizers.optimizer import make_optimizer, place_opt_state
from deepseek_jax.optimizers.trainable import merge_params, split_trainable
from deepseek_jax.sharding import (
  LATENT_RULES,
  UNSHARDED_PARAMS,
  all_gather_params,
  as_replicated,
  axis_rules,
  axis_size,
  psum,
  psum_replicated,
  pvary,
  reduce_scatter_grads,
  spec,
  spmd,
)  # fmt: skip
from deepseek_jax.training.layer_aux import mean_over_tokens, must_skip, sum_over_devices
from deepseek_jax.training.layer_rms import gradient_mean_squares
from deepseek_jax.training.objective import Objective
from deepseek_jax.training.pipeline_stage import PipelineStage, pipeline_stack, to_stage_layout
from deepseek_jax.training.router_bias import update_router_biases
from deepseek_jax.training.schedule import StepInputs
from deepseek_jax.training.state import TrainState, abstract_state
from deepseek_jax.training.step_config import StepConfig
from deepseek_jax.typing import Params, PyTree


def partition_specs(tree: PyTree) -> PyTree:
  """PartitionSpecs of the arrays in `tree`."""
  return jax.tree.map(lambda array: jax.typeof(array).sharding.spec, tree)


def make_eval_step(config: StepConfig, graphdef: nnx.GraphDef) -> Callable[[Params, Params, jax.Array], jax.Array]:
  """`(params, buffers, tokens [batch, seq + 1]) -> [batch]`: the cross entropy in nats, summed over each sequence.

  It is NaN where a training step would be skipped, as after an overflow of an expert buffer: nothing is dropped
  unnoticed.
  """
  objective = Objective(config)

  def local(params, buffers, tokens):
    loss_sums, _, metrics = objective(nnx.merge(graphdef, params, buffers), tokens)
    return jnp.where(must_skip(sum_over_devices(metrics, "batch")), jnp.nan, loss_sums)

  def eval_step(params, buffers, tokens):
    with axis_rules(LATENT_RULES[config.parallel.mla_latent]):
      in_specs = partition_specs(params), partition_specs(buffers), spec("batch", None)
      return spmd(local, in_specs, spec("batch"), differentiable=False)(params, buffers, tokens)

  return eval_step


def cast(params: Params, logical_axes: PyTree, dtype: DTypeLike) -> Params:
  """`params` with their matrices in the model's compute `dtype`, except the router's, which keep their dtype."""

  def leaf(path, param, axes):
    is_router = any(entry.key == "router" for entry in path)
    return param.astype(dtype) if any(axes) and not is_router else param

  return jax.tree.map_with_path(leaf, params, logical_axes)


def cast_and_gather(params: Params, logical_axes: PyTree, dtype: DTypeLike) -> Params:
  """`params` as the model uses them: in `dtype`, and gathered over FSDP_AXES."""
  params = cast(params, logical_axes, dtype)
  return jax.tree.map(lambda param, axes: all_gather_params(param, *axes), params, logical_axes)


def make_gradients(
  config: StepConfig, graphdef: nnx.GraphDef
) -> Callable[[TrainState, jax.Array, jax.Array | int, jax.Array], tuple[Params, PyTree]]:
  """`(state, batch, microbatches, mtp_weight) -> (gradients, metrics)`, both means over the tokens of the batch.

  Gradients are of the trainable parameters, in the layout of state.params. Arguments and metrics are as in `make_train_step`; counts are sums.
  """
  logical_axes = param_axes(config.model)

  def local(microbatches, *arguments):
    """The program of one device."""
    context = StepContext.of(config, graphdef, logical_axes, microbatches, *arguments)
    grads, metrics = (pipeline_grads if axis_size("stages") > 1 else accumulate_grads)(context)
    grads = sum_over_copies(context, grads)
    total_loss = psum(metrics.pop("total_loss"), "batch", "stream", "stages")
    return grads, as_replicated({"total_loss": total_loss} | sum_over_devices(metrics, "batch", "stages"))

  def gradients(state, batch, microbatches, mtp_weight):
    tokens_in_batch = microbatches * batch.shape[1] * (batch.shape[2] - 1)
    with axis_rules(LATENT_RULES[config.parallel.mla_latent]):
      in_specs = (
        partition_specs(state.params),
        partition_specs(state.buffers),
        spec(None, "batch", None),
        spec(),
        spec(),
      )
      out_specs = partition_specs(split_trainable(state.params, config.optimizer.trainable)[0]), spec()
      arguments = state.params, state.buffers, batch, mtp_weight, state.step
      if isinstance(microbatches, int):  # a constant of the program, so that XLA removes the loop over one microbatch
        grads, metrics = spmd(functools.partial(local, microbatches), in_specs, out_specs)(*arguments)
      else:
        grads, metrics = spmd(local, (spec(), *in_specs), out_specs)(microbatches, *arguments)

    # Divided by the tokens of all microbatches, so that they add up to the gradient of the global batch.
    return jax.tree.map(lambda g: g / tokens_in_batch, grads), mean_over_tokens(metrics, tokens_in_batch)

  return gradients


@dataclasses.dataclass(frozen=True)
class StepContext:
  """The inputs of one device's part of a step."""

  config: StepConfig
  graphdef: nnx.GraphDef
  objective: Objective
  logical_axes: PyTree  # of each parameter
  gather_once: bool  # ZeRO 1 and 2: parameters are gathered once a step; ZeRO 3: where they are used
  params: Params
  buffers: Params
  # index -> (tokens [batch, seq + 1], dropout key or None)
  get_microbatch: Callable[[jax.Array | int], tuple[jax.Array, jax.Array | None]]
  mtp_weight: jax.Array
  microbatches: jax.Array | int

  @classmethod
  def of(
    cls,
    config: StepConfig,
    graphdef: nnx.GraphDef,
    logical_axes: PyTree,
    microbatches: jax.Array | int,
    params: Params,
    buffers: Params,
    batch: jax.Array,
    mtp_weight: jax.Array,
    step: jax.Array,
  ) -> Self:
    """That of one device, in `spmd`; `batch` [microbatch, its sequences, seq + 1], `step`: completed updates."""
    params, buffers, batch, mtp_weight = pvary((params, buffers, batch, mtp_weight))

    def get_microbatch(i):
      is_random = config.model.is_random
      key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), step), i) if is_random else None
      return jax.lax.dynamic_index_in_dim(batch, i, keepdims=False), key

    return cls(
      config, graphdef, Objective(config), logical_axes, config.parallel.zero < 3, params, buffers, get_microbatch,
      mtp_weight, microbatches,
    )  # fmt: skip

  def select_trainable(self, tree: PyTree) -> PyTree:
    """What `tree`, of the structure of the parameters, has of those that are trained."""
    return split_trainable(tree, self.config.optimizer.trainable)[0]


def weights_in_use(context: StepContext) -> tuple[Params, Params]:
  """(trainable, frozen) parameters as the forward pass takes them, gathered where that is done once a step."""
  weights = context.params
  if context.gather_once:
    weights = cast_and_gather(weights, context.logical_axes, context.config.model.compute_dtype)
  return split_trainable(weights, context.config.optimizer.trainable)


def make_objective_fn(context: StepContext, frozen: Params) -> Callable[..., tuple[jax.Array, PyTree]]:
  """`(weights, tokens [batch, seq + 1], dropout key or None) -> (local_objective [], metrics)`, to differentiate."""

  def objective_fn(weights, tokens, key):
    with axis_rules(UNSHARDED_PARAMS if context.gather_once else {}):
      model = nnx.merge(context.graphdef, merge_params(weights, frozen), context.buffers)
      loss_sums, local_objective, metrics = context.objective(model, tokens, key, context.mtp_weight)
    return local_objective, {"loss": loss_sums.sum(), **metrics}

  return objective_fn


def sum_over_copies(context: StepContext, grads: Params) -> Params:
  """`grads` of the trainable parameters' shards, summed over the devices that have copies of a shard."""
  logical_axes = context.select_trainable(context.logical_axes)
  return jax.tree.map(lambda g, axes: psum_replicated(g, *axes), grads, logical_axes)


def accumulate_grads(context: StepContext) -> tuple[Params, PyTree]:
  """(gradients in the shards of the trainable parameters, metrics): sums over microbatches, one after the other.

  Each device differentiates its local objective. What is optimized is total_loss = psum(local_objective), in
  `make_gradients`.
  """
  zero, logical_axes = context.config.parallel.zero, context.select_trainable(context.logical_axes)
  weights, frozen = weights_in_use(context)
  objective_fn = make_objective_fn(context, frozen)

  @functools.partial(jax.jit, inline=True)  # traced once, for the shapes and for the loop
  def microbatch_grads(i):
    value_and_grad = jax.value_and_grad(objective_fn, has_aux=True)
    (local_objective, metrics), grads = value_and_grad(weights, *context.get_microbatch(i))
    metrics = {"total_loss": local_objective, **metrics}
    return pvary((reduce_scatter(grads) if zero == 2 else grads, metrics))

  def reduce_scatter(grads):
    return jax.tree.map(lambda g, axes: reduce_scatter_grads(g, *axes), grads, logical_axes)

  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(microbatch_grads, 0))
  # Gradients are summed in the dtype of the parameters, whatever the dtype of `weights`.
  zeros = jax.tree.map(lambda z, p: z.astype(p.dtype), zeros[0], context.select_trainable(context.params)), zeros[1]

  def add_microbatch(i, sums):
    # The barrier: XLA for TPUs moves the reduce-scatter behind the loop, which takes memory for unsharded gradients.
    # XLA's reduce-scatter code motion fails with an internal error on this loop (libtpu 0.0.50).
    return jax.tree.map(jnp.add, sums, jax.lax.optimization_barrier(microbatch_grads(i)))

  grads, metrics = jax.lax.fori_loop(0, context.microbatches, add_microbatch, pvary(zeros))
  return reduce_scatter(grads) if zero == 1 else grads, metrics


def pipeline_grads(context: StepContext) -> tuple[Params, PyTree]:
  """As `accumulate_grads`, with microbatches that pass through pipeline stages."""
  stack, table = pipeline_stack(context.config)
  dtype, logical_axes = context.config.model.compute_dtype, context.logical_axes
  gather_once, patterns = context.gather_once, context.config.optimizer.trainable
  outer_params = {name: params for name, params in context.params.items() if name != stack}
  outer_axes = {name: tree for name, tree in logical_axes.items() if name != stack}

  layers = cast(context.params[stack], logical_axes[stack], dtype)
  layers = to_stage_layout(layers, logical_axes[stack], table, gather_once)
  layers, frozen_layers = split_trainable(layers, patterns, stack)
  outer_weights = cast_and_gather(outer_params, outer_axes, dtype) if gather_once else outer_params
  outer_weights, frozen_outer = split_trainable(outer_weights, patterns)
  placeholders = jax.tree.map(lambda _: jnp.zeros(()), context.params)
  stage = PipelineStage(
    context.config,
    context.graphdef,
    context.objective,
    context.buffers,
    context.get_microbatch,
    context.mtp_weight,
    placeholders,
    frozen_outer,
    frozen_layers,
    gather_once,
  )
  grads, layer_grads, metrics = stage.grads(outer_weights, layers, context.microbatches)
  if gather_once:
    grads = jax.tree.map(lambda g, axes: reduce_scatter_grads(g, *axes), grads, context.select_trainable(outer_axes))
  trainable_axes, trainable_params = (context.select_trainable(t).get(stack) for t in (logical_axes, context.params))
  if not trainable_params:
    return grads, metrics

  def stage_layout(layers):
    return to_stage_layout(layers, trainable_axes, table, gather_once)

  # The transpose of the layout puts the gradients of this stage's layers back into the shards of the parameters.
  (layer_grads,) = jax.vjp(stage_layout, trainable_params)[1](layer_grads)
  return grads | {stack: layer_grads}, metrics


def make_apply_gradients(
  config: StepConfig,
) -> Callable[[TrainState, Params, PyTree, StepInputs], tuple[TrainState, PyTree]]:
  """`(state, grads, metrics, inputs) -> (state, metrics)`: the optimizer and the update of router biases.

  An update is skipped when the gradient norm is not finite or an observation says so, as where assignments overflowed
  an expert buffer. Then params, buffers and optimizer state stay, and `step` is counted.

  grads, metrics: of `make_gradients`. inputs: as in `make_train_step`. The metrics gain grad_norm and skipped.
  """
  tx, offload = make_optimizer(config.optimizer, config.model), config.optimizer.offload
  bias_rule, moe, types = config.balance.bias_rule, config.model.moe, buffer_types(config.model)

  def apply_gradients(state, grads, metrics, inputs):
    grad_norm = optax.tree.norm(grads)
    is_good = jnp.isfinite(grad_norm) & ~jnp.asarray(must_skip(metrics))
    old_opt_state = place_opt_state(jax.memory.Space.Device, state.opt_state) if offload else state.opt_state
    old_params, frozen = split_trainable(state.params, config.optimizer.trainable)
    updates, opt_state = tx.update(grads, old_opt_state, old_params)
    learning_rate = inputs.learning_rate
    params = jax.tree.map(lambda p, u: p - learning_rate.astype(p.dtype) * u, old_params, updates)
    buffers = update_router_biases(bias_rule, moe, state.buffers, types, metrics, inputs)
    new, old = (params, buffers, opt_state), (old_params, state.buffers, old_opt_state)
    params, buffers, opt_state = jax.tree.map(lambda new, old: jnp.where(is_good, new, old), new, old)
    opt_state = place_opt_state(jax.memory.Space.Host, opt_state) if offload else opt_state
    is_skipped = 1 - is_good.astype(jnp.int32)
    skipped = {
      "total": state.skipped["total"] + is_skipped,
      "in_a_row": is_skipped * (state.skipped["in_a_row"] + 1),
    }
    metrics = metrics | {"grad_norm": grad_norm, "skipped": skipped} | gradient_mean_squares(grads, config)
    return TrainState(state.step + 1, merge_params(params, frozen), buffers, opt_state, skipped), metrics

  return apply_gradients


def make_train_step(
  config: StepConfig, graphdef: nnx.GraphDef
) -> Callable[[TrainState, jax.Array, jax.Array | int, StepInputs], tuple[TrainState, PyTree]]:
  """`(state, batch, microbatches, inputs) -> (state, metrics)`: the update. Jit it with `donate_argnames="state"`.

  Its arguments:
    batch: [microbatch, sequence, seq + 1] int32.
    microbatches: how many of the batch's are used, the first ones. A batch ramp changes this number and no shape.
    inputs: arrays [] in the parameter dtype.

  Its metrics:
    loss: cross entropy, the mean in nats per token.
    total_loss: what is optimized.
    grad_norm: before clipping.
    gradients: with `layer_rms`, {stack: [layers]}, the mean square of the gradients of a layer, before clipping.
    mtp_loss: [depth], a mean per token.
    what layers observe, as `layer_aux.LAYER_AUX` declares it: with experts balance_loss, load and overflow.
    skipped: {"total", "in_a_row"}, counts of skipped updates.
  """
  gradients, apply_gradients = make_gradients(config, graphdef), make_apply_gradients(config)

  def train_step(state, batch, microbatches, inputs):
    grads, metrics = gradients(state, batch, microbatches, inputs.mtp_weight)
    return apply_gradients(state, grads, metrics, inputs)

  return train_step


@functools.lru_cache(maxsize=4)  # so that another run of this process, as in a notebook, compiles nothing again
def jit_train_step(
  config: StepConfig, graphdef: nnx.GraphDef, replacements: Replacements, static_microbatches: bool
) -> Callable[[TrainState, jax.Array, jax.Array | int, StepInputs], tuple[TrainState, PyTree]]:
  """`make_train_step`, compiled, which donates `state`.

  Args:
    replacements: those that are set when it is called: two programs.
    static_microbatches: the number of microbatches is a constant of the program, else an argument.
  """
  static = "microbatches" if static_microbatches else ()
  return jax.jit(make_train_step(config, graphdef), donate_argnames="state", static_argnames=static)


@functools.lru_cache(maxsize=4)
def jit_eval_step(
  config: StepConfig, graphdef: nnx.GraphDef, replacements: Replacements
) -> Callable[[Params, Params, jax.Array], jax.Array]:
  """`make_eval_step`, compiled. `replacements` as in `jit_train_step`."""
  return jax.jit(make_eval_step(config, graphdef))


def abstract_step(config: Config, mesh: Mesh | AbstractMesh) -> tuple[Callable, tuple[TrainState, PyTree, PyTree]]:
  """(update, (state, batch, inputs)): the update of a full batch, and its abstract arguments, to trace or compile.

  Nothing is allocated or run. `mesh` is the mesh that is set. It may be abstract, or of a topology you do not have. The
  number of microbatches is a constant of the program, also where a batch ramp makes it an argument in training.
  """
  step_config, microbatch = StepConfig.of(config, bos=0), config.train.microbatch or config.train.global_batch
  state = abstract_state(step_config, mesh)
  microbatches = config.train.global_batch // microbatch
  shape = microbatches, microbatch, config.data.seq + 1
  batch = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, spec(None, "batch", None)))
  inputs = StepInputs.abstract(config.model.param_dtype, NamedSharding(mesh, spec()))
  train_step = make_train_step(step_config, graphdef(config.model))

  def step(state, batch, inputs):
    return train_step(state, batch, microbatches, inputs)

  return step, (state, batch, inputs)
