"""SwiGLU fused with quantization: the FP8 input of an MLP's down projection, without a copy in more bits."""

import jax

from deepseek_jax.kernels.implementations import call_kernel
from deepseek_jax.kernels.qtensor import QTensor


def swiglu_quantize(
  gate: jax.Array, up: jax.Array, block: int, *, pow2_scales: bool = False, implementation: str = "auto"
) -> tuple[QTensor, QTensor]:
  """`quantize_both` of silu(gate) * up, computed in float32: (rowwise, columnwise), tiles (1, block) each.

  Args:
    gate, up: [rows, columns] of one dtype, read once.
    pow2_scales: scales are powers of two.

  Raises:
    ValueError: shapes that differ, or an `implementation` that does not exist or does not support this.
  """
  if gate.shape != up.shape:
    raise ValueError(f"gate {gate.shape} and up {up.shape}: equal shapes [rows, columns] are multiplied")
  return call_kernel("swiglu", "swiglu_quantize", implementation, gate, up, block, pow2_scales)
