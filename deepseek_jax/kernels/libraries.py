"""Pallas kernels of libraries, made fit for programs whose types say what varies over devices, and for plans.

Those that come with jax neither type their results for shard_map(check_vma=True) nor, some of them, say what they cost. So a
module of theirs is loaded once more, with a `pallas_call` that does both. Others, which refuse typed operands, are not shown any.
"""

import functools
import importlib.util
import types

import jax
from jax.experimental import pallas as pl
from jax.extend.core import Primitive
from jax.interpreters import mlir

from deepseek_jax.kernels.implementations import device_kind, vary


def again(name):
  """The module `name`, loaded once more, so that names in it can be others."""
  spec = importlib.util.find_spec(name)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@functools.cache
def library(name, dtype, cost=None):
  """The module `jax.experimental.pallas.ops.tpu.<name>`, whose kernels are traced for operands of `dtype`.

  cost: (keywords of a pallas_call, its operands, its results) -> pl.CostEstimate, where the module has none.
  """
  module = again(f"jax.experimental.pallas.ops.tpu.{name}")

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


# The same array, typed as varying over no axis of a mesh: Mosaic's maps over warps refuse others (jax 0.11, 0.12).
_forget = Primitive("forget_axes")
_forget.def_abstract_eval(lambda x: x.update(manual_axis_type=type(x.manual_axis_type)()))
_forget.def_impl(lambda x: x)
mlir.register_lowering(_forget, lambda _, x: [x])


def untyped(kernel):
  """`kernel`, which sees operands that vary over no axis of a mesh; its results vary over all axes that its operands do.

  For what has a gradient of its own and is not mapped by vmap, since the cast has neither: it would hide which devices' terms
  are to be summed.
  """

  @functools.wraps(kernel)
  def call(*operands):
    return vary(kernel(*jax.tree.map(_forget.bind, operands)), operands)[0]

  return call
