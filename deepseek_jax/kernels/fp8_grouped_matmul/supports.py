"""Which FP8 grouped GEMMs the Pallas kernels do, by their operands as in fp8_matmul/supports.py."""

from typing import Any

from jax.typing import DTypeLike

from deepseek_jax.kernels.fp8_matmul.supports import hopper_operands, tpu_operands
from deepseek_jax.kernels.implementations import Support
from deepseek_jax.kernels.qtensor import QTensor
from deepseek_jax.kernels.tiles import BLOCK


def pallas_tpu(function: str, a: QTensor, b: QTensor, *_: Any) -> Support:
  return tpu_operands(a, b)


def pallas_gpu(function: str, a: QTensor, b: QTensor, group_sizes: Any, step: int, out_dtype: DTypeLike) -> Support:
  return hopper_operands(a, b, (1,) if function == "wgrad" else (BLOCK,), out_dtype)
