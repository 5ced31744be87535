"""What a compiled program does, read from XLA's optimized HLO: messages by kind and mesh axes, FLOPs of products.

XLA's own `cost_analysis` counts the body of a loop once. Here a computation counts as often as it runs: loops that JAX makes
compare their counter with a constant.
"""

import dataclasses
import math
import re

import numpy as np

from deepseek_jax.plan.count import kind_of_kernel

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w+)\[([\d,]*)\]")
_HEAD = re.compile(r"(?:ENTRY )?(%?[\w.\-]+) .*\{$")
_COST = re.compile(r'"cost_estimate": ?\{[^}]*"flops":"?(\d+)')  # of a Pallas kernel, alone or in a fusion
_NAME = re.compile(r"\s+(?:ROOT )?(%[\w.\-]+) = ")
_CALLED = re.compile(
  r"(?:calls|body|branch_computations|called_computations|async_computation)=\{?([^,}]+(?:, ?%[^,}]+)*)"
)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """`shape`: HLO's text of the result's shape; `rest`: what follows the opcode, from the operands on."""

  name: str
  shape: str
  opcode: str
  rest: str

  @property
  def operands(self):
    return re.findall(r"%[\w.\-]+", _balanced(self.rest, 0))


@dataclasses.dataclass(frozen=True)
class Collective:
  """`size`: bytes of the largest array that it makes on a device; `times` it runs; `sent`: bytes that a device sends, each time."""

  kind: str
  axes: tuple[str, ...]
  size: int
  sent: float
  times: float


class Program:
  """An optimized HLO module. `sizes`: {mesh axis: devices}, in the mesh's order; `trips`: of loops without a constant;
  `taken`: how often the larger branch of a conditional is taken, in the order they stand in; default always."""

  def __init__(self, text, sizes, trips=1, taken=()):
    self.sizes, self.trips, self.taken, self.conditionals = sizes, trips, taken, 0
    self.computations, self.entry = _computations(text)
    self.times = dict.fromkeys(self.computations, 0)
    self._run(self.entry, 1)

  def _run(self, name, times):
    self.times[name] += times
    for i in self.computations[name]:
      if i.opcode == "while":
        condition, body = (re.search(rf"{key}=(%[\w.\-]+)", i.rest)[1] for key in ("condition", "body"))
        self._run(body, times * self._trips(condition))
      elif i.opcode == "conditional":
        branches = re.findall(
          r"%[\w.\-]+",
          re.search(r"(?:branch_computations=\{[^}]*\}|true_computation=.*?false_computation=%[\w.\-]+)", i.rest)[0],
        )
        share = self.taken[self.conditionals % len(self.taken)] if self.taken else 1
        self.conditionals += 1
        self._run(max(branches, key=lambda name: len(self.computations[name])), times * share)
      elif i.opcode in ("call", "call-start"):  # the latter on a sparse core, where libtpu puts messages of tpu7x
        self._run(re.search(r"to_apply=(%[\w.\-]+)", i.rest)[1], times)
      elif i.opcode != "custom-call":
        for names in _CALLED.findall(i.rest):
          for called in re.findall(r"%[\w.\-]+", names):
            self._run(called, times)

  def _trips(self, condition):
    """A counter from 0 is compared with a constant."""
    instructions = {i.name: i for i in self.computations[condition]}
    constants = [i for i in instructions.values() if i.opcode == "constant" and i.shape.startswith("s32[]")]
    return int(re.match(r"\((\d+)\)", constants[0].rest)[1]) if len(constants) == 1 else self.trips

  def collectives(self, rows_sent=1) -> list[Collective]:
    """Messages; of ragged ones the share `rows_sent` of the rows of their buffers is counted."""
    found = []
    for name, instructions in self.computations.items():
      for i in instructions:
        kind = i.opcode.removesuffix("-start")
        if kind in COLLECTIVES and self.times[name]:
          found.append(self._collective(kind, i, name, rows_sent))
    return found

  def between_slices(self):
    """[(computation, bytes)] of what leaves a slice for another, each time."""
    sends = [(name, i) for name, instructions in self.computations.items() for i in instructions if i.opcode == "send"]
    return [(name, _bytes(*_ARRAY.search(i.shape).groups())) for name, i in sends if "xla_megascale_runtime" in i.rest]

  def _collective(self, kind, i, computation, rows_sent):
    if computation.startswith("%all-reduce-scatter"):  # how XLA writes one for TPUs: with an all-reduce in a fusion
      kind = "reduce-scatter"
    axes = self._axes(i.rest)
    n = math.prod(self.sizes[axis] for axis in axes)
    arrays = [_bytes(*array) for array in _ARRAY.findall(i.shape)]
    result = sum(arrays) if "-start" not in i.opcode or kind == "all-reduce" else max(arrays)
    others = (n - 1) / n
    sent = {
      "all-gather": others * result, "all-reduce": 2 * others * result, "all-to-all": others * result,
      "reduce-scatter": others * result * (1 if i.opcode.startswith("all-reduce") else n),
      "collective-permute": result, "ragged-all-to-all": others * self._rows(i, computation, arrays) * rows_sent,
    }[kind]  # fmt: skip
    return Collective(kind, axes, max(arrays), sent, self.times[computation])

  def _rows(self, i, computation, arrays):
    """Bytes of the smaller buffer of a ragged message: the result, or the operand, whose shape a -start has too."""
    if i.opcode.endswith("-start"):
      return min(arrays[:2])
    operand = next(other for other in self.computations[computation] if other.name == i.operands[0])
    return min(arrays[0], _bytes(*_ARRAY.search(operand.shape).groups()))

  def _axes(self, rest):
    """The mesh axes along which the devices of a group differ."""
    places = np.unravel_index(np.asarray(self._group(rest)), tuple(self.sizes.values()))
    return tuple(axis for axis, place in zip(self.sizes, places, strict=True) if len(set(place.tolist())) > 1)

  def _group(self, rest):
    """Devices of a group, by their numbers in the mesh, in each of the forms in which HLO has them."""
    integers = lambda text: [int(n) for n in text.split(",")]
    if match := re.search(r"source_target_pairs=\{\{(\d+,\d+)\}", rest):
      return integers(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
      return integers(match[1])
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
      groups, dimensions, order = (integers(part) if part else None for part in match.groups())
      return np.arange(math.prod(dimensions)).reshape(dimensions).transpose(order).reshape(groups)[0]
    if match := re.search(r"replica_groups=mesh\[([^]]*)\](?:, device_ids=\((.*?)\))? ?\{([^}]*)\}", rest):
      names, sizes = zip(*re.findall(r"'(\w+)'=(\d+)", match[1]), strict=True)
      devices = np.arange(math.prod(map(int, sizes)))
      if match[2]:  # their order, such as [2,4]T(1,0)
        dimensions, order = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", match[2]).groups()
        devices = devices.reshape(integers(dimensions)).transpose(integers(order) if order else None)
      wanted = [slice(None) if name in re.findall(r"'(\w+)'", match[3]) else 0 for name in names]
      return devices.reshape([int(n) for n in sizes])[tuple(wanted)].ravel()
    return range(math.prod(self.sizes.values()))

  def product_flops(self, full_rows=1) -> float:
    """FLOPs of the products that a device does; of grouped ones the share `full_rows` of their rows is counted."""
    total = 0
    for name, instructions in self.computations.items():
      if times := self.times[name]:
        shapes = {i.name: i.shape for i in instructions}
        total += times * sum(_flops(i, shapes, full_rows) for i in instructions)
    return total


def _computations(text):
  """({name: [Instruction]}, name of the entry)."""
  computations, entry, current = {}, None, None
  for line in re.sub(r"\n(?=[^ %E}\n]|}[^\n])", " ", text).splitlines():  # attributes of kernels go on in the next line
    if current is None or not line.startswith(" "):
      head = _HEAD.match(line)
      current = computations.setdefault(head[1], []) if head and not line.startswith("HloModule") else None
      entry = head[1] if head and line.startswith("ENTRY") else entry
    elif match := _NAME.match(line):
      tail = line[match.end() :]
      shape = _balanced(tail, 0) if tail.startswith("(") else tail[: tail.index(" ")]
      opcode, _, rest = tail[len(shape) + 1 :].partition("(")
      current.append(Instruction(match[1], shape, opcode.strip(), "(" + rest))
  return computations, entry


def _balanced(text, start):
  """`text` from the parenthesis at `start` to the one that closes it."""
  depth = 0
  for place in range(start, len(text)):
    depth += (text[place] == "(") - (text[place] == ")")
    if not depth:
      return text[start : place + 1]
  return text[start:]


def _dimensions(text):
  return [int(n) for n in text.split(",") if n]


def _bytes(dtype, dimensions):
  bits = int(re.sub(r"\D", "", dtype.split("e")[0]) or 8)
  return math.prod(_dimensions(dimensions)) * max(bits // 8, 1)


def _first(shape):
  return _dimensions(_ARRAY.search(shape)[2])


def _flops(i, shapes, full_rows):
  if i.opcode == "dot":
    contracted = _dimensions(re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)[1])
    left = _first(shapes[i.operands[0]])
    return 2 * math.prod(_first(i.shape)) * math.prod(left[d] for d in contracted)
  if i.opcode == "convolution":
    return _convolution_flops(i, *(_first(shapes[name]) for name in i.operands[:2]))
  if i.opcode == "custom-call" and i.name.startswith("%ragged-dot") and "operand_layout_constraints" in i.rest:
    given = i.rest[i.rest.index("operand_layout_constraints") :].split("metadata=")[0]
    matrices = [dims for dims in map(_dimensions, (m[1] for m in _ARRAY.findall(given))) if len(dims) > 1]
    if len(matrices) < 2:
      return 0
    rows, k = matrices[0]
    return 2 * rows * k * matrices[1][-1] * full_rows
  if i.opcode == "custom-call" and (cost := _COST.search(i.rest)):
    return int(cost[1]) * (full_rows if kind_of_kernel(i.name[1:]) == "grouped product" else 1)
  return 0


def _convolution_flops(i, left, right):
  """Products become convolutions on TPUs, with batches and heads as windows: of each the valid places are counted."""
  inputs, kernel, output = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest).groups()
  out = _first(i.shape)
  window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", i.rest) or [""] * 2)[1]))
  spatial = [label for label in output if label.isdigit()]
  total = 2 * out[output.index("b")] * out[output.index("f")] * right[kernel.index("i")]
  for d, label in enumerate(spatial):
    field = lambda name, default: window[name].split("x")[d] if name in window else default  # noqa: B023
    low = int(field("pad", "0_0").split("_")[0])
    stride, dilate, spread = (int(field(name, 1)) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    length = (left[inputs.index(label)] - 1) * dilate + 1
    place = np.arange(out[output.index(label)])[:, None] * stride + np.arange(right[kernel.index(label)]) * spread - low
    total *= int(((place >= 0) & (place < length) & (place % dilate == 0)).sum())
  return total
