"""Hyper-parameter laws."""

from deepseek_jax.scaling.laws import HyperparamLaw, hyperparam_law


def load_law(name: str) -> HyperparamLaw:
  return hyperparam_law(name)
