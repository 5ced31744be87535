"""Readable JAX training code for the DeepSeek family of models."""

__all__ = ["Model", "load_pretrained"]


def __getattr__(name):
  """The notebook API, imported when asked for: the package itself needs no JAX, whose flags programs set first."""
  if name in __all__:
    from deepseek_jax import api

    return getattr(api, name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
