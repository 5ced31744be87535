"""One update: microbatches, gradients, optimizer. A pure function of state and batch."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding

from deepseek_jax.config import Config
from deepseek_jax.model.transformer import graphdef, param_axes
from deepseek_jax.sharding import (
  LATENT_RULES,
  UNSHARDED_PARAMS,
  all_gather_params,
  as_replicated,
  axis_size,
  psum,
  psum_replicated,
  pvary,
  reduce_scatter_grads,
  rules,
  spec,
  spmd,
)  # fmt: skip
from deepseek_jax.training.balance import update_router_bias
from deepseek_jax.training.objective import Objective
from deepseek_jax.training.optimizer import make_optimizer, place_opt_state
from deepseek_jax.training.pipelined import PipelineSchedule, pipeline_stack, to_stage_layout
from deepseek_jax.training.state import TrainState, abstract_state


def partition_specs(tree):
  """PartitionSpecs of the arrays in `tree`."""
  return jax.tree.map(lambda array: jax.typeof(array).sharding.spec, tree)


def make_eval_step(config: Config, graphdef, bos):
  """`(params, buffers, tokens [batch, seq + 1]) -> nats [batch]`, the cross entropy summed over each sequence.

  They are NaN where assignments overflowed an expert buffer: nothing is dropped in silence.
  """
  objective = Objective(config, bos)

  def local(params, buffers, tokens):
    nats, _, observed = objective(nnx.merge(graphdef, params, buffers), tokens)
    lost = psum(observed.get("overflow", 0), "batch", "seq")
    return jnp.where(lost == 0, nats, jnp.nan)

  def row_nats(params, buffers, tokens):
    with rules(LATENT_RULES[config.parallel.mla_latent]):
      layout = partition_specs(params), partition_specs(buffers), spec("batch", None)
      return spmd(local, layout, spec("batch"), differentiable=False)(params, buffers, tokens)

  return row_nats


def cast(params, names, dtype):
  """The matrices of `params` in the model's compute `dtype`; but for the router's, which it uses as they are."""

  def leaf(path, param, names):
    return param.astype(dtype) if any(names) and all(part.key != "router" for part in path) else param

  return jax.tree.map_with_path(leaf, params, names)


def cast_and_gather(params, names, dtype):
  """`params`, of logical axes `names`, as the model uses them: in `dtype`, and whole."""
  return jax.tree.map(lambda param, names: all_gather_params(param, *names), cast(params, names, dtype), names)


def make_gradients(config: Config, graphdef, bos):
  """`(state, batch, microbatches, mtp_weight) -> (gradients laid out as state.params, what the step reports)`."""
  objective, names = Objective(config, bos), param_axes(config.model)
  model, whole = config.model, config.parallel.zero < 3
  random = model.dropout > 0 or model.attention.dropout > 0 or model.moe.dispatch == "capacity"

  def local(microbatches, params, buffers, batch, mtp_weight, step):
    """As one device sees it: `batch` [microbatch, its sequences, seq + 1]."""
    params, buffers, batch, mtp_weight = pvary((params, buffers, batch, mtp_weight))

    def read(i):
      key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), step), i) if random else None
      return jax.lax.dynamic_index_in_dim(batch, i, keepdims=False), key  # tokens [sequences, seq + 1]

    work = StepContext(config, graphdef, objective, names, whole, params, buffers, read, mtp_weight, microbatches)
    grads, reported = (pipeline_grads if axis_size("stages") > 1 else accumulate_grads)(work)
    grads = jax.tree.map(lambda g, names: psum_replicated(g, *names), grads, names)
    total = psum(reported.pop("total_loss"), "batch", "stream", "stages")
    if "overflow" in reported:
      reported["overflow"] = psum(reported["overflow"], "seq")
    return grads, as_replicated({"total_loss": total} | psum(reported, "batch", "stages"))

  def gradients(state, batch, microbatches, mtp_weight):
    tokens_in_batch = microbatches * batch.shape[1] * (batch.shape[2] - 1)
    with rules(LATENT_RULES[config.parallel.mla_latent]):
      layout = partition_specs(state.params), partition_specs(state.buffers), spec(None, "batch", None), spec(), spec()
      arguments = state.params, state.buffers, batch, mtp_weight, state.step
      if isinstance(microbatches, int):  # a constant of the program: XLA makes one microbatch no loop
        found = spmd(functools.partial(local, microbatches), layout, (partition_specs(state.params), spec()))
        grads, reported = found(*arguments)
      else:
        found = spmd(local, (spec(), *layout), (partition_specs(state.params), spec()))
        grads, reported = found(microbatches, *arguments)
    # Divided by the whole batch, so that microbatches add up to the large batch's gradient.
    return jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.integer) else x / tokens_in_batch, (grads, reported))

  return gradients


@dataclasses.dataclass(frozen=True)
class StepContext:
  """What one device does in a step: `read` gives (tokens [sequences, seq + 1], key) of a microbatch; `whole`: ZeRO 1 or 2."""

  config: Config
  graphdef: nnx.GraphDef
  objective: Objective
  names: dict
  whole: bool
  params: dict
  buffers: dict
  read: Callable
  mtp_weight: jax.Array
  microbatches: jax.Array | int


def accumulate_grads(work: StepContext):
  """(gradients in the shards of the parameters, reported): sums over microbatches that are done one after the other."""
  zero = work.config.parallel.zero
  weights = cast_and_gather(work.params, work.names, work.config.model.compute_dtype) if work.whole else work.params

  def share(weights, tokens, key):
    with rules(UNSHARDED_PARAMS if work.whole else {}):
      model = nnx.merge(work.graphdef, weights, work.buffers)
      nats, share, observed = work.objective(model, tokens, key, work.mtp_weight)
    return share, {"loss": nats.sum(), **observed}

  @functools.partial(jax.jit, inline=True)  # traced once for the shapes and for the loop
  def one(i):
    (total, observed), grads = jax.value_and_grad(share, has_aux=True)(weights, *work.read(i))
    return pvary((shards(grads) if zero == 2 else grads, {"total_loss": total, **observed}))

  def shards(grads):
    return jax.tree.map(lambda g, names: reduce_scatter_grads(g, *names), grads, work.names)

  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, 0))
  # Summed in the dtype of the parameters, whatever that of the weights in use.
  zeros = jax.tree.map(lambda z, p: z.astype(p.dtype), zeros[0], work.params), zeros[1]

  def add(i, sums):
    # The barrier: XLA for TPUs wants to add up first and reduce after the loop, which takes whole gradients in memory, and
    # stops with an internal error over ours (libtpu 0.0.50).
    return jax.tree.map(jnp.add, sums, jax.lax.optimization_barrier(one(i)))

  grads, reported = jax.lax.fori_loop(0, work.microbatches, add, pvary(zeros))
  return shards(grads) if zero == 1 else grads, reported


def pipeline_grads(work: StepContext):
  """As `accumulate_grads`, of microbatches that pass through stages."""
  stack, table = pipeline_stack(work.config)
  dtype, names = work.config.model.compute_dtype, work.names
  rest = {name: params for name, params in work.params.items() if name != stack}
  rest_names = {name: tree for name, tree in names.items() if name != stack}

  def lay(layers):
    return to_stage_layout(layers, names[stack], table, work.whole)

  layers = lay(cast(work.params[stack], names[stack], dtype))
  around = cast_and_gather(rest, rest_names, dtype) if work.whole else rest
  placeholders = jax.tree.map(lambda _: jnp.zeros(()), work.params)
  stages = PipelineSchedule(
    work.config, work.graphdef, work.objective, work.buffers, work.read, work.mtp_weight, placeholders, work.whole
  )
  grads, of_layers, reported = stages.gradients(around, layers, work.microbatches)
  if work.whole:
    grads = jax.tree.map(lambda g, names: reduce_scatter_grads(g, *names), grads, rest_names)
  (of_layers,) = jax.vjp(lay, work.params[stack])[1](of_layers)
  return grads | {stack: of_layers}, reported


def make_train_step(config: Config, graphdef, bos):
  """The update, to be jitted with `donate_argnames="state"`.

  Returns:
    `(state, batch, microbatches, rates) -> (state, metrics)`. `batch` [microbatch, sequence, seq + 1] int32; its first
    `microbatches` are used (a batch ramp changes this number and no shape). `rates` are those of `schedule.schedules`.
    `metrics`: loss (mean nats per token), total_loss (what is optimised), grad_norm, balance_loss, mtp_loss [depth],
    load {stack: [layers, experts]}, overflow (assignments that overflowed an expert buffer), and the counts of skipped updates.
  """
  gradients, tx = make_gradients(config, graphdef, bos), make_optimizer(config.optimizer)
  offload = config.optimizer.offload

  def train_step(state, batch, microbatches, rates):
    grads, metrics = gradients(state, batch, microbatches, rates["mtp_weight"])
    grad_norm = optax.tree.norm(grads)
    good = jnp.isfinite(grad_norm) & (metrics.get("overflow", 0) == 0)
    old_moments = place_opt_state(jax.memory.Space.Device, state.opt_state) if offload else state.opt_state
    updates, opt_state = tx.update(grads, old_moments, state.params)
    rate = rates["learning_rate"]
    params = jax.tree.map(lambda p, u: p - rate.astype(p.dtype) * u, state.params, updates)
    buffers = update_router_bias(state.buffers, metrics["load"], rates["bias_update_rate"])
    new, old = (params, buffers, opt_state), (state.params, state.buffers, old_moments)
    params, buffers, opt_state = jax.tree.map(lambda new, old: jnp.where(good, new, old), new, old)
    opt_state = place_opt_state(jax.memory.Space.Host, opt_state) if offload else opt_state
    bad = 1 - good.astype(jnp.int32)
    skipped = {"total": state.skipped["total"] + bad, "in_a_row": bad * (state.skipped["in_a_row"] + 1)}
    metrics |= {"grad_norm": grad_norm, "skipped": skipped}
    return TrainState(state.step + 1, params, buffers, opt_state, skipped), metrics

  return train_step


def abstract_step(config: Config, mesh):
  """(the update with a full batch, its abstract arguments (state, batch, rates)), to be traced or compiled where nothing runs.

  `mesh` is set, and may be abstract or of devices that are not here. The number of microbatches is a constant, also where a
  ramp of the batch makes it an argument.
  """
  state, microbatch = abstract_state(config, mesh), config.train.microbatch or config.train.global_batch
  microbatches = config.train.global_batch // microbatch
  shape = microbatches, microbatch, config.data.seq + 1
  batch = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, spec(None, "batch", None)))
  rate = jax.ShapeDtypeStruct((), config.model.param_dtype, sharding=NamedSharding(mesh, spec()))
  update = make_train_step(config, graphdef(config.model), bos=0)

  def step(state, batch, rates):
    return update(state, batch, microbatches, rates)

  return step, (state, batch, dict.fromkeys(("learning_rate", "mtp_weight", "bias_update_rate"), rate))
