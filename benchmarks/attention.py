"""What causal attention reaches on one GPU:  python -m benchmarks.attention

Forward, and forward with backward, at the shapes of V3 (16 of its 128 heads) and of 67B: the platform's kernel, which
--implementation chooses, beside XLA's own and, where torch is importable, its scaled_dot_product_attention, on the same card
in the same run. Data and times as in benchmarks/fp8_matmul.py.

FLOPs are those of the causal pairs, of two products forward and of four backward: the scores that kernels make again are not
counted. Errors are relative to XLA's in the same dtype; of a backward pass, the largest of the result and the gradients.

--json, --seconds, --row_seconds, --small and exit codes are as in benchmarks/fp8_matmul.py.
"""

import dataclasses
import functools

from benchmarks.timing import Row, copies, normal, run_table, torch_on_gpu
from deepseek_jax.flags import run_program


@dataclasses.dataclass(frozen=True)
class Shape:
  """`heads` of queries, `kv_heads` of keys and values; widths are of one head."""

  batch: int
  seq: int
  heads: int
  kv_heads: int
  key: int
  value: int

  @property
  def flops(self):
    """Of the two products of a forward pass."""
    pairs = self.batch * self.heads * self.seq * (self.seq + 1) / 2
    return 2 * pairs * (self.key + self.value)

  @property
  def scale(self):
    return self.key**-0.5


SHAPES = {"V3": Shape(2, 4096, 16, 16, 192, 128), "67B": Shape(1, 4096, 64, 8, 128, 128)}
SMALL = {"V3": Shape(1, 128, 1, 1, 24, 16)}


def main(argv) -> int:
  return run_table(argv, __doc__, rows, ("xla", "torch"))


def rows(implementation, small):
  """Forward, and forward with backward, of every shape."""
  for name, shape in (SMALL if small else SHAPES).items():
    for kind, factor in (("forward", 1), ("forward and backward", 3)):
      make = functools.partial(calls, shape, implementation, factor > 1)
      error = functools.partial(difference, shape, factor > 1)
      kernel = kernel_of(shape, implementation)
      yield Row(f"{name} {kind}", factor * shape.flops, "TFLOP/s", None, None, make, error, kernel)


def kernel_of(shape: Shape, implementation):
  """What `implementation` is here: "auto" is XLA's where there is no kernel, or it does not do the shape."""
  import jax
  import jax.numpy as jnp

  from deepseek_jax.kernels.implementations import chosen

  if implementation not in ("auto", "pallas"):
    return implementation
  heads = (shape.heads, shape.key), (shape.kv_heads, shape.key), (shape.kv_heads, shape.value)
  operands = [jax.ShapeDtypeStruct((shape.batch, shape.seq, *head), jnp.bfloat16) for head in heads]
  try:
    jax.eval_shape(attend(shape, "pallas", False), *operands)
  except ValueError:
    return "xla"
  return chosen("attention", "pallas")


def calls(shape: Shape, implementation, backward):
  """As `Row.make`. Arguments are queries, keys, values and, of a backward pass, the gradient of the result."""
  q = normal(shape.batch, shape.seq, shape.heads, shape.key)
  k = normal(shape.batch, shape.seq, shape.kv_heads, shape.key, seed=1)
  v = normal(shape.batch, shape.seq, shape.kv_heads, shape.value, seed=2)
  dy = normal(shape.batch, shape.seq, shape.heads, shape.value, seed=3)
  arguments = copies(q, k, v, *([dy] if backward else []))
  found = {name: (attend(shape, name, backward), arguments) for name in (implementation, "xla")}
  return {"ours": found[implementation], "xla": found["xla"]} | torch_attention(shape, backward)


def attend(shape: Shape, implementation, backward):
  """(q, k, v) -> result, or (q, k, v, gradient of it) -> (result, gradients of q, k and v)."""
  import jax

  from deepseek_jax.kernels.attention.api import attention

  forward = functools.partial(attention, scale=shape.scale, implementation=implementation)

  def both(q, k, v, dy):
    y, pull = jax.vjp(forward, q, k, v)
    return y, *pull(dy)

  return both if backward else forward


def difference(shape: Shape, backward, ours, *arguments):
  """The largest |ours - XLA's| / |XLA's| of the results."""
  import jax
  import jax.numpy as jnp

  theirs = attend(shape, "xla", backward)(*arguments)

  def relative(a, b):
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel())

  return jnp.max(
    jnp.stack([relative(a, b) for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)])
  )


def torch_attention(shape: Shape, backward):
  """torch's, [batch, heads, seq, width], where torch and its GPU are at hand."""
  torch = torch_on_gpu()
  if torch is None:
    return {}

  def make(heads, width):
    x = torch.randn(shape.batch, heads, shape.seq, width, device="cuda", dtype=torch.bfloat16)
    return x.requires_grad_(backward)

  grouped = {"enable_gqa": True} if shape.heads > shape.kv_heads else {}

  def forward(q, k, v):
    scaled = torch.nn.functional.scaled_dot_product_attention
    return scaled(q, k, v, is_causal=True, scale=shape.scale, **grouped)

  def both(q, k, v, dy):
    y = forward(q, k, v)
    return y, *torch.autograd.grad(y, (q, k, v), dy)

  def operands():
    q, k = make(shape.heads, shape.key), make(shape.kv_heads, shape.key)
    v, dy = make(shape.kv_heads, shape.value), make(shape.heads, shape.value).detach()
    return (q, k, v, dy) if backward else (q, k, v)

  return {"torch": (both if backward else forward, [operands() for _ in range(3)])}


if __name__ == "__main__":
  run_program(main)
