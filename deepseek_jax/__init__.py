"""Readable JAX training code for the DeepSeek family of models."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from deepseek_jax.api import Model, load_pretrained
  from deepseek_jax.runs import Run, load, run

MODULES = {"Model": "api", "load_pretrained": "api", "Run": "runs", "load": "runs", "run": "runs"}
__all__ = ["Model", "Run", "load", "load_pretrained", "run"]
__version__ = "0.1.0"


def __getattr__(name):
  """The notebook API, imported when asked for: the package itself needs no JAX, whose flags programs set first."""
  if name in MODULES:
    return getattr(importlib.import_module(f"deepseek_jax.{MODULES[name]}"), name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
  """The public names, for tab completion, also before they are imported."""
  return sorted({*globals(), *__all__})
