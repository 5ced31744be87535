"""Folders of safetensors files: checked and read one tensor at a time, written one tensor at a time."""

import contextlib
import json
import math
import os
import pathlib
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from deepseek_jax.checkpoint.hf_names import HEAD
from deepseek_jax.checkpoint.hf_tensor import HFTensor
from deepseek_jax.console import current_console
from deepseek_jax.errors import CheckpointError

CONFIG_FILE, SINGLE_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
DTYPES = {  # by their names in safetensors files
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FP8 = "F8_E4M3"
SCALE_SUFFIX = "_scale_inv"  # X.weight is FP8, X.weight_scale_inv has the scale of each of its blocks
FP8_BLOCK = 128
MAX_FILE_BYTES = 5 * 10**9  # of tensors in one file, unless a single tensor is larger
IGNORED_SUFFIX = "rotary_emb.inv_freq"  # in old releases; they follow from the config

# (name, shape, dtype) of a tensor to write, and the function that reads it by name.
TensorSpec = tuple[str, Sequence[int], np.dtype]
ReadTensor = Callable[[str], np.ndarray]


class HFReader:
  """The tensors of a Hugging Face folder. FP8 ones appear as float32, without the tensors of their scales.

  Raises CheckpointError for files that are missing, damaged, outside of the folder or not safetensors.

  Attributes:
    names: every tensor that can be read. non_finite: those that had an inf or NaN when they were read.
  """

  def __init__(self, directory: str | os.PathLike):
    self.directory = pathlib.Path(directory)
    self.non_finite: list[str] = []
    self._tensors: dict[str, dict[str, Any]] = {}
    for path in safetensors_files(self.directory):
      for name, tensor in read_header(path).items():
        if name in self._tensors:
          raise CheckpointError(f"{path} has {name}, and so has {self._tensors[name]['path'].name}: keep one of them")
        self._tensors[name] = tensor
    self.names: list[str] = [name for name in self._tensors if not self._is_scale(name)]

  def _is_scale(self, name: str) -> bool:
    return name.endswith(SCALE_SUFFIX) and self._tensors.get(name.removesuffix(SCALE_SUFFIX), {}).get("dtype") == FP8

  def shape(self, name: str) -> tuple[int, ...]:
    """Shape of the tensor, (out, in) of a matrix, from the file's header."""
    return tuple(self._tensors[name]["shape"])

  def dtype(self, name: str) -> np.dtype:
    """Dtype of the array that `read` returns."""
    code = self._tensors[name]["dtype"]
    return np.dtype(np.float32) if code == FP8 else DTYPES[code]

  def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
    """The tensor, or `rows` of its first dimension. Its name is added to `non_finite` if a value is not finite."""
    array = self._dequantize(name, rows)
    if name not in self.non_finite and not np.isfinite(array).all():
      self.non_finite.append(name)
    return array

  def _dequantize(self, name: str, rows: slice) -> np.ndarray:
    """The tensor, or `rows` of it; FP8 multiplied by the scales of its blocks, as float32."""
    array = self._raw(name, rows)
    if self._tensors[name]["dtype"] == FP8:
      scales = np.repeat(self._raw(name + SCALE_SUFFIX).astype(np.float32), FP8_BLOCK, 0)[: self.shape(name)[0]][rows]
      array = array.astype(np.float32)
      for block in range(scales.shape[1]):
        array[:, block * FP8_BLOCK : (block + 1) * FP8_BLOCK] *= scales[:, block : block + 1]
    return array

  def _raw(self, name: str, rows: slice = slice(None)) -> np.ndarray:
    """The tensor, or `rows` of it, as stored."""
    tensor, shape = self._tensors[name], self.shape(name)
    dtype, start, count = DTYPES[tensor["dtype"]], 0, math.prod(shape)
    if rows != slice(None):
      first, last, _ = rows.indices(shape[0])
      row_size = count // shape[0]
      shape, start, count = (last - first, *shape[1:]), first * row_size, (last - first) * row_size
    # Not through the library: its NumPy side has no FP8, and older ones no bfloat16.
    return np.fromfile(tensor["path"], dtype, count, offset=tensor["offset"] + start * dtype.itemsize).reshape(shape)

  def check_tensors(self, expected_tensors: Sequence[HFTensor]) -> None:
    """Raises one CheckpointError that lists every missing, unexpected or misshaped tensor, and then non-finite ones.

    Copies may be missing, and are not used. A printed note names those that differ from their original.
    """
    expected = {tensor.name: tensor for tensor in expected_tensors}
    missing: list[str] = []
    misshaped: list[str] = []
    for name, tensor in expected.items():
      if name not in self._tensors:
        missing += [] if tensor.is_copy else [name]
      elif self._tensors[name]["dtype"] not in DTYPES:
        misshaped.append(f"{name} (dtype {self._tensors[name]['dtype']} where floating point is expected)")
      elif self.shape(name) != tensor.shape:
        misshaped.append(f"{name} ({self.shape(name)} where {tensor.shape} is expected)")
      elif self._tensors[name]["dtype"] == FP8:
        self._check_scale(name, missing, misshaped)
    # The head is only unexpected if it is tied, and then it equals the embedding (`read_model_config`). A layer without
    # shared experts may come with their tensors of no elements.
    unexpected = [
      name
      for name in self.names
      if name not in expected and name != HEAD and not name.endswith(IGNORED_SUFFIX) and math.prod(self.shape(name)) > 0
    ]
    if missing or misshaped or unexpected:
      bad = {*missing, *(m.split(" ")[0] for m in misshaped)}
      for name in expected:
        if name in self._tensors and not bad & {name, name + SCALE_SUFFIX}:
          self.read(name)
      raise self._error({"missing": missing, "not expected": unexpected, "of another shape or dtype": misshaped})
    self._print_different_copies(expected_tensors)

  def _print_different_copies(self, tensors: Sequence[HFTensor]) -> None:
    """Prints a line for every copy that differs from its original: there is one parameter for both."""
    originals = {tensor.path: tensor.name for tensor in tensors if not tensor.is_copy}
    for tensor in tensors:
      if tensor.is_copy and tensor.name in self._tensors:
        original = originals[tensor.path]
        if not self.are_equal(tensor.name, original):
          current_console().print(f"note     {tensor.name} differs from {original}, whose values are used for both")

  def are_equal(self, name: str, other: str) -> bool:
    """Whether two tensors have the same shape and values; False where one of them cannot be read."""
    if self.shape(name) != self.shape(other) or not (self._is_readable(name) and self._is_readable(other)):
      return False
    # A slice of rows at a time: the embedding of V3 has 1.9 GB.
    slices = [slice(start, start + 32 * FP8_BLOCK) for start in range(0, self.shape(name)[0], 32 * FP8_BLOCK)]
    return all(np.array_equal(self._dequantize(name, rows), self._dequantize(other, rows)) for rows in slices)

  def _is_readable(self, name: str) -> bool:
    """Whether the dtype of the tensor is one of DTYPES, and an FP8 one has scales of the right shape."""
    if self._tensors[name]["dtype"] != FP8:
      return self._tensors[name]["dtype"] in DTYPES
    problems: list[str] = []
    self._check_scale(name, problems, problems)
    return not problems

  def _check_scale(self, name: str, missing: list[str], misshaped: list[str]) -> None:
    """Adds the tensor of the scales of the FP8 tensor `name` to `missing` or `misshaped`, if it is."""
    shape, scale = self.shape(name), name + SCALE_SUFFIX
    blocks = tuple(-(-size // FP8_BLOCK) for size in shape)
    if scale not in self._tensors:
      missing.append(scale)
    elif self.shape(scale) != blocks or self._tensors[scale]["dtype"] not in DTYPES:
      actual = f"{self.shape(scale)} {self._tensors[scale]['dtype']}"
      misshaped.append(f"{scale} ({actual} where {blocks} F32, a scale per {FP8_BLOCK}x{FP8_BLOCK} block, is expected)")

  def check_finite(self) -> None:
    """Raises one CheckpointError that lists every tensor read so far that had an inf or NaN."""
    if self.non_finite:
      raise self._error({})

  def _error(self, problems: dict[str, list[str]]) -> CheckpointError:
    lists = [(kind, names) for kind, names in (problems | {"not finite": self.non_finite}).items() if names]
    counts = ", ".join(f"{len(names)} {kind}" for kind, names in lists)
    lines = [f"\n{kind}: " + "\n  ".join(["", *names]) for kind, names in lists]
    return CheckpointError(
      f"{self.directory}: tensors that do not fit its config.json: {counts}. Correct the config or the files."
      + "".join(lines)
    )


def safetensors_files(directory: pathlib.Path) -> list[pathlib.Path]:
  """Paths of the safetensors files of `directory`: the single one, or those that the index names.

  Raises CheckpointError where there are none, or the index names files that may not be read.
  """
  if not directory.is_dir():
    raise missing_folder(directory)
  if (directory / SINGLE_FILE).exists():
    return [directory / SINGLE_FILE]
  if not (directory / INDEX_FILE).exists():
    pickles = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth") for path in directory.glob(kind))
    advice = f"{pickles[0]} is a pickle, which can run code: save it as safetensors first" if pickles else "add one"
    raise CheckpointError(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}: {advice}")
  try:
    files = sorted(set(json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"].values()))
  except OSError as error:
    raise CheckpointError(f"{directory / INDEX_FILE} cannot be read: {error.strerror}; download it again") from None
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise CheckpointError(f"{directory / INDEX_FILE} is not an index with a weight_map: {error!r:.200}") from None
  for name in files:
    if not isinstance(name, str) or pathlib.PurePath(name).name != name or "\\" in name:
      raise CheckpointError(
        f"{directory / INDEX_FILE} names {name!r}: files of a checkpoint must lie in its own folder"
      )
    if not name.endswith(".safetensors"):
      raise CheckpointError(f"{directory / INDEX_FILE} names {name!r}: only safetensors files are read")
  missing = [name for name in files if not (directory / name).exists()]
  if missing:
    raise CheckpointError(
      f"{directory / INDEX_FILE} names files that are not there: {', '.join(missing)}; download them again"
    )
  return [directory / name for name in files]


def missing_folder(directory: str | os.PathLike) -> CheckpointError:
  """The error for a `directory` that is no folder, which may be meant as a model's name on the Hugging Face hub."""
  text, hub = str(directory), ""
  if re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", text) and not os.path.exists(text):
    target = text.rpartition("/")[2]
    hub = f"; if that is a name on the Hugging Face hub, download it first: hf download {text} --local-dir {target}"
  return CheckpointError(f"{text} is not a folder: give the one with config.json and *.safetensors files{hub}")


def read_header(path: pathlib.Path) -> dict[str, dict[str, Any]]:
  """name -> {dtype, shape, path, offset in the file} of every tensor of a safetensors file, validated by the library.

  Raises CheckpointError for a file that is damaged or not of this format.
  """
  try:
    with safetensors.safe_open(path, "np"):
      pass
    with open(path, "rb") as file:
      (size,) = struct.unpack("<Q", file.read(8))
      header = json.loads(file.read(size))
  except (safetensors.SafetensorError, OSError, ValueError) as error:
    raise CheckpointError(f"{path} is not a complete safetensors file: {error}; download it again") from None
  header.pop("__metadata__", None)
  return {
    name: {"dtype": t["dtype"], "shape": t["shape"], "path": path, "offset": 8 + size + t["data_offsets"][0]}
    for name, t in header.items()
  }


@contextlib.contextmanager
def replace_files(directory: str | os.PathLike, names: Sequence[str]) -> Iterator[dict[str, pathlib.Path]]:
  """Yields {name: temporary path to write}. After the block they are renamed to `names` in `directory`, in that order.

  Raises CheckpointError where the disk refuses. After an error in the block no file is left.
  """
  directory = pathlib.Path(directory)
  partial = {name: directory / (name + ".tmp") for name in names}
  try:
    directory.mkdir(parents=True, exist_ok=True)
    yield partial
    for name, path in partial.items():
      os.replace(path, directory / name)
  except OSError as error:
    raise CheckpointError(
      f"cannot write {error.filename or directory}: {error.strerror}; make room, or choose another folder"
    ) from error
  finally:
    for path in partial.values():
      with contextlib.suppress(OSError):
        path.unlink()


def write_tensors(
  directory: str | os.PathLike,
  tensors: Sequence[TensorSpec],
  read: ReadTensor,
  max_file_bytes: int | None = None,
  config: dict[str, Any] | None = None,
) -> None:
  """Writes a folder that transformers loads: one file, or several and their index.

  Args:
    tensors: (name, shape, dtype) of all tensors, in order.
    read: name -> array of that shape, cast to that dtype. It is called once for each, in order, so that one tensor is
      in memory at a time.
    max_file_bytes: instead of MAX_FILE_BYTES.
    config: content of config.json; None: the caller writes it later.

  When all files are complete, those of an earlier save in the folder are deleted, config.json first. Then the new files
  are renamed, config.json last. So a folder without all its files has no config.json, and is refused.

  Raises CheckpointError where the disk refuses, or listing the tensors that are not finite in their dtype. The folder
  is unchanged then, unless it is a rename that failed.
  """
  directory, max_file_bytes = pathlib.Path(directory), max_file_bytes or MAX_FILE_BYTES
  files: list[list[TensorSpec]] = [[]]
  file_bytes = total_bytes = 0
  for name, shape, dtype in tensors:
    size = math.prod(shape) * dtype.itemsize
    if files[-1] and file_bytes + size > max_file_bytes:
      files.append([])
      file_bytes = 0
    files[-1].append((name, tuple(shape), dtype))
    file_bytes, total_bytes = file_bytes + size, total_bytes + size
  several = len(files) > 1
  names = [SINGLE_FILE]
  if several:
    names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
  contents = dict(zip(names, files, strict=True))
  all_names = [*names, *([INDEX_FILE] if several else []), *([CONFIG_FILE] if config is not None else [])]
  with replace_files(directory, all_names) as partial:
    non_finite = [n for file, content in contents.items() for n in write_safetensors(partial[file], content, read)]
    if non_finite:
      raise CheckpointError(
        f"{len(non_finite)} tensors for {directory} are not finite in the dtype that they would have there: "
        f"{', '.join(non_finite)}; correct them, or save in a wider dtype"
      )
    if several:
      weight_map = {name: file for file, content in contents.items() for name, _, _ in content}
      index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
      partial[INDEX_FILE].write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    if config is not None:
      partial[CONFIG_FILE].write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for old in [directory / CONFIG_FILE, directory / INDEX_FILE, *directory.glob("model*.safetensors")]:
      old.unlink(missing_ok=True)


def write_safetensors(path: pathlib.Path, tensors: Sequence[TensorSpec], read: ReadTensor) -> list[str]:
  """Writes one safetensors file: size of the header, header, tensors one after another.

  Args are as those of `write_tensors`. Returns the names of the tensors that are not finite.
  """
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  offset = 0
  non_finite: list[str] = []
  for name, shape, dtype in tensors:
    end = offset + math.prod(shape) * dtype.itemsize
    header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [offset, end]}
    offset = end
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)  # the data is aligned
  with open(path, "wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    for name, shape, dtype in tensors:
      with np.errstate(over="ignore"):
        array = np.ascontiguousarray(read(name), dtype)
      if array.shape != shape:
        raise ValueError(f"{name}: {array.shape} was read, {shape} is in the header")
      non_finite += [] if np.isfinite(array).all() else [name]
      file.write(array.reshape(-1).view(np.uint8).data)
    file.flush()
    os.fsync(file.fileno())
  return non_finite
