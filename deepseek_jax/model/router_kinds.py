"""The router modules, by `model.moe.router`. docs/howto/add_a_router.md lists the tables beside this one."""

from deepseek_jax.model.hash_router import HashRouter
from deepseek_jax.model.router import Router

# Made of (ModelConfig, nnx.Rngs or None). `Router.__call__` documents what an MoE layer calls.
ROUTERS: dict[str, type] = {"topk": Router, "hash": HashRouter}
