"""Counts the FLOPs, HBM bytes and collective bytes of one device in a step, on the traced program. Nothing is compiled.

HBM traffic is counted as for a compiler with perfect fusion. The result of an elementwise operation costs nothing by
itself. It is written and read where a matmul, a collective or a loop uses it, and its own inputs are read then.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax.extend import core

COLLECTIVES = {
  "psum": "all-reduce", "psum_invariant": "all-reduce", "psum2": "all-reduce", "pmax": "all-reduce", "pmin": "all-reduce",
  "all_gather": "all-gather", "all_gather_invariant": "all-gather", "reduce_scatter": "reduce-scatter",
  "all_to_all": "all-to-all", "ragged_all_to_all": "ragged-all-to-all", "ppermute": "collective-permute",
}  # fmt: skip
KERNEL_KINDS = {  # by the start of the kernel's name
  "splash": "fused attention", "gmm": "grouped matmul", "tgmm": "grouped matmul", "fp8_grouped": "grouped matmul",
  "quantize": "memory",
}  # fmt: skip
MATMULS = ("dot_general", "ragged_dot", "ragged_dot_general")
SLICES = ("slice", "dynamic_slice", "gather")  # only the elements of the result are read
MOVES = ("sort", "cumsum", "cummax", "top_k", "argmax", "device_put")
# In place: the updated elements are read and written.
UPDATES = ("scatter", "scatter-add", "scatter_add", "scatter_mul", "dynamic_update_slice")
REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "reduce_prod", "reduce")


@dataclasses.dataclass(frozen=True)
class Operation:
  """One operation of the program. Amounts are of one device and one execution."""

  kind: str  # "matmul", "grouped matmul", "fused attention", "memory", or a collective's name in HLO
  count: float  # executions in a step
  fp8: bool = False  # a matmul with FP8 operands
  flops: float = 0
  hbm_bytes: float = 0  # read and written
  axes: tuple[str, ...] = ()  # mesh axes of a collective
  collective_bytes: float = 0  # that the device sends


@dataclasses.dataclass(frozen=True)
class RuntimeAssumptions:
  """What the trace does not know, since it depends on data or on the schedule."""

  trip_count: float = 1  # of loops without a constant trip count
  # How often the larger branch of each `cond` runs, in program order; () is always.
  branch_fractions: tuple[float, ...] = ()
  grouped_matmul_fill: float = 1  # share of the rows of grouped matmuls that hold tokens
  ragged_fill: float = 1  # share of the rows of a ragged all-to-all's buffer that are sent


class Value:
  """An array on a device, of `size` bytes.

  `fused_inputs`: the arrays in HBM that it is computed from; () if it is in HBM.
  """

  def __init__(self, size: float, fused_inputs: Iterable["Value"] = ()):
    self.size, self.fused_inputs = size, tuple(fused_inputs)

  def arrays_in_hbm(self) -> tuple["Value", ...]:
    """The arrays in HBM that a fusion reads to use this one."""
    return self.fused_inputs or (self,)


def count_operations(
  jaxpr: core.ClosedJaxpr, mesh_sizes: Mapping[str, int], assumptions: RuntimeAssumptions = RuntimeAssumptions()
) -> list[Operation]:
  """Operations of a jitted step's jaxpr. Its arguments and results are read and written once, sharded as they are.

  Args:
    mesh_sizes: {mesh axis: devices}, in the mesh's order.
  """
  counter = _Counter(mesh_sizes, assumptions)
  inputs = [counter.in_hbm(v) for v in jaxpr.jaxpr.invars]
  counter.write_to_hbm(counter.count_jaxpr(jaxpr.jaxpr, inputs, 1), 1)
  return counter.operations


def bytes_per_device(aval: Any) -> float:
  """Bytes of a device's shard of an array with this abstract value. 0 for PRNG keys and tokens of effects."""
  if not hasattr(aval, "dtype") or jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended):
    return 0
  sharding: Any = getattr(aval, "sharding", None)
  is_global = sharding is not None and not sharding.mesh.empty and not sharding.mesh.manual_axes
  shape = sharding.shard_shape(aval.shape) if is_global else aval.shape  # inside shard_map shapes are local
  return math.prod(shape) * aval.dtype.itemsize


class _Counter:
  def __init__(self, mesh_sizes: Mapping[str, int], assumptions: RuntimeAssumptions):
    self.mesh_sizes, self.assumptions = mesh_sizes, assumptions
    self.operations: list[Operation] = []
    self.num_conditionals = 0

  def in_hbm(self, variable: core.Var) -> Value:
    return Value(bytes_per_device(variable.aval))

  def add(self, kind: str, count: float, **amounts: Any) -> None:
    if any(amounts.values()):
      self.operations.append(Operation(kind, count, **amounts))

  def count_jaxpr(self, jaxpr: core.Jaxpr, inputs: list[Value], count: float) -> list[Value]:
    """Adds the operations of `jaxpr`, which runs `count` times. Returns its results."""
    values = dict(zip(jaxpr.invars, inputs, strict=True))
    values |= {v: self.in_hbm(v) for v in jaxpr.constvars}

    def lookup(atom):
      is_literal = hasattr(atom, "val")
      return Value(0) if is_literal else values[atom]

    for eqn in jaxpr.eqns:
      outputs = self.count_equation(eqn, [lookup(v) for v in eqn.invars], count)
      values.update(zip(eqn.outvars, outputs, strict=True))
    return [lookup(v) for v in jaxpr.outvars]

  def count_equation(self, eqn: core.JaxprEqn, inputs: list[Value], count: float) -> list[Value]:
    name, params = eqn.primitive.name, eqn.params
    outputs = [self.in_hbm(v) for v in eqn.outvars]
    output_bytes = sum(v.size for v in outputs)
    if name in COLLECTIVES:
      self.add_collective(eqn, inputs, outputs, count)
    elif name in MATMULS:
      flops, is_grouped = dot_flops(eqn)
      kind = "grouped matmul" if is_grouped else "matmul"
      self.add_matmul(kind, count, flops, self.read_from_hbm(inputs) + output_bytes)
    elif name == "pallas_call":
      # The kernel's estimate has the reads of its operands: only the bytes to put them in HBM are added.
      operand_bytes, cost = self.read_from_hbm(inputs) - sum(v.size for v in inputs), params["cost_estimate"]
      is_fp8 = params["name"].startswith("fp8")
      self.add_matmul(kernel_kind(params["name"]), count, cost.flops, operand_bytes + cost.bytes_accessed, is_fp8)
    elif name in SLICES:
      pass
    elif name in UPDATES:
      self.add("memory", count, hbm_bytes=2 * self.read_from_hbm(inputs[1:]))
    elif name in MOVES:
      self.add("memory", count, hbm_bytes=self.read_from_hbm(inputs) + output_bytes)
    elif name in REDUCTIONS:  # fused with what computes the operands
      read_bytes = sum(array.size for array in _arrays_in_hbm(inputs))
      self.add("memory", count, hbm_bytes=read_bytes + output_bytes)
    elif name == "scan":
      self.write_to_hbm(inputs, count)
      self.count_loop_body(params["jaxpr"].jaxpr, count * params["length"])
    elif name == "while":
      self.write_to_hbm(inputs, count)
      self.count_loop_body(params["body_jaxpr"].jaxpr, count * self.assumptions.trip_count)
    elif name == "cond":
      self.count_conditional(params, inputs, count)
    elif (called := _called_jaxpr(params)) is not None:
      return self.count_jaxpr(called, inputs[len(inputs) - len(called.invars) :], count)
    else:  # elementwise
      fused_inputs = _arrays_in_hbm(inputs)  # none for constants and iota, which cost nothing
      return [Value(v.size if fused_inputs else 0, fused_inputs) for v in outputs]
    return outputs

  def add_matmul(self, kind: str, count: float, flops: float, hbm_bytes: float, fp8: bool = False) -> None:
    flops *= self.assumptions.grouped_matmul_fill if kind == "grouped matmul" else 1
    self.add(kind, count, flops=flops, hbm_bytes=hbm_bytes, fp8=fp8)

  def count_loop_body(self, body: core.Jaxpr, count: float) -> None:
    """Adds the body of a loop, whose arguments and results are in HBM."""
    results = self.count_jaxpr(body, [self.in_hbm(v) for v in body.invars], count)
    self.write_to_hbm(results, count)

  def count_conditional(self, params: Mapping[str, Any], inputs: list[Value], count: float) -> None:
    """Adds the most expensive branch, as often as `branch_fractions` says."""
    fractions = self.assumptions.branch_fractions
    fraction = fractions[self.num_conditionals % len(fractions)] if fractions else 1
    self.num_conditionals += 1
    before = self.operations
    largest: list[Operation] = []
    for branch in params["branches"]:
      self.operations = []
      self.write_to_hbm(self.count_jaxpr(branch.jaxpr, inputs[1:], count * fraction), count * fraction)
      largest = max(largest, self.operations, key=_total_amount)
    self.operations = before + largest

  def add_collective(self, eqn: core.JaxprEqn, inputs: list[Value], outputs: list[Value], count: float) -> None:
    kind, params = COLLECTIVES[eqn.primitive.name], eqn.params
    axes = params.get("axes") or params.get("axis_name")
    axes = axes if isinstance(axes, tuple) else (axes,)
    axes = tuple(sorted(axes, key=list(self.mesh_sizes).index))
    group_size = math.prod(self.mesh_sizes[axis] for axis in axes)
    input_bytes, output_bytes = sum(v.size for v in inputs), sum(v.size for v in outputs)
    if kind == "ragged-all-to-all":  # from one buffer to another: the smaller one has fewer unused rows
      input_bytes = min(bytes_per_device(v.aval) for v in eqn.invars[:2])
    to_others = (group_size - 1) / group_size
    collective_bytes = {
      "all-reduce": 2 * to_others * input_bytes, "all-gather": to_others * output_bytes,
      "reduce-scatter": to_others * input_bytes, "all-to-all": to_others * input_bytes, "collective-permute": input_bytes,
      "ragged-all-to-all": to_others * input_bytes * self.assumptions.ragged_fill,
    }[kind]  # fmt: skip
    hbm_bytes = self.read_from_hbm(inputs) + output_bytes
    self.add(kind, count, hbm_bytes=hbm_bytes, axes=axes, collective_bytes=collective_bytes)

  def read_from_hbm(self, values: Iterable[Value]) -> float:
    """Bytes to read `values` from HBM, and first to write those that were fused so far. They are in HBM afterwards."""
    total: float = 0
    for v in values:
      total += v.size + _write_bytes(v)
      v.fused_inputs = ()
    return total

  def write_to_hbm(self, values: Iterable[Value], count: float) -> None:
    """Writes those of `values` that were fused so far: they leave a program or a loop. They are in HBM afterwards."""
    fused = {id(v): v for v in values if v.fused_inputs}.values()
    self.add("memory", count, hbm_bytes=sum(_write_bytes(v) for v in fused))
    for v in fused:
      v.fused_inputs = ()


def _write_bytes(value: Value) -> float:
  """Bytes to compute and write a fused value: itself and its inputs. 0 if it is in HBM."""
  return value.size + sum(array.size for array in value.fused_inputs) if value.fused_inputs else 0


def _total_amount(operations: list[Operation]) -> float:
  return sum(o.flops + o.hbm_bytes + o.collective_bytes for o in operations)


def kernel_kind(name: str) -> str:
  """The `Operation.kind` of a Pallas kernel, by its name."""
  return next((kind for prefix, kind in KERNEL_KINDS.items() if name.startswith(prefix)), "matmul")


def dot_flops(eqn: core.JaxprEqn) -> tuple[float, bool]:
  """(FLOPs of a dot_general or ragged_dot, whether it is a grouped matmul)."""
  lhs_aval: Any = eqn.invars[0].aval
  output_aval: Any = eqn.outvars[0].aval
  lhs, output_size = lhs_aval.shape, math.prod(output_aval.shape)
  if eqn.primitive.name == "dot_general":
    (contracting_dims, _), _ = eqn.params["dimension_numbers"]
    return 2 * output_size * math.prod(lhs[i] for i in contracting_dims), False
  numbers = eqn.params["ragged_dot_dimension_numbers"]
  (contracting_dims, _), _ = numbers.dot_dimension_numbers
  # Where the rows are contracted, each group has a result of its own, from its own rows.
  contracts_rows = set(numbers.lhs_ragged_dimensions) <= set(contracting_dims)
  num_groups = output_aval.shape[0] if contracts_rows else 1
  return 2 * output_size * math.prod(lhs[i] for i in contracting_dims) / num_groups, True


def _arrays_in_hbm(values: Iterable[Value]) -> tuple[Value, ...]:
  """The distinct arrays in HBM that a fusion with these inputs reads."""
  return tuple({id(a): a for v in values for a in v.arrays_in_hbm() if a.size}.values())


def _called_jaxpr(params: Mapping[str, Any]) -> core.Jaxpr | None:
  """The jaxpr of a call such as jit or remat, or None."""
  for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
    if name in params:
      return getattr(params[name], "jaxpr", params[name])
  return None
