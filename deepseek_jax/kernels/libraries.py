"""Pallas kernels that come with jax, made fit for programs whose types say what varies over devices, and for plans.

Those kernels neither type their results for shard_map(check_vma=True) nor, some of them, say what they cost. So a module of
theirs is loaded once more, with a `pallas_call` that does both.
"""

import functools
import importlib.util
import types

import jax
from jax.experimental import pallas as pl

from deepseek_jax.kernels.implementations import device_kind


@functools.cache
def library(name, dtype, cost=None):
  """The module `jax.experimental.pallas.ops.tpu.<name>`, whose kernels are traced for operands of `dtype`.

  cost: (keywords of a pallas_call, its operands, its results) -> pl.CostEstimate, where the module has none.
  """
  spec = importlib.util.find_spec(f"jax.experimental.pallas.ops.tpu.{name}")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)

  def pallas_call(kernel, *, out_shape, interpret, **how):
    def call(*operands):
      # Results vary as the operand does that varies most: callers make the others of theirs alike.
      varies = [jax.typeof(x).manual_axis_type for x in jax.tree.leaves(operands)]
      most = max(varies, key=lambda kind: len(kind.varying))
      typed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=most), out_shape)
      how.setdefault(
        "name", getattr(kernel, "__qualname__", "").partition(".")[0]
      )  # of the function that has the kernel in it
      if cost:
        how["cost_estimate"] = cost(how, operands, typed)
      # Inside a kernel, too, products of float32 would have fewer bits, and the backward pass is traced outside the model's
      # matmul_precision.
      with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        return pl.pallas_call(kernel, out_shape=typed, interpret=device_kind() == "cpu", **how)(*operands)

    return call

  module.pl = types.SimpleNamespace(**vars(pl) | {"pallas_call": pallas_call})
  return module
