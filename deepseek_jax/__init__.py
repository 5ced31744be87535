"""Readable JAX training code for the DeepSeek family of models."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from deepseek_jax.api import Model, load_pretrained

__all__ = ["Model", "load_pretrained"]
__version__ = "0.1.0"


def __getattr__(name):
  """The notebook API, imported when asked for: the package itself needs no JAX, whose flags programs set first."""
  if name in __all__:
    from deepseek_jax import api

    return getattr(api, name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
  """The public names, for tab completion, also before they are imported."""
  return sorted({*globals(), *__all__})
