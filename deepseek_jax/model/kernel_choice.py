"""Which config field chooses the implementation of each kernel, and whether the devices have what it asks for."""

import jax
import jax.numpy as jnp

from deepseek_jax.errors import ConfigError
from deepseek_jax.kernels.implementations import SUPPORTED, Support, log_fallback, resolve_implementation, supports
from deepseek_jax.kernels.qtensor import FP8, QTensor
from deepseek_jax.model_config import AttentionConfig, ModelConfig


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
  """Raises ConfigError where an implementation is pallas and the devices of the mesh have no such kernel.

  So it does where that kernel supports no operands of the config's dtypes and tiles. Their shapes are checked when a
  kernel is called.
  """
  for kernel, (field, implementation) in implementation_fields(config).items():
    if implementation == "pallas":  # otherwise devices are not looked at: several processes may not be connected yet
      try:
        file = resolve_implementation(kernel, implementation)
      except ValueError as e:
        raise ConfigError(f"{field}={implementation}: {e}") from e
      function, arguments = _smallest_call(kernel, config)
      if not (support := supports(kernel, function, file, *arguments)):
        raise ConfigError(f"{field}={implementation}: {support.reason}")


def _smallest_call(kernel: str, config: ModelConfig) -> tuple[str, tuple]:
  """(function, arguments) of a call with the config's dtypes and tiles, in sizes that every kernel does."""
  block = config.fp8.block

  def array(*shape, dtype=config.compute_dtype):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

  def operand(rows):
    return QTensor(array(block, block, dtype=FP8), array(block // rows, 1, dtype="float32"), (rows, block))

  matrix, sizes = array(block, block), array(1, dtype="int32")
  return {
    "attention": ("attention", (array(1, 128, 1, 64),) * 3),
    "grouped_matmul": ("grouped_matmul", (array(128, 128), array(1, 128, 128), sizes, 8)),
    "quantize": ("quantize_both", (matrix, block, False)),
    "swiglu": ("swiglu_quantize", (matrix, matrix, block, False)),
    "fp8_matmul": ("matmul", (operand(1), operand(block), matrix.dtype)),
    "fp8_grouped_matmul": ("matmul", (operand(1), operand(block), sizes, 8, matrix.dtype)),
  }[kernel]


def may_use_attention_kernel(config: AttentionConfig, context_parallel: bool) -> bool:
  """Whether training calls the attention kernel, as far as the config says. Logs once where it could but for the config.

  context_parallel: whether devices share the sequence.
  """
  if resolve_implementation("attention", config.implementation) == "xla":
    return False
  support = attention_support(config, context_parallel)
  if not support:
    log_fallback("attention", support.reason)
  return bool(support)


def attention_support(config: AttentionConfig, context_parallel: bool) -> Support:
  """Whether a kernel computes this attention, whatever the shapes."""
  if config.dropout:
    return Support("kernels have no dropout")
  if context_parallel and config.kv_comm == "ring":
    return Support("no kernel does model.attention.kv_comm=ring")
  return SUPPORTED
