"""What is optimized: next-token and multi-token prediction losses and the balance losses of experts, on one device.

Everything here runs inside `spmd`. Where several devices compute the same value, each adds its share of that value to
its local objective. The objective is then the sum of the local objectives over all devices, and so are its gradients.
"""

import dataclasses

import jax
import jax.numpy as jnp

from deepseek_jax.model.batch_context import BatchContext
from deepseek_jax.model.context_parallel import zigzag
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.sharding import all_gather_sequence, axis_index, axis_size, psum
from deepseek_jax.training.layer_aux import add_metrics, make_aux_fn, sum_over_layers
from deepseek_jax.training.loss import cross_entropy
from deepseek_jax.training.step_config import StepConfig
from deepseek_jax.typing import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LocalInputs:
  """The positions that one device has of its sequences; `seq` is their number.

  ids, targets: [batch, seq] int.
  position_ids: [seq] int, positions in the sequence.
  mtp_ids, mtp_targets: [depth, batch, seq], `ids` and `targets` k + 1 positions on for k = 0, 1, ...; -1 past the end.
  segment_ids: [batch, seq] int, the document of each position. None: attention crosses documents.
  rope_positions: [batch, seq] int, positions in the document. None: attention crosses documents.
  """

  ids: jax.Array
  targets: jax.Array
  position_ids: jax.Array
  mtp_ids: jax.Array
  mtp_targets: jax.Array
  segment_ids: jax.Array | None
  rope_positions: jax.Array | None


def document_positions(ids: jax.Array, bos: int) -> tuple[jax.Array, jax.Array]:
  """(segment_ids, positions in the document), each [batch, seq], of `ids` [batch, seq]. `bos` starts each document."""
  starts = ids == bos
  index = jax.lax.broadcasted_iota(jnp.int32, ids.shape, 1)
  # Batched associative scans along the sequence: the number of starts so far, and the index of the last start.
  segment_ids = jnp.cumsum(starts, 1, dtype=jnp.int32)
  return segment_ids, index - jax.lax.cummax(jnp.where(starts, index, 0), 1)


class Objective:
  """The objective of a step. A notebook needs only `StepConfig(model)`."""

  def __init__(self, config: StepConfig):
    self.config = config
    self.aux_fn = make_aux_fn(config)

  def local_inputs(self, tokens: jax.Array) -> LocalInputs:
    """This device's positions of the full sequences `tokens` [batch, seq + 1] int."""
    seq, depths = tokens.shape[1] - 1, self.config.model.num_mtp_layers
    position_ids = jnp.asarray(zigzag(seq, axis_size("seq")))[axis_index("seq")]
    ids, targets = tokens[:, :-1], tokens[:, 1:]
    segment_ids = rope_positions = None
    if self.config.document_start is not None:
      segment_ids, rope_positions = document_positions(ids, self.config.document_start)
      segment_ids, rope_positions = segment_ids[:, position_ids], rope_positions[:, position_ids]
    # [batch, seq + depths]: -1 past the end
    padded_ids, padded_targets = (jnp.pad(a, ((0, 0), (0, depths)), constant_values=-1) for a in (ids, targets))
    mtp_position_ids = jnp.arange(1, depths + 1)[:, None] + position_ids  # [depth, seq]
    return LocalInputs(
      ids[:, position_ids], targets[:, position_ids], position_ids,
      padded_ids[:, mtp_position_ids].swapaxes(0, 1), padded_targets[:, mtp_position_ids].swapaxes(0, 1),
      segment_ids, rope_positions,
    )  # fmt: skip

  def batch_context(self, model: Transformer, inputs: LocalInputs, key: jax.Array | None) -> BatchContext:
    """The BatchContext of `inputs`."""
    no_drop_key = key if self.config.model.moe.dispatch == "capacity" else None
    return model.batch_context(inputs.ids, inputs.position_ids, inputs.rope_positions, inputs.segment_ids, no_drop_key)

  def head_loss(self, model: Transformer, hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`cross_entropy` of `hidden` [batch, stream, embed], `targets` [batch, seq]: (loss_sums [batch], objective [])."""
    config, head = self.config, model.output_embedding()
    return cross_entropy(
      head, all_gather_sequence(hidden), targets, config.loss_chunk, config.label_smoothing, config.z_loss
    )

  def __call__(
    self,
    model: Transformer,
    tokens: jax.Array,
    key: jax.Array | None = None,
    mtp_weight: jax.Array | float = 0.0,
  ) -> tuple[jax.Array, jax.Array, PyTree]:
    """(loss_sums [batch], local_objective [], metrics) as `head_losses`, of sequences `tokens` [batch, seq + 1]."""
    inputs = self.local_inputs(tokens)
    batch_context = self.batch_context(model, inputs, key)
    hidden, observed = model(inputs.ids, batch_context, key, self.aux_fn)  # [batch, stream, embed]
    loss_sums, local_objective, metrics = self.head_losses(model, hidden, inputs, batch_context, key, mtp_weight)
    for stack, of_stack in observed.items():
      layers_objective, layer_metrics = sum_over_layers(of_stack, stack, tokens.shape[1] - 1)
      local_objective, metrics = local_objective + layers_objective, add_metrics(metrics, layer_metrics)
    return loss_sums, local_objective, metrics

  def head_losses(
    self,
    model: Transformer,
    hidden: jax.Array,
    inputs: LocalInputs,
    batch_context: BatchContext,
    key: jax.Array | None,
    mtp_weight: jax.Array | float,
  ) -> tuple[jax.Array, jax.Array, PyTree]:
    """The losses of the main model's final `hidden` [batch, stream, embed], and those of multi-token prediction.

    Returns:
      loss_sums: [batch], cross entropy in nats summed over each full sequence.
      local_objective: [], this device's term of the objective, summed over the batch.
      metrics: sums over this device's part of the batch: what the layers of MTP observe, and mtp_loss [depth].
    """
    loss_sums, objective = self.head_loss(model, hidden, inputs.targets)
    depths = model.mtp(hidden, inputs.mtp_ids, batch_context, key, self.aux_fn)
    mtp_losses, seq = [], inputs.ids.shape[1] * axis_size("seq")
    for depth, ((mtp_hidden, _), targets) in enumerate(zip(depths, inputs.mtp_targets, strict=True), 1):
      mtp_loss_sums, mtp_objective = self.head_loss(model, mtp_hidden, targets)
      # A mean over the seq - depth targets that there are (V3 eq. 24 divides by seq), and over depths (eq. 25).
      scale = seq / (seq - depth)
      objective += mtp_weight / len(depths) * scale * mtp_objective
      mtp_losses.append(scale * psum(mtp_loss_sums.sum(), "seq"))
    local_objective = objective / axis_size("vocab")
    metrics: dict[str, PyTree] = {}
    if mtp_losses:
      observed = jax.tree.map(lambda *of_depths: jnp.stack(of_depths), *(of_depth for _, of_depth in depths))
      layers_objective, metrics = sum_over_layers(observed, "mtp_layers", seq)
      local_objective += layers_objective
      metrics["mtp_loss"] = jnp.stack(mtp_losses)
    return psum(loss_sums, "seq"), local_objective, metrics
