"""Pallas kernels of libraries, adapted to `shard_map(check_vma=True)` and to cost estimates.

Kernels that come with jax do not type their results as varying over mesh axes, and some have no cost estimate. So their
module is loaded a second time, with a `pallas_call` that does both. Kernels that refuse such types see operands without
them.
"""

import functools
import importlib.util
import types
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.extend.core import Primitive
from jax.interpreters import mlir

from deepseek_jax.kernels.implementations import device_kind, match_vma


def import_copy(name: str) -> Any:
  """A second copy of the module `name`, so that names in it can be replaced."""
  spec = importlib.util.find_spec(name)
  if spec is None or spec.loader is None:
    raise ModuleNotFoundError(name)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@functools.cache
def tpu_library(name: str, dtype: str, cost: Callable[..., pl.CostEstimate] | None = None) -> Any:
  """The module `jax.experimental.pallas.ops.tpu.<name>`, whose kernels are traced for operands of `dtype`.

  cost: (keywords of a pallas_call, its operands, its results) -> pl.CostEstimate, where the module has none.
  """
  module = import_copy(f"jax.experimental.pallas.ops.tpu.{name}")

  def pallas_call(kernel, *, out_shape, interpret, **kwargs):
    def call(*operands):
      # Results vary over mesh axes as the operand does that varies over most: callers give all operands the same.
      vmas = [jax.typeof(x).manual_axis_type for x in jax.tree.leaves(operands)]
      vma = max(vmas, key=lambda kind: len(kind.varying))
      out_types = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=vma), out_shape)
      # By default the name of the library's function that defines the kernel.
      kwargs.setdefault("name", getattr(kernel, "__qualname__", "").partition(".")[0])
      if cost:
        kwargs["cost_estimate"] = cost(kwargs, operands, out_types)
      # The default precision has too few bits for float32, inside a kernel too. The model's matmul_precision does not
      # reach the backward pass, which is traced outside of it.
      with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        return pl.pallas_call(kernel, out_shape=out_types, interpret=device_kind() == "cpu", **kwargs)(*operands)

    return call

  module.pl = types.SimpleNamespace(**vars(pl) | {"pallas_call": pallas_call})
  return module


# The same array, typed as varying over no axis of a mesh: Mosaic's maps over warps refuse others (jax 0.11, 0.12).
_drop_vma = Primitive("drop_vma")
_drop_vma.def_abstract_eval(lambda x: x.update(manual_axis_type=type(x.manual_axis_type)()))
_drop_vma.def_impl(lambda x: x)
mlir.register_lowering(_drop_vma, lambda _, x: [x])


def without_vma(kernel: Callable) -> Callable:
  """`kernel`, which sees operands that vary over no mesh axis; its results vary over all axes that its operands do.

  Only for a kernel with a gradient of its own that vmap does not map: the cast has no rule for either. A gradient
  through it would lose the sum over devices.
  """

  @functools.wraps(kernel)
  def call(*operands):
    return match_vma(kernel(*jax.tree.map(_drop_vma.bind, operands)), operands)[0]

  return call
