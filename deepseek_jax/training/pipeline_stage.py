"""The model cut into pipeline stages: what `parallel.pipeline` runs of it on one device.

The layers of the last stack, which is most of a model, are in the stages. The embedding and the dense layers of an MoE
model come before them; final norm, head and multi-token prediction after. All stages share that work. Parameters are
stored as without a pipeline, with `stage` as one more axis of shards: each step moves the layers to their stages, and
their gradients back.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek_jax.model.transformer import Transformer, layer_keys
from deepseek_jax.optimizers.trainable import merge_params
from deepseek_jax.parallel.pipeline import interleaved_1f1b, layer_assignment, to_stage_params
from deepseek_jax.sharding import (
  FSDP_AXES,
  STAGE_LOCAL,
  UNSHARDED_PARAMS,
  all_gather_params,
  axis_index,
  axis_rules,
  axis_size,
  mesh_axes,
  pvary,
)
from deepseek_jax.training.layer_aux import add_metrics, sum_over_layers
from deepseek_jax.training.objective import Objective
from deepseek_jax.training.step_config import StepConfig
from deepseek_jax.typing import Params, PyTree


def pipeline_stack(config: StepConfig) -> tuple[str, np.ndarray]:
  """(name of the stack that is in the stages, layer ids of each stage), for the mesh that is set.

  Layer ids are int32 [stages, virtual_stages, slots]; an empty slot has the number of layers.
  """
  model, parallel = config.model, config.parallel
  stack = "moe_layers" if model.num_moe_layers else "dense_layers"
  num_layers = getattr(model, f"num_{stack}")
  # The mesh is asked for its size, since a config may leave it open.
  return stack, layer_assignment(num_layers, axis_size("stages"), parallel.virtual_stages, parallel.stage_layers)[0]


def to_stage_layout(layers: Params, logical_axes: PyTree, table: np.ndarray, gather: bool) -> Params:
  """Parameters of this stage's layers, [virtual_stages, slots, ...]. Empty slots are zeros: such blocks do nothing.

  Args:
    layers: shards of a stack's parameters [layers, ...].
    logical_axes: of each parameter.
    table: layer ids, of `pipeline_stack`.
    gather: whether to all-gather the other FSDP axes as well.
  """

  def leaf(param, axes):
    fsdp_dimensions = [i for i, name in enumerate(axes) if name in FSDP_AXES]
    param = to_stage_params(param, table, mesh_axes("stages")[0], fsdp_dimensions[0] if fsdp_dimensions else None)
    return all_gather_params(param, None, *axes) if gather else param

  with axis_rules(STAGE_LOCAL):
    return jax.tree.map(leaf, layers, logical_axes)


class PipelineStage:
  """What one device computes of the model as a pipeline stage.

  Args:
    buffers: of the whole model.
    get_microbatch: index -> (tokens [batch, seq + 1], dropout key or None).
    mtp_weight: [], of the multi-token prediction loss.
    placeholders: the structure of all parameters; stands for those that a part of the pipeline does not use.
    frozen_outer, frozen_layers: those that are not trained, of the parameters outside of the stages and of
      `to_stage_layout`. `grads` gets the others.
    gathered: whether parameters come gathered. Otherwise the model gathers them where it uses them.
  """

  def __init__(
    self,
    config: StepConfig,
    graphdef: nnx.GraphDef,
    objective: Objective,
    buffers: Params,
    get_microbatch: Callable[[jax.Array], tuple[jax.Array, jax.Array | None]],
    mtp_weight: jax.Array,
    placeholders: Params,
    frozen_outer: Params,
    frozen_layers: Params,
    gathered: bool,
  ):
    self.graphdef, self.objective, self.mtp_weight = graphdef, objective, mtp_weight
    self.get_microbatch, self.buffers, self.placeholders = get_microbatch, buffers, placeholders
    self.frozen_outer, self.frozen_layers = frozen_outer, frozen_layers
    self.virtual_stages = config.parallel.virtual_stages
    self.stack, table = pipeline_stack(config)
    self.layer_ids = jnp.asarray(table)[axis_index("stages")]  # [virtual_stages, slots]
    self.num_layers = getattr(config.model, f"num_{self.stack}")  # of the stack
    self.first_layer = config.model.layers - self.num_layers
    self.outer_rules = UNSHARDED_PARAMS if gathered else {}
    self.layer_rules = UNSHARDED_PARAMS if gathered else STAGE_LOCAL

  def grads(self, outer_params: Params, layers: Params, microbatches: jax.Array | int) -> tuple[Params, Params, PyTree]:
    """(gradients of outer_params, gradients of layers, metrics): sums over `microbatches` of what this device computed.

    Args:
      outer_params: all parameters but the stack's.
      layers: of `to_stage_layout`.
    """
    (grads, layer_grads, (embed_metrics, chunk_metrics, metrics)) = interleaved_1f1b(
      self.embed, self.run_chunk, self.loss, outer_params, layers, microbatches,
      axis=mesh_axes("stages")[0], virtual_stages=self.virtual_stages,
    )  # fmt: skip
    chunk_metrics = {
      name: jax.tree.map(self.by_layer, x) if isinstance(x, dict) else x.sum(0) for name, x in chunk_metrics.items()
    }
    return grads, layer_grads, add_metrics(add_metrics(metrics, chunk_metrics), embed_metrics)

  def by_layer(self, x: jax.Array) -> jax.Array:
    """[layers of the stack, ...] with what this stage has of its layers, `x` [virtual_stages, slots, ...]."""
    zeros = pvary(jnp.zeros((self.num_layers, *x.shape[2:]), x.dtype))
    return zeros.at[self.layer_ids].add(x, mode="drop")

  def model(self, params: Params | None, layers: Params | None = None, buffers: Params | None = None) -> Transformer:
    """The model with the blocks `layers` and their `buffers` as its stack, or without the stack.

    params: those that are trained, of the parameters outside of the stages. None: without those.
    """
    outer = {} if params is None else merge_params(params, self.frozen_outer)
    params = self.placeholders | outer | ({self.stack: layers} if layers else {})
    return nnx.merge(self.graphdef, params, self.buffers | ({self.stack: buffers} if buffers else {}))

  def embed(self, params: Params, microbatch: jax.Array) -> tuple[jax.Array, jax.Array, PyTree]:
    """(hidden states [batch, stream, embed] that enter the stages, local_objective [], metrics of the layers before)."""
    tokens, key = self.get_microbatch(microbatch)
    with axis_rules(self.outer_rules):
      model, inputs = self.model(params), self.objective.local_inputs(tokens)
      x = model.embed_tokens(inputs.ids)
      batch_context, observed = self.objective.batch_context(model, inputs, key), {}
      for name, layers in model.stacks():
        if name != self.stack:
          keys = layer_keys(key, jnp.arange(self.first_layer))
          x, observed[name] = model.run_layers(layers, x, batch_context, keys, self.objective.aux_fn)
    return x, *self.layer_metrics(observed, x.dtype, tokens.shape[1] - 1)

  def layer_metrics(self, observed: dict[str, PyTree], dtype: jnp.dtype, seq: int) -> tuple[jax.Array, PyTree]:
    """(local_objective [], metrics with total_loss) of what layers observed, {stack: as in `sum_over_layers`}."""
    objective: jax.Array = jnp.zeros((), dtype)
    metrics: dict[str, PyTree] = {}
    for stack, of_stack in observed.items():
      of_layers, layer_metrics = sum_over_layers(of_stack, stack, seq)
      objective, metrics = objective + of_layers, add_metrics(metrics, layer_metrics)
    # Typed as varying also where all devices have the same value: by its type the pipeline sums it over the devices.
    objective = pvary(objective)
    return objective, metrics | {"total_loss": objective}

  def run_chunk(
    self, layers: Params, virtual_stage: jax.Array, microbatch: jax.Array, x: jax.Array
  ) -> tuple[jax.Array, jax.Array, PyTree]:
    """(hidden states, local_objective [], metrics) after the blocks `layers` [slots, ...] of one virtual stage.

    x: [batch, stream, embed].
    """
    (tokens, key), layer_ids = self.get_microbatch(microbatch), self.layer_ids[virtual_stage]
    is_used = layer_ids < self.num_layers  # [slots]
    buffers = self.buffers.get(self.stack)
    if buffers:
      buffers = jax.tree.map(lambda b: b.at[layer_ids].get(mode="fill", fill_value=0), buffers)
    layers = merge_params(layers, jax.tree.map(lambda p: p[virtual_stage], self.frozen_layers))
    with axis_rules(self.layer_rules):
      model, inputs = self.model(None, layers, buffers), self.objective.local_inputs(tokens)
      batch_context = self.objective.batch_context(model, inputs, key)
      keys = layer_keys(key, self.first_layer + layer_ids)
      x, observed = model.run_layers(getattr(model, self.stack), x, batch_context, keys, self.objective.aux_fn)
    observed = jax.tree.map(lambda a: jnp.where(is_used.reshape(-1, *(1,) * (a.ndim - 1)), a, 0), observed)
    return x, *self.layer_metrics({self.stack: observed}, x.dtype, tokens.shape[1] - 1)

  def loss(self, params: Params, microbatch: jax.Array, x: jax.Array) -> tuple[jax.Array, PyTree]:
    """(local_objective [], metrics) of the hidden states `x` [batch, stream, embed] that leave the stages."""
    tokens, key = self.get_microbatch(microbatch)
    with axis_rules(self.outer_rules):
      model, inputs = self.model(params), self.objective.local_inputs(tokens)
      batch_context = self.objective.batch_context(model, inputs, key)
      hidden = model.final_norm(x)
      loss_sums, local_objective, metrics = self.objective.head_losses(
        model, hidden, inputs, batch_context, key, self.mtp_weight
      )
    local_objective = pvary(local_objective)
    return local_objective, metrics | {"loss": loss_sums.sum(), "total_loss": local_objective}
