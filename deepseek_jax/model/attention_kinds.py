"""The attention modules, by `model.attention.kind`. docs/howto/add_an_attention.md lists the tables beside this one."""

from typing import Any

from deepseek_jax.model.attention import Attention
from deepseek_jax.model.mla import MLA

# Made of (ModelConfig, nnx.Rngs or None). `Attention` documents what is called: `__call__`, `decode` and `token_shapes`.
ATTENTION: dict[str, type[Any]] = {"gqa": Attention, "mla": MLA}
