"""Variants of one's own, from a notebook or a script: a row in the tables of the model, without a change of the package.

  from deepseek_jax import variants

  variants.add_score("sqrt_softplus", lambda logits: jnp.sqrt(jax.nn.softplus(logits)))
  deepseek_jax.run("tiny", "runs/sqrt_softplus", {"model.moe.score": "sqrt_softplus"})

They last as long as the process: a run that has one goes on, and its checkpoints are loaded, where it was added again.
What stays belongs into the package (docs/howto/add_score_function.md, add_an_attention.md).
"""

import sys
from collections.abc import Callable, MutableMapping
from typing import Any

import jax
from flax import nnx

from deepseek_jax.errors import ConfigError
from deepseek_jax.model.attention_kinds import ATTENTION
from deepseek_jax.model.router import SCORES
from deepseek_jax.model_config import ATTENTION_KINDS, MoEConfig
from deepseek_jax.plan.attention import ATTENTION_PLANS

_shipped = {"score": frozenset(SCORES), "attention": frozenset(ATTENTION)}


def add_score(name: str, function: Callable[[jax.Array], jax.Array]) -> None:
  """Makes `model.moe.score=NAME` the affinities of routers.

  Args:
    name: a new one, or one that was added before, which is replaced.
    function: logits [batch, seq, experts] in at least float32 -> affinities of the same shape, above 0.

  Raises ConfigError for the name of a shipped one, and for what cannot be called.
  """
  _check_name("score", name)
  if not callable(function):
    raise ConfigError(f"the score {name!r} is of type {type(function).__name__}: expected a function")
  if name not in SCORES:
    MoEConfig.__dataclass_fields__["score"].metadata["choices"].append(name)
  _set_row(SCORES, name, function)


def add_attention(name: str, module: type, like: str = "gqa") -> None:
  """Makes `model.attention.kind=NAME` the attention `module`.

  Args:
    name: a new one, or one that was added before, which is replaced.
    module: made of (ModelConfig, nnx.Rngs or None); `model.attention.Attention` documents what a block calls.
    like: the shipped kind whose config fields it reads, and whose FLOPs and memory the plan takes for its own.

  Raises ConfigError for the name of a shipped one, for what is no attention, and for another `like`.
  """
  _check_name("attention", name)
  is_module = isinstance(module, type) and issubclass(module, nnx.Module)
  if not (is_module and hasattr(module, "decode") and hasattr(module, "token_shapes")):
    raise ConfigError(
      f"{module!r:.60} is no attention: expected an nnx.Module with __call__, decode and token_shapes, as a subclass of "
      "model.attention.Attention or model.mla.MLA"
    )
  if like not in _shipped["attention"]:
    raise ConfigError(f"like={like!r} is not one of {', '.join(sorted(_shipped['attention']))}")
  ATTENTION_KINDS[name], ATTENTION_PLANS[name] = ATTENTION_KINDS[like], ATTENTION_PLANS[like]
  _set_row(ATTENTION, name, module)


def _check_name(kind: str, name: str) -> None:
  if name in _shipped[kind]:
    raise ConfigError(f"{name!r} is a shipped {kind}: give yours another name")


def _set_row(table: MutableMapping[str, Any], name: str, row: Any) -> None:
  if name in table and table[name] is not row:
    _clear_caches()
  table[name] = row


def _clear_caches() -> None:
  """Forgets traced models and compiled programs: they know a row by its name."""
  for module_name, module in list(sys.modules.items()):
    if module_name.startswith(f"{__package__}."):
      for value in list(vars(module).values()):
        if hasattr(value, "cache_clear"):
          value.cache_clear()
  jax.clear_caches()
