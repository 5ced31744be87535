"""Which config field chooses the implementation of each kernel, and whether the devices have what it asks for."""

from deepseek_jax.errors import ConfigError
from deepseek_jax.kernels.implementations import resolve_implementation
from deepseek_jax.model_config import ModelConfig


def implementation_fields(config: ModelConfig) -> dict[str, tuple[str, str]]:
  """Of each kernel that the model calls: (the config field that chooses its implementation, that field's value)."""
  fields = {"attention": ("model.attention.implementation", config.attention.implementation)}
  if config.precision == "fp8":
    fp8 = "quantize", "swiglu", "fp8_matmul", "fp8_grouped_matmul"
    fields |= dict.fromkeys(fp8, ("model.fp8.implementation", config.fp8.implementation))
  elif config.moe.num_routed_experts:
    fields["grouped_matmul"] = "model.moe.implementation", config.moe.implementation
  return fields


def check_kernels(config: ModelConfig) -> None:
  """Raises ConfigError where an implementation is pallas and the devices of the mesh have no such kernel."""
  for kernel, (field, implementation) in implementation_fields(config).items():
    if implementation == "pallas":  # otherwise devices are not looked at: several processes may not be connected yet
      try:
        resolve_implementation(kernel, implementation)
      except ValueError as e:
        raise ConfigError(f"{field}={implementation}: {e}") from e
