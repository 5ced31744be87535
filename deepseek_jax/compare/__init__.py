"""Runs side by side: what differs in their configs, their curves, their final numbers with intervals, and a verdict.

The command line is `python -m deepseek_jax.compare`.

from deepseek_jax.compare import compare_runs
comparison = compare_runs(["runs/baseline-*", "runs/variant-*"], verdict=True)
print(comparison.text())
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from deepseek_jax.compare.comparison import Comparison, compare_runs

__all__ = ["Comparison", "compare_runs"]


def __getattr__(name: str) -> Any:
  """A public name, imported when asked for: --help needs none of it."""
  if name in __all__:
    from deepseek_jax.compare import comparison

    return getattr(comparison, name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
  """The public names, for tab completion, also before they are imported."""
  return sorted({*globals(), *__all__})
