"""FLOPs of matmuls, and collectives by kind and mesh axes, read from a compiled program's optimized HLO.

XLA's own `cost_analysis` counts the body of a loop once. Here a computation counts as often as it runs: the loops that
JAX makes compare their counter with a constant.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from deepseek_jax.plan.count import kernel_kind

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w+)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"(?:ENTRY )?(%?[\w.\-]+) .*\{$")
_KERNEL_FLOPS = re.compile(r'"cost_estimate": ?\{[^}]*"flops":"?(\d+)')  # of a Pallas kernel, alone or in a fusion
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?(%[\w.\-]+) = ")
_NAME = re.compile(r"%[\w.\-]+")
_CALLED = re.compile(
  r"(?:calls|body|branch_computations|called_computations|async_computation)=\{?([^,}]+(?:, ?%[^,}]+)*)"
)
_BRANCHES = re.compile(r"(?:branch_computations=\{[^}]*\}|true_computation=.*?false_computation=%[\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
  """An HLO instruction, as text."""

  name: str
  shape: str  # of the result
  opcode: str
  rest: str  # what follows the opcode: operands in parentheses, then attributes

  @property
  def operands(self) -> list[str]:
    """Names of the operands."""
    return _NAME.findall(_parenthesized(self.rest))


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective of the program. Bytes are of one device and one execution."""

  kind: str  # one of COLLECTIVES
  axes: tuple[str, ...]  # mesh axes
  largest_array_bytes: int  # of the arrays in its result
  collective_bytes: float  # that the device sends
  count: float  # executions


class HloProgram:
  """An optimized HLO module, and in `counts` how often each of its computations runs."""

  def __init__(
    self, hlo: str, mesh_sizes: Mapping[str, int], trip_count: float = 1, branch_fractions: Sequence[float] = ()
  ):
    """Parses the module.

    Args:
      hlo: its text.
      mesh_sizes: {mesh axis: devices}, in the mesh's order.
      trip_count: of loops without a constant trip count.
      branch_fractions: how often the larger branch of each conditional runs, in program order. () is always.
    """
    self.mesh_sizes, self.trip_count, self.branch_fractions = mesh_sizes, trip_count, branch_fractions
    self.computations, self.entry = _parse_computations(hlo)
    self.counts: dict[str, float] = dict.fromkeys(self.computations, 0)
    self._num_conditionals = 0
    self._count_runs(self.entry, 1)

  def _count_runs(self, computation: str, count: float) -> None:
    """Adds `count` runs of a computation, and of those that it calls."""
    self.counts[computation] += count
    for i in self.computations[computation]:
      if i.opcode == "while":
        condition, body = (_search(rf"{key}=(%[\w.\-]+)", i.rest)[1] for key in ("condition", "body"))
        self._count_runs(body, count * self._trip_count(condition))
      elif i.opcode == "conditional":
        branches = _NAME.findall(_search(_BRANCHES, i.rest)[0])
        fractions = self.branch_fractions
        fraction = fractions[self._num_conditionals % len(fractions)] if fractions else 1
        self._num_conditionals += 1
        self._count_runs(max(branches, key=lambda name: len(self.computations[name])), count * fraction)
      elif i.opcode in (
        "call",
        "call-start",
      ):  # call-start is for a sparse core, where libtpu puts collectives of tpu7x
        self._count_runs(_search(r"to_apply=(%[\w.\-]+)", i.rest)[1], count)
      elif i.opcode != "custom-call":
        for names in _CALLED.findall(i.rest):
          for called in _NAME.findall(names):
            self._count_runs(called, count)

  def _trip_count(self, condition: str) -> float:
    """Trips of a loop whose condition compares a counter, which starts at 0, with a constant."""
    instructions = {i.name: i for i in self.computations[condition]}
    constants = [i for i in instructions.values() if i.opcode == "constant" and i.shape.startswith("s32[]")]
    return int(_search(r"^\((\d+)\)", constants[0].rest)[1]) if len(constants) == 1 else self.trip_count

  def collectives(self, ragged_fill: float = 1) -> list[Collective]:
    """Collectives that run. Of ragged ones, `ragged_fill` is the share of their buffer's rows that are sent."""
    collectives = []
    for name, instructions in self.computations.items():
      for i in instructions:
        kind = i.opcode.removesuffix("-start")
        if kind in COLLECTIVES and self.counts[name]:
          collectives.append(self._collective(kind, i, name, ragged_fill))
    return collectives

  def cross_slice_sends(self) -> list[tuple[str, int]]:
    """[(computation, bytes)] of what a device sends to another slice each time the computation runs."""
    sends = [(name, i) for name, instructions in self.computations.items() for i in instructions if i.opcode == "send"]
    return [(name, _first_array_bytes(i.shape)) for name, i in sends if "xla_megascale_runtime" in i.rest]

  def _collective(self, kind: str, i: Instruction, computation: str, ragged_fill: float) -> Collective:
    if computation.startswith("%all-reduce-scatter"):  # XLA for TPUs: a reduce-scatter is an all-reduce in a fusion
      kind = "reduce-scatter"
    axes = self._axes(i.rest)
    group_size = math.prod(self.mesh_sizes[axis] for axis in axes)
    array_bytes = [_array_bytes(*array) for array in _ARRAY.findall(i.shape)]
    # The shape of a -start has the operands too.
    result_bytes = sum(array_bytes) if "-start" not in i.opcode or kind == "all-reduce" else max(array_bytes)
    to_others = (group_size - 1) / group_size
    collective_bytes = {
      "all-gather": to_others * result_bytes, "all-reduce": 2 * to_others * result_bytes,
      "all-to-all": to_others * result_bytes, "collective-permute": result_bytes,
      "reduce-scatter": to_others * result_bytes * (1 if i.opcode.startswith("all-reduce") else group_size),
      "ragged-all-to-all": to_others * self._ragged_buffer_bytes(i, computation, array_bytes) * ragged_fill,
    }[kind]  # fmt: skip
    return Collective(kind, axes, max(array_bytes), collective_bytes, self.counts[computation])

  def _ragged_buffer_bytes(self, i: Instruction, computation: str, array_bytes: list[int]) -> int:
    """Bytes of the smaller buffer of a ragged all-to-all: its operand or its result. The shape of a -start has both."""
    if i.opcode.endswith("-start"):
      return min(array_bytes[:2])
    operand = next(other for other in self.computations[computation] if other.name == i.operands[0])
    return min(array_bytes[0], _first_array_bytes(operand.shape))

  def _axes(self, attributes: str) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ."""
    coordinates = np.unravel_index(np.asarray(self._device_group(attributes)), tuple(self.mesh_sizes.values()))
    return tuple(axis for axis, c in zip(self.mesh_sizes, coordinates, strict=True) if len(set(c.tolist())) > 1)

  def _device_group(self, attributes: str) -> Sequence[int] | np.ndarray:
    """Indices in the mesh of the devices of one group, from any of HLO's notations for groups."""
    if match := re.search(r"source_target_pairs=\{\{(\d+,\d+)\}", attributes):
      return _integers(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
      return _integers(match[1])
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
      group_shape, dims, order = _integers(match[1]), _integers(match[2]), _permutation(match[3])
      return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(group_shape)[0]
    if match := re.search(r"replica_groups=mesh\[([^]]*)\](?:, device_ids=\((.*?)\))? ?\{([^}]*)\}", attributes):
      names, sizes = zip(*re.findall(r"'(\w+)'=(\d+)", match[1]), strict=True)
      devices = np.arange(math.prod(map(int, sizes)))
      if match[2]:  # their order, such as [2,4]T(1,0)
        dims, order = _search(r"^\[([\d,]+)\](?:T\(([\d,]+)\))?$", match[2]).groups()
        devices = devices.reshape(_integers(dims)).transpose(_permutation(order))
      group_axes = re.findall(r"'(\w+)'", match[3])
      first_group = tuple(slice(None) if name in group_axes else 0 for name in names)
      return devices.reshape([int(n) for n in sizes])[first_group].ravel()
    return range(math.prod(self.mesh_sizes.values()))

  def matmul_flops(self, grouped_matmul_fill: float = 1) -> float:
    """FLOPs of a device's matmuls.

    Of grouped ones, `grouped_matmul_fill` is the share of their rows that hold tokens.
    """
    total: float = 0
    for name, instructions in self.computations.items():
      if count := self.counts[name]:
        shapes = {i.name: i.shape for i in instructions}
        total += count * sum(_instruction_flops(i, shapes, grouped_matmul_fill) for i in instructions)
    return total


def _search(pattern: str | re.Pattern, text: str) -> re.Match:
  """re.search where HLO always has a match."""
  match = re.search(pattern, text)
  if match is None:
    raise ValueError(f"unexpected HLO: no {pattern} in {text[:200]}")
  return match


def _parse_computations(hlo: str) -> tuple[dict[str, list[Instruction]], str]:
  """({name: instructions}, name of the entry)."""
  computations: dict[str, list[Instruction]] = {}
  entry, current = "", None
  for line in re.sub(r"\n(?=[^ %E}\n]|}[^\n])", " ", hlo).splitlines():  # attributes of kernels span several lines
    if current is None or not line.startswith(" "):
      head = _COMPUTATION.match(line)
      current = computations.setdefault(head[1], []) if head and not line.startswith("HloModule") else None
      entry = head[1] if head and line.startswith("ENTRY") else entry
    elif match := _INSTRUCTION.match(line):
      tail = line[match.end() :]
      shape = _parenthesized(tail) if tail.startswith("(") else tail[: tail.index(" ")]
      opcode, _, rest = tail[len(shape) + 1 :].partition("(")
      current.append(Instruction(match[1], shape, opcode.strip(), "(" + rest))
  return computations, entry


def _parenthesized(text: str) -> str:
  """`text`, which starts with a parenthesis, up to the one that closes it."""
  depth = 0
  for end, character in enumerate(text):
    depth += (character == "(") - (character == ")")
    if not depth:
      return text[: end + 1]
  return text


def _integers(text: str) -> list[int]:
  """The numbers of a list such as 8,128. Empty text is an empty list."""
  return [int(n) for n in text.split(",") if n]


def _permutation(text: str | None) -> list[int] | None:
  return _integers(text) if text else None


def _array_bytes(dtype: str, dims: str) -> int:
  bits = int(re.sub(r"\D", "", dtype.split("e")[0]) or 8)
  return math.prod(_integers(dims)) * max(bits // 8, 1)


def _first_array_bytes(shape: str) -> int:
  dtype, dims = _search(_ARRAY, shape).groups()
  return _array_bytes(dtype, dims)


def _first_dims(shape: str) -> list[int]:
  """Dimensions of the first array of a shape."""
  return _integers(_search(_ARRAY, shape)[2])


def _instruction_flops(i: Instruction, shapes: Mapping[str, str], grouped_matmul_fill: float) -> float:
  """FLOPs of one execution. `shapes`: {instruction: shape} of its computation."""
  if i.opcode == "dot":
    contracting_dims = _integers(_search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)[1])
    lhs = _first_dims(shapes[i.operands[0]])
    return 2 * math.prod(_first_dims(i.shape)) * math.prod(lhs[d] for d in contracting_dims)
  if i.opcode == "convolution":
    lhs, rhs = (_first_dims(shapes[name]) for name in i.operands[:2])
    return _convolution_flops(i, lhs, rhs)
  if i.opcode == "custom-call" and i.name.startswith("%ragged-dot") and "operand_layout_constraints" in i.rest:
    operands = i.rest[i.rest.index("operand_layout_constraints") :].split("metadata=")[0]
    matrices = [dims for dims in (_integers(array[1]) for array in _ARRAY.findall(operands)) if len(dims) > 1]
    if len(matrices) < 2:
      return 0
    rows, k = matrices[0]
    return 2 * rows * k * matrices[1][-1] * grouped_matmul_fill
  if i.opcode == "custom-call" and (match := _KERNEL_FLOPS.search(i.rest)):
    return int(match[1]) * (grouped_matmul_fill if kernel_kind(i.name[1:]) == "grouped matmul" else 1)
  return 0


def _convolution_flops(i: Instruction, lhs: list[int], rhs: list[int]) -> float:
  """FLOPs of a convolution: XLA for TPUs writes matmuls as such, with batch and heads as windows.

  Counts the positions of each window that are neither padding nor gaps of a dilation.
  """
  lhs_labels, rhs_labels, output_labels = _search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest).groups()
  output = _first_dims(i.shape)
  window_match = re.search(r"window=\{([^}]*)\}", i.rest)
  window = dict(re.findall(r"(\w+)=([\dx_\-]+)", window_match[1] if window_match else ""))
  spatial_labels = [label for label in output_labels if label.isdigit()]
  total = 2 * output[output_labels.index("b")] * output[output_labels.index("f")] * rhs[rhs_labels.index("i")]
  for d, label in enumerate(spatial_labels):
    padding = int(_window_field(window, "pad", d, "0_0").split("_")[0])
    stride = int(_window_field(window, "stride", d, "1"))
    lhs_dilation = int(_window_field(window, "lhs_dilate", d, "1"))
    rhs_dilation = int(_window_field(window, "rhs_dilate", d, "1"))
    length = (lhs[lhs_labels.index(label)] - 1) * lhs_dilation + 1
    output_starts = np.arange(output[output_labels.index(label)])[:, None] * stride
    position = output_starts + np.arange(rhs[rhs_labels.index(label)]) * rhs_dilation - padding
    total *= int(((position >= 0) & (position < length) & (position % lhs_dilation == 0)).sum())
  return total


def _window_field(window: Mapping[str, str], name: str, dim: int, default: str) -> str:
  """A convolution's window attribute, such as stride=1x2, of one spatial dimension."""
  return window[name].split("x")[dim] if name in window else default
