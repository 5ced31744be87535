"""The gated activation of an MLP in FP8: what the down projection reads, without a copy in more bits."""

from deepseek_jax.kernels.implementations import run


def swiglu_quantize(gate, up, block, *, pow2_scales=False, implementation="auto"):
  """`quantize_both` of silu(gate) * up, computed in float32: (that [rows, columns], its transpose), tiles (1, block) each.

  Args:
    gate, up: [rows, columns] of one dtype, read once.
    pow2_scales: scales are powers of two.

  Raises:
    ValueError: shapes that differ, or an `implementation` that does not exist or does not do this.
  """
  if gate.shape != up.shape:
    raise ValueError(f"gate {gate.shape} and up {up.shape}: equal shapes [rows, columns] are multiplied")
  return run("swiglu", "swiglu_quantize", implementation, gate, up, block, pow2_scales)
