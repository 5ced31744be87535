"""What is optimised: next-token and multi-token prediction losses and the balance of experts, of what one device has.

Everything here is inside `spmd`. A value that several devices compute alike enters the objective as each one's
share of it, so that the objective is the sum over all devices, and so are its gradients.
"""

import dataclasses

import jax
import jax.numpy as jnp

from deepseek_jax.config import Config
from deepseek_jax.model.context import zigzag
from deepseek_jax.model.linear import at_least_float32
from deepseek_jax.sharding import all_gather_sequence, axis_index, axis_size, psum
from deepseek_jax.training.balance import make_observe
from deepseek_jax.training.loss import cross_entropy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
  """What a device reads of its sequences: `ids` and `targets` [batch, seq] int at `places` [seq] of them.

  ahead, targets_ahead: [depth, batch, seq], the same k + 1 positions on for k = 0, 1, ...; -1 past the sequence.
  segment_ids, positions: [batch, seq], or None where attention crosses documents.
  """

  ids: jax.Array
  targets: jax.Array
  places: jax.Array
  ahead: jax.Array
  targets_ahead: jax.Array
  segment_ids: jax.Array | None
  positions: jax.Array | None


def document_positions(tokens, bos):
  """(segment_ids, positions), each [batch, seq], of `tokens` [batch, seq] in which `bos` starts each document."""
  starts = tokens == bos
  index = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, 1)
  # Batched associative scans: a row's own running count and running start.
  segment_ids = jnp.cumsum(starts, 1, dtype=jnp.int32)
  return segment_ids, index - jax.lax.cummax(jnp.where(starts, index, 0), 1)


class Objective:
  """The objective of a config; `bos` starts each document."""

  def __init__(self, config: Config, bos):
    self.config, self.bos = config, bos
    self.observe = make_observe(config.model.moe, config.balance)

  def inputs(self, tokens):
    """Inputs of this device's part of the whole sequences `tokens` [batch, seq + 1]."""
    seq, depths = tokens.shape[1] - 1, self.config.model.num_mtp_layers
    places = jnp.asarray(zigzag(seq, axis_size("seq")))[axis_index("seq")]
    ids, targets = tokens[:, :-1], tokens[:, 1:]
    facts = document_positions(ids, self.bos) if self.config.data.mask_documents else (None, None)
    segment_ids, positions = (f if f is None else f[:, places] for f in facts)
    # [batch, seq + depths]: -1 past the end
    longer, longer_targets = (jnp.pad(a, ((0, 0), (0, depths)), constant_values=-1) for a in (ids, targets))
    shifts = jnp.arange(1, depths + 1)[:, None] + places  # [depth, seq]
    return Inputs(
      ids[:, places], targets[:, places], places,
      longer[:, shifts].swapaxes(0, 1), longer_targets[:, shifts].swapaxes(0, 1),
      segment_ids, positions,
    )  # fmt: skip

  def batch_context(self, model, inputs, key):
    """The BatchContext of `inputs`."""
    exempting = key if self.config.model.moe.dispatch == "capacity" else None
    return model.batch_context(inputs.ids, inputs.places, inputs.positions, inputs.segment_ids, exempting)

  def losses(self, model, x, targets):
    """(nats [batch], objective []) of hidden states `x` [batch, stream, embed] and `targets` [batch, seq]."""
    train = self.config.train
    head = model.output_embedding()
    return cross_entropy(head, all_gather_sequence(x), targets, train.loss_chunk, train.label_smoothing, train.z_loss)

  def __call__(self, model, tokens, key=None, mtp_weight=0.0):
    """(nats [batch], share of the objective [], observed) of whole sequences `tokens` [batch, seq + 1]."""
    inputs = self.inputs(tokens)
    facts = self.batch_context(model, inputs, key)
    hidden, stacks = model(inputs.ids, facts, key, self.observe)  # [batch, stream, embed]
    nats, share, observed = self.heads(model, hidden, inputs, facts, key, mtp_weight)
    for name, seen in stacks.items():
      if seen is not None:
        balance, observed = self.balanced(seen, name, observed, tokens.shape[1] - 1)
        share += balance
    return nats, share, observed

  def heads(self, model, hidden, inputs, facts, key, mtp_weight):
    """(nats [batch], share of the objective [], observed) of the final `hidden`: all that comes after the main model.

    nats is the cross entropy summed over each whole sequence. observed: sums over the batch that this device has, of `mtp_loss`
    [depth], `balance_loss` [], `load` {stack: [layers, experts] int32}, `overflow` [] int32.
    """
    observed = self.nothing_observed()
    nats, objective = self.losses(model, hidden, inputs.targets)
    depths = model.mtp(hidden, inputs.ahead, facts, key, self.observe)
    mtp_nats, seq = [], inputs.ids.shape[1] * axis_size("seq")
    for depth, ((hidden, _), targets) in enumerate(zip(depths, inputs.targets_ahead, strict=True), 1):
      nats_ahead, objective_ahead = self.losses(model, hidden, targets)
      # A mean over the seq - depth targets that there are (V3 eq. 24 divides by seq), and over depths (eq. 25).
      mean = seq / (seq - depth)
      objective += mtp_weight / len(depths) * mean * objective_ahead
      mtp_nats.append(mean * psum(nats_ahead.sum(), "seq"))
    share = objective / axis_size("vocab")
    if mtp_nats:
      observed["mtp_loss"] = jnp.stack(mtp_nats)
    if depths and depths[0][1] is not None:
      seen = jax.tree.map(lambda *depth: jnp.stack(depth), *(seen for _, seen in depths))
      balance, observed = self.balanced(seen, "mtp_layers", observed, seq)
      share += balance
    return psum(nats, "seq"), share, observed

  def nothing_observed(self):
    """Zeros that `balanced` adds to."""
    model = self.config.model
    if not model.moe.num_routed_experts:
      return {"load": {}}
    zero = jnp.zeros((), at_least_float32(model.compute_dtype))
    return {"load": {}, "balance_loss": zero, "overflow": jnp.zeros((), jnp.int32)}

  def balanced(self, seen, name, observed, seq):
    """(share of the objective, `observed` with what the experts of the layers of stack `name` showed added), of sequences of `seq`."""
    loss = seq * seen["loss"].sum()  # of [layers, batch]
    return loss / axis_size("stream"), observed | {
      "balance_loss": observed["balance_loss"] + loss,
      "overflow": observed["overflow"] + seen["overflow"].sum(dtype=jnp.int32),
      "load": observed["load"] | {name: seen["load"]},
    }
