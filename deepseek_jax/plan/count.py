"""What one device does in a step, counted on the traced program: products, bytes of HBM, messages. Nothing is compiled.

HBM is counted as a compiler with perfect fusion would use it: an elementwise result costs nothing by itself; where a product,
a message or a loop takes it, it is written and read, and what it was made from is read.
"""

import dataclasses
import math

import jax

COLLECTIVES = {
  "psum": "all-reduce", "psum_invariant": "all-reduce", "psum2": "all-reduce", "pmax": "all-reduce", "pmin": "all-reduce",
  "all_gather": "all-gather", "all_gather_invariant": "all-gather", "reduce_scatter": "reduce-scatter",
  "all_to_all": "all-to-all", "ragged_all_to_all": "ragged-all-to-all", "ppermute": "collective-permute",
}  # fmt: skip
KERNELS = {  # by what their names begin with
  "splash": "fused attention", "gmm": "grouped product", "tgmm": "grouped product", "fp8_grouped": "grouped product",
  "quantize": "memory",
}  # fmt: skip
PRODUCTS = ("dot_general", "ragged_dot", "ragged_dot_general")
SLICES = ("slice", "dynamic_slice", "gather")  # read in part: what they give is what is read
MOVES = ("sort", "cumsum", "cummax", "top_k", "argmax", "device_put")
UPDATES = (
  "scatter",
  "scatter-add",
  "scatter_add",
  "scatter_mul",
  "dynamic_update_slice",
)  # in place: what is written, read and written
REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "reduce_prod", "reduce")


@dataclasses.dataclass(frozen=True)
class Operation:
  """One instruction, done `times` times in a step by each device: FLOPs of a product, bytes of HBM, bytes sent over `axes`."""

  kind: str  # "product", "grouped product", "fused attention", "memory", or a collective's name in HLO
  times: float
  fp8: bool = False  # a product of such operands
  flops: float = 0
  bytes: float = 0
  axes: tuple[str, ...] = ()
  sent: float = 0


@dataclasses.dataclass(frozen=True)
class Loops:
  """What a traced program does not tell: trips of loops that have no constant number, how often conditional parts run (a share
  of the trips, in the order they stand in), and the shares of rows that grouped products and ragged messages really have."""

  trips: float = 1
  taken: tuple[float, ...] = ()
  full_rows: float = 1
  sent_rows: float = 1


class Value:
  """An array on a device. `sources`: the arrays in memory that it is made from; empty: it is in memory itself."""

  def __init__(self, size, sources=()):
    self.size, self.sources = size, tuple(sources)

  def roots(self):
    return self.sources or (self,)


def counted(jaxpr, sizes, loops=Loops()) -> list[Operation]:
  """Operations of a closed jaxpr, that of a jitted step: arguments and results are read and written once, in their layouts.

  Args:
    sizes: {mesh axis: devices}.
  """
  counter = _Counter(sizes, loops)
  inputs = [counter.value(v) for v in jaxpr.jaxpr.invars]
  counter.stored(counter.walk(jaxpr.jaxpr, inputs, 1), 1)
  return counter.found


def held(aval) -> float:
  """Bytes that a device holds of an array of this type."""
  if not hasattr(aval, "dtype") or jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended):
    return 0
  sharding = getattr(aval, "sharding", None)
  whole = sharding is not None and not sharding.mesh.empty and not sharding.mesh.manual_axes
  shape = sharding.shard_shape(aval.shape) if whole else aval.shape  # in manual programs it is a device's own
  return math.prod(shape) * aval.dtype.itemsize


class _Counter:
  def __init__(self, sizes, loops):
    self.sizes, self.loops, self.found, self.branches = sizes, loops, [], 0

  def value(self, variable):
    return Value(held(variable.aval))

  def add(self, kind, times, **amounts):
    if any(amounts.values()):
      self.found.append(Operation(kind, times, **amounts))

  def walk(self, jaxpr, inputs, times):
    """Values of the results of `jaxpr`; what it does is added, `times` times."""
    values = dict(zip(jaxpr.invars, inputs, strict=True))
    values |= {v: self.value(v) for v in jaxpr.constvars}
    read = lambda v: values[v] if not hasattr(v, "val") else Value(0)
    for eqn in jaxpr.eqns:
      outputs = self.instruction(eqn, [read(v) for v in eqn.invars], times)
      values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]

  def instruction(self, eqn, inputs, times):
    name, params = eqn.primitive.name, eqn.params
    fresh = [self.value(v) for v in eqn.outvars]
    if name in COLLECTIVES:
      self.message(eqn, inputs, fresh, times)
    elif name in PRODUCTS:
      flops, grouped = product(eqn)
      self.product(
        "grouped product" if grouped else "product", times, flops, self.taken(inputs) + sum(v.size for v in fresh)
      )
    elif name == "pallas_call":  # its estimate has the reads of its operands, which are in memory
      made, cost = self.taken(inputs) - sum(v.size for v in inputs), params["cost_estimate"]
      kind, fp8 = kind_of_kernel(params["name"]), params["name"].startswith("fp8")
      self.product(kind, times, cost.flops, made + cost.bytes_accessed, fp8)
    elif name in SLICES:
      pass
    elif name in UPDATES:
      self.add("memory", times, bytes=2 * self.taken(inputs[1:]))
    elif name in MOVES:
      self.add("memory", times, bytes=self.taken(inputs) + sum(v.size for v in fresh))
    elif name in REDUCTIONS:  # fused with what makes the operands
      reads = sum(root.size for root in _union(inputs))
      self.add("memory", times, bytes=reads + sum(v.size for v in fresh))
    elif name == "scan":
      self.stored(inputs, times)
      self.loop(params["jaxpr"].jaxpr, times * params["length"])
    elif name == "while":
      self.stored(inputs, times)
      self.loop(params["body_jaxpr"].jaxpr, times * self.loops.trips)
    elif name == "cond":
      return self.conditional(params, inputs, fresh, times)
    elif (inner := _inner(params)) is not None:
      return self.walk(inner, inputs[len(inputs) - len(inner.invars) :], times)
    else:
      sources = _union(inputs)  # none: constants, and counting
      return [Value(v.size if sources else 0, sources) for v in fresh]
    return fresh

  def product(self, kind, times, flops, moved, fp8=False):
    flops *= self.loops.full_rows if kind == "grouped product" else 1
    self.add(kind, times, flops=flops, bytes=moved, fp8=fp8)

  def loop(self, body, times):
    """The body of a loop, whose arguments and results are in memory."""
    self.stored(self.walk(body, [self.value(v) for v in body.invars], times), times)

  def conditional(self, params, inputs, fresh, times):
    """The branch that does most, as often as `loops.taken` says."""
    share = self.loops.taken[self.branches % len(self.loops.taken)] if self.loops.taken else 1
    self.branches += 1
    kept, best = self.found, []
    for branch in params["branches"]:
      self.found = []
      self.stored(self.walk(branch.jaxpr, inputs[1:], times * share), times * share)
      best = max(best, self.found, key=lambda found: sum(o.flops + o.bytes + o.sent for o in found))
    self.found = kept + best
    return fresh

  def message(self, eqn, inputs, fresh, times):
    kind, params = COLLECTIVES[eqn.primitive.name], eqn.params
    axes = params.get("axes") or params.get("axis_name")
    axes = axes if isinstance(axes, tuple) else (axes,)
    axes = tuple(sorted(axes, key=list(self.sizes).index))
    n = math.prod(self.sizes[axis] for axis in axes)
    whole = sum(v.size for v in inputs)
    if kind == "ragged-all-to-all":  # rows from one buffer to another, of which the smaller has few that are empty
      whole = min(held(v.aval) for v in eqn.invars[:2])
    others = (n - 1) / n
    sent = {
      "all-reduce": 2 * others * whole, "all-gather": others * sum(v.size for v in fresh), "reduce-scatter": others * whole,
      "all-to-all": others * whole, "collective-permute": whole, "ragged-all-to-all": others * whole * self.loops.sent_rows,
    }[kind]  # fmt: skip
    self.add(kind, times, bytes=self.taken(inputs) + sum(v.size for v in fresh), axes=axes, sent=sent)

  def taken(self, values):
    """Bytes moved to have `values` in memory and to read them."""
    total = 0
    for v in values:
      total += v.size + (v.size + sum(root.size for root in v.sources) if v.sources else 0)
      v.sources = ()
    return total

  def stored(self, values, times):
    """`values` leave a program or a loop: those that are not in memory are put there."""
    unique = {id(v): v for v in values if v.sources}.values()
    self.add("memory", times, bytes=sum(v.size + sum(root.size for root in v.sources) for v in unique))
    for v in unique:
      v.sources = ()


def kind_of_kernel(name):
  return next((kind for start, kind in KERNELS.items() if name.startswith(start)), "product")


def product(eqn):
  """(FLOPs of a product, whether it is one by groups)."""
  left, out = eqn.invars[0].aval.shape, math.prod(eqn.outvars[0].aval.shape)
  if eqn.primitive.name == "dot_general":
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return 2 * out * math.prod(left[i] for i in contracted), False
  numbers = eqn.params["ragged_dot_dimension_numbers"]
  (contracted, _), _ = numbers.dot_dimension_numbers
  # One that contracts the rows has a result for each group, of its rows alone.
  groups = eqn.outvars[0].aval.shape[0] if set(numbers.lhs_ragged_dimensions) <= set(contracted) else 1
  return 2 * out * math.prod(left[i] for i in contracted) / groups, True


def _union(values):
  return tuple({id(root): root for v in values for root in v.roots() if root.size}.values())


def _inner(params):
  """The jaxpr of a call, or None."""
  for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
    if name in params:
      return getattr(params[name], "jaxpr", params[name])
  return None
