"""Gradients of a batch whose microbatches pass through stages: the model cut into what a pipeline takes.

The layers of the last stack, which is most of a model, are in the stages. Embedding and dense layers of an MoE model come
before them, final norm, head and multi-token prediction after; all stages share that work. Parameters are kept as without
a pipeline, where `stage` is one more axis of shards: each step lays the stages' layers out, and their gradients back.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import Config
from deepseek_jax.model.transformer import layer_keys, no_aux
from deepseek_jax.parallel.pipeline import interleaved_1f1b, layer_assignment, to_stage_params
from deepseek_jax.sharding import (
  FSDP_AXES,
  STAGE_LOCAL,
  UNSHARDED_PARAMS,
  all_gather_params,
  axis_index,
  axis_size,
  mesh_axes,
  pvary,
  rules,
)
from deepseek_jax.training.objective import Objective


def pipeline_stack(config: Config):
  """(name of the stack in the stages, which layers are where: int32 [stages, virtual_stages, slots], past the last in empty slots).

  Of the mesh that is set, whose sizes the config may leave open.
  """
  model, parallel = config.model, config.parallel
  name = "moe_layers" if model.num_moe_layers else "dense_layers"
  layers = getattr(model, f"num_{name}")
  return name, layer_assignment(layers, axis_size("stages"), parallel.virtual_stages, parallel.stage_layers)[0]


def to_stage_layout(layers, names, table, make_whole):
  """Parameters of a stack as this stage has them, [virtual_stages, slots, ...]; also whole in their other shards if `make_whole`.

  layers: [layers, ...], of logical axes `names`, as they are kept. Empty slots are zeros: such blocks do nothing.
  """

  def leaf(param, names):
    kept = [i for i, name in enumerate(names) if name in FSDP_AXES]
    param = to_stage_params(param, table, mesh_axes("stages")[0], kept[0] if kept else None)
    return all_gather_params(param, None, *names) if make_whole else param

  with rules(STAGE_LOCAL):
    return jax.tree.map(leaf, layers, names)


class PipelineSchedule:
  """What a pipeline asks of the model, on one device.

  Args:
    buffers: all of them. read: microbatch -> (tokens [batch, seq + 1], dropout key or None).
    placeholders: a tree like all parameters, of what stands for those that a part of the pipeline does not use.
    whole: whether parameters in use are whole; otherwise each use gathers them.
  """

  def __init__(self, config: Config, graphdef, objective: Objective, buffers, read, mtp_weight, placeholders, whole):
    self.graphdef, self.objective, self.read, self.mtp_weight = graphdef, objective, read, mtp_weight
    self.buffers, self.placeholders, self.virtual_stages = buffers, placeholders, config.parallel.virtual_stages
    self.stack, table = pipeline_stack(config)
    self.own = jnp.asarray(table)[axis_index("stages")]  # [virtual_stages, slots]
    self.layers = getattr(config.model, f"num_{self.stack}")
    self.first_layer = config.model.layers - self.layers
    self.around = UNSHARDED_PARAMS if whole else {}
    self.inside = UNSHARDED_PARAMS if whole else STAGE_LOCAL

  def gradients(self, params, layers, microbatches):
    """(of params, of layers, what the step reports): sums over `microbatches` of what this device did.

    params: all but the stack's, in use. layers: of `to_stage_layout`, in use.
    """
    (grads, of_layers, (_, within, after)) = interleaved_1f1b(
      self.before, self.within, self.after, params, layers, microbatches,
      axis=mesh_axes("stages")[0], virtual_stages=self.virtual_stages,
    )  # fmt: skip
    load = within.pop("load")  # {} or {stack: [virtual_stages, slots, experts]}
    whole = {name: jnp.zeros((self.layers, x.shape[-1]), x.dtype) for name, x in load.items()}
    whole = {name: pvary(whole[name]).at[self.own].add(x, mode="drop") for name, x in load.items()}
    reported = {name: value + within.pop(name).sum(0) if name in within else value for name, value in after.items()}
    return grads, of_layers, reported | {"load": reported["load"] | whole}

  def model(self, params, layers=None, buffers=None):
    """The model with the blocks `layers` and their `buffers` for its stack, or without it."""
    params = self.placeholders | params | ({self.stack: layers} if layers else {})
    return nnx.merge(self.graphdef, params, self.buffers | ({self.stack: buffers} if buffers else {}))

  def before(self, params, microbatch):
    """(stream [batch, stream, embed] that enters the stages, nothing observed)."""
    tokens, key = self.read(microbatch)
    with rules(self.around):
      model, inputs = self.model(params), self.objective.inputs(tokens)
      x = model.embed_tokens(inputs.ids)
      facts = self.objective.batch_context(model, inputs, key)
      for name, layers in model.stacks():
        if name != self.stack:
          x, _ = model.run_layers(layers, x, facts, layer_keys(key, jnp.arange(self.first_layer)), no_aux)
    return x, ()

  def within(self, layers, virtual_stage, microbatch, x):
    """(stream, share of the objective, observed) after the blocks `layers` [slots, ...]."""
    (tokens, key), numbers = self.read(microbatch), self.own[virtual_stage]
    full = numbers < self.layers
    own = self.buffers.get(self.stack)
    buffers = jax.tree.map(lambda b: b.at[numbers].get(mode="fill", fill_value=0), own) if own else None
    with rules(self.inside):
      model, inputs = self.model({}, layers, buffers), self.objective.inputs(tokens)
      facts = self.objective.batch_context(model, inputs, key)
      keys = layer_keys(key, self.first_layer + numbers)
      x, seen = model.run_layers(getattr(model, self.stack), x, facts, keys, self.objective.observe)
    if seen is None:
      return x, pvary(jnp.zeros((), x.dtype)), {"load": {}, "total_loss": pvary(jnp.zeros((), x.dtype))}
    seen = jax.tree.map(lambda a: jnp.where(full.reshape(-1, *(1,) * (a.ndim - 1)), a, 0), seen)
    share, observed = self.objective.balanced(seen, self.stack, self.objective.nothing_observed(), tokens.shape[1] - 1)
    # Each device's share of a sum, also where all have the same: its type decides how often it counts.
    share = pvary(share)
    return x, share, observed | {"total_loss": share}

  def after(self, params, microbatch, x):
    """(share of the objective, observed) of the stream `x` that leaves the stages."""
    tokens, key = self.read(microbatch)
    with rules(self.around):
      model, inputs = self.model(params), self.objective.inputs(tokens)
      facts = self.objective.batch_context(model, inputs, key)
      hidden = model.final_norm(x)
      nats, share, observed = self.objective.heads(model, hidden, inputs, facts, key, self.mtp_weight)
    share = pvary(share)
    return share, observed | {"loss": nats.sum(), "total_loss": share}
