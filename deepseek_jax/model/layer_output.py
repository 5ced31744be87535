"""What a layer gives in addition to the hidden states."""

import dataclasses

import jax

from deepseek_jax.typing import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerOutput:
  """Of one layer, on one device.

  A scan over layers would stack all of it. What is used is chosen layer by layer, by an aux_fn (`Transformer`).
  """

  # name -> what a part of the layer observed: "output", the hidden states [batch, stream, embed] after the block, and
  # "routing", a router.Routing, in an MoE layer. In training each name needs
  # a row in training.layer_aux.LAYER_AUX, which says what becomes of it.
  aux: dict[str, PyTree] = dataclasses.field(default_factory=dict)
