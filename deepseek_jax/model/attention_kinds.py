"""The attention modules, by `model.attention.kind`. docs/howto/add_an_attention.md lists the tables beside this one."""

from deepseek_jax.model.attention import Attention
from deepseek_jax.model.mla import MLA

# Made of (ModelConfig, nnx.Rngs or None). `Attention` documents what a block calls: `__call__` and `decode`.
ATTENTION: dict[str, type] = {"gqa": Attention, "mla": MLA}
