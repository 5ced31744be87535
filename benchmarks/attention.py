"""FLOP/s of causal attention on one GPU:  python -m benchmarks.attention

Forward, and forward with backward, at the shapes of V3 (16 of its 128 heads) and of 67B. The platform's kernel, or what
--implementation chooses, beside XLA and, if torch is installed, its scaled_dot_product_attention, on the same GPU in
the same run. Data and timing are those of benchmarks/fp8_matmul.py.

FLOPs count the causal pairs of two matmuls forward and four backward. Recomputed scores are not counted. Errors are
relative to XLA's result in the same dtype; of a backward pass, the largest of the result's and the gradients'.

--json, --seconds, --row_seconds, --small and exit codes are as in benchmarks/fp8_matmul.py.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.timing import Calls, Row, copies_beyond_l2, random_normal, run_table, torch_on_gpu
from deepseek_jax.flags import run_program


@dataclasses.dataclass(frozen=True)
class Shape:
  """The shape of an attention call."""

  batch: int
  seq: int
  heads: int  # of queries
  kv_heads: int  # of keys and values
  qk_dim: int  # of a head
  v_dim: int

  @property
  def flops(self) -> float:
    """FLOPs of the two matmuls of a forward pass."""
    pairs = self.batch * self.heads * self.seq * (self.seq + 1) / 2
    return 2 * pairs * (self.qk_dim + self.v_dim)

  @property
  def scale(self) -> float:
    return self.qk_dim**-0.5


SHAPES = {"V3": Shape(2, 4096, 16, 16, 192, 128), "67B": Shape(1, 4096, 64, 8, 128, 128)}
SMALL = {"V3": Shape(1, 128, 1, 1, 24, 16)}


def main(argv: list[str]) -> int:
  return run_table(argv, __doc__, make_rows, ("xla", "torch"))


def make_rows(implementation: str, small: bool) -> Iterator[Row]:
  """Two rows for each shape: forward, and forward with backward."""
  for name, shape in (SMALL if small else SHAPES).items():
    for kind, factor in (("forward", 1), ("forward and backward", 3)):
      make_calls = functools.partial(attention_calls, shape, implementation, factor > 1)
      error = functools.partial(relative_error, shape, factor > 1)
      kernel = resolve_implementation(shape, implementation)
      yield Row(f"{name} {kind}", factor * shape.flops, "TFLOP/s", None, None, make_calls, error, kernel)


def resolve_implementation(shape: Shape, implementation: str) -> str | None:
  """The kernel that runs: "auto" is XLA if the platform has no kernel, or none for the shape."""
  import jax
  import jax.numpy as jnp

  from deepseek_jax.kernels.implementations import resolve_implementation

  if implementation not in ("auto", "pallas"):
    return implementation
  heads = (shape.heads, shape.qk_dim), (shape.kv_heads, shape.qk_dim), (shape.kv_heads, shape.v_dim)
  operands = [jax.ShapeDtypeStruct((shape.batch, shape.seq, *head), jnp.bfloat16) for head in heads]
  try:
    jax.eval_shape(attention_function(shape, "pallas", False), *operands)
  except ValueError:
    return "xla"
  return resolve_implementation("attention", "pallas")


def attention_calls(shape: Shape, implementation: str, backward: bool) -> Calls:
  """Arguments are queries, keys, values and, with a backward pass, the gradient of the result."""
  q = random_normal(shape.batch, shape.seq, shape.heads, shape.qk_dim)
  k = random_normal(shape.batch, shape.seq, shape.kv_heads, shape.qk_dim, seed=1)
  v = random_normal(shape.batch, shape.seq, shape.kv_heads, shape.v_dim, seed=2)
  dy = random_normal(shape.batch, shape.seq, shape.heads, shape.v_dim, seed=3)
  arguments = copies_beyond_l2(q, k, v, *([dy] if backward else []))
  calls = {name: (attention_function(shape, name, backward), arguments) for name in (implementation, "xla")}
  return {"ours": calls[implementation], "xla": calls["xla"]} | torch_attention(shape, backward)


def attention_function(shape: Shape, implementation: str, backward: bool) -> Callable:
  """(q, k, v) -> result, or (q, k, v, gradient of it) -> (result, gradients of q, k and v)."""
  import jax

  from deepseek_jax.kernels.attention.api import attention

  forward = functools.partial(attention, scale=shape.scale, implementation=implementation)

  def forward_and_backward(q, k, v, dy):
    y, vjp = jax.vjp(forward, q, k, v)
    return y, *vjp(dy)

  return forward_and_backward if backward else forward


def relative_error(shape: Shape, backward: bool, ours: Any, *arguments: Any) -> Any:
  """The largest |ours - XLA's| / |XLA's| of the results, a scalar jax.Array."""
  import jax
  import jax.numpy as jnp

  reference = attention_function(shape, "xla", backward)(*arguments)

  def relative(a, b):
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel())

  errors = [relative(a, b) for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True)]
  return jnp.max(jnp.stack(errors))


def torch_attention(shape: Shape, backward: bool) -> Calls:
  """torch's attention, of [batch, heads, seq, head_dim]. Empty without torch or a GPU for it."""
  torch = torch_on_gpu()
  if torch is None:
    return {}

  def operand(heads, head_dim):
    x = torch.randn(shape.batch, heads, shape.seq, head_dim, device="cuda", dtype=torch.bfloat16)
    return x.requires_grad_(backward)

  gqa = {"enable_gqa": True} if shape.heads > shape.kv_heads else {}

  def forward(q, k, v):
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return sdpa(q, k, v, is_causal=True, scale=shape.scale, **gqa)

  def forward_and_backward(q, k, v, dy):
    y = forward(q, k, v)
    return y, *torch.autograd.grad(y, (q, k, v), dy)

  def operands():
    q, k = operand(shape.heads, shape.qk_dim), operand(shape.kv_heads, shape.qk_dim)
    v, dy = operand(shape.kv_heads, shape.v_dim), operand(shape.heads, shape.v_dim).detach()
    return (q, k, v, dy) if backward else (q, k, v)

  return {"torch": (forward_and_backward if backward else forward, [operands() for _ in range(3)])}


if __name__ == "__main__":
  run_program(main)
