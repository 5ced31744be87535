"""Folders of safetensors files: checked and read one tensor at a time, written one tensor at a time."""

import contextlib
import json
import math
import os
import pathlib
import struct

import ml_dtypes
import numpy as np
import safetensors

from deepseek_jax.errors import CheckpointError

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
FP8 = "F8_E4M3"
SCALE = "_scale_inv"  # X.weight is FP8, X.weight_scale_inv has the factor of each of its blocks
BLOCK = 128
SHARD_BYTES = 5 * 10**9  # the most that a file holds, unless a single tensor is larger
# Old releases keep the rotary frequencies, which follow from the config; lm_head.weight is no entry only if it is tied.
IGNORED = ("rotary_emb.inv_freq", "lm_head.weight")


class HFReader:
  """The tensors of a Hugging Face folder. FP8 ones appear as float32, without the tensors of their scales.

  Raises CheckpointError for files that are missing, damaged, outside of the folder or not safetensors.

  Attributes:
    names: every tensor that can be asked for. non_finite: those that had an inf or NaN when they were read.
  """

  def __init__(self, directory):
    self.directory, self.non_finite, self._tensors = pathlib.Path(directory), [], {}
    for path in shards(self.directory):
      for name, tensor in read_header(path).items():
        if name in self._tensors:
          raise CheckpointError(f"{path} has {name}, and so has {self._tensors[name]['path'].name}: keep one of them")
        self._tensors[name] = tensor
    self.names = [name for name in self._tensors if not self._is_scale(name)]

  def _is_scale(self, name):
    return name.endswith(SCALE) and self._tensors.get(name.removesuffix(SCALE), {}).get("dtype") == FP8

  def shape(self, name):
    """Shape of what `read` gives, (out, in) of a matrix: that of the file's header."""
    return tuple(self._tensors[name]["shape"])

  def dtype(self, name):
    """NumPy dtype of what `read` gives."""
    code = self._tensors[name]["dtype"]
    return np.dtype(np.float32) if code == FP8 else DTYPES[code]

  def read(self, name, rows=slice(None)):
    """The tensor, or `rows` of its first dimension, as NumPy. What is not finite is noted in `non_finite`."""
    array = self._dequantised(name, rows)
    if name not in self.non_finite and not np.isfinite(array).all():
      self.non_finite.append(name)
    return array

  def _dequantised(self, name, rows):
    array = self._raw(name, rows)
    if self._tensors[name]["dtype"] == FP8:
      scales = np.repeat(self._raw(name + SCALE).astype(np.float32), BLOCK, 0)[: self.shape(name)[0]][rows]
      array = array.astype(np.float32)
      for block in range(scales.shape[1]):
        array[:, block * BLOCK : (block + 1) * BLOCK] *= scales[:, block : block + 1]
    return array

  def _raw(self, name, rows=slice(None)):
    tensor, shape = self._tensors[name], self.shape(name)
    dtype, start, count = DTYPES[tensor["dtype"]], 0, math.prod(shape)
    if rows != slice(None):
      first, last, _ = rows.indices(shape[0])
      row = count // shape[0]
      shape, start, count = (last - first, *shape[1:]), first * row, (last - first) * row
    # Not through the library: its NumPy side has no FP8, and older ones no bfloat16.
    return np.fromfile(tensor["path"], dtype, count, offset=tensor["offset"] + start * dtype.itemsize).reshape(shape)

  def check(self, entries):
    """Raises one CheckpointError that lists every tensor that is missing, extra, misshaped, or else not finite.

    Copies need not be there, and are not used; a note names those that differ from what they copy.
    """
    wanted, missing, misshaped = {entry.name: entry for entry in entries}, [], []
    for name, entry in wanted.items():
      if name not in self._tensors:
        missing += [] if entry.copy else [name]
      elif self._tensors[name]["dtype"] not in DTYPES:
        misshaped.append(f"{name} (dtype {self._tensors[name]['dtype']} where floating point is expected)")
      elif self.shape(name) != entry.shape:
        misshaped.append(f"{name} ({self.shape(name)} where {entry.shape} is expected)")
      elif self._tensors[name]["dtype"] == FP8:
        self._check_scale(name, missing, misshaped)
    # A layer without shared experts may come with their tensors of no elements.
    extra = [
      n for n in self.names if n not in wanted and not n.endswith(IGNORED) and math.prod(self.shape(n))
    ]  # fmt: skip
    if missing or misshaped or extra:
      bad = {*missing, *(m.split(" ")[0] for m in misshaped)}
      for name in wanted:
        if name in self._tensors and not bad & {name, name + SCALE}:
          self.read(name)
      raise self._error({"missing": missing, "not expected": extra, "of another shape or dtype": misshaped})
    self._note_copies(wanted.values())

  def _note_copies(self, entries):
    """Prints a line for every copy that is not equal to what it copies: an array of ours cannot be both."""
    main = {entry.path: entry.name for entry in entries if not entry.copy}
    for entry in entries:
      if entry.copy and entry.name in self._tensors:
        # In pieces: the embedding of V3 has 1.9 GB.
        pieces = [slice(start, start + 32 * BLOCK) for start in range(0, entry.shape[0], 32 * BLOCK)]
        both = ((self._dequantised(name, rows) for name in (entry.name, main[entry.path])) for rows in pieces)
        if not all(np.array_equal(*pair) for pair in both):
          print(f"note     {entry.name} differs from {main[entry.path]}, whose values are used for both")

  def _check_scale(self, name, missing, misshaped):
    shape, scale = self.shape(name), name + SCALE
    blocks = tuple(-(-size // BLOCK) for size in shape)
    if scale not in self._tensors:
      missing.append(scale)
    elif self.shape(scale) != blocks or self._tensors[scale]["dtype"] not in DTYPES:
      found = f"{self.shape(scale)} {self._tensors[scale]['dtype']}"
      misshaped.append(f"{scale} ({found} where {blocks} F32, a scale per {BLOCK}x{BLOCK} block, is expected)")

  def check_finite(self):
    """Raises one CheckpointError that lists every tensor read so far that had an inf or NaN."""
    if self.non_finite:
      raise self._error({})

  def _error(self, problems):
    lists = [(kind, names) for kind, names in (problems | {"not finite": self.non_finite}).items() if names]
    counts = ", ".join(f"{len(names)} {kind}" for kind, names in lists)
    lines = [f"\n{kind}: " + "\n  ".join(["", *names]) for kind, names in lists]
    return CheckpointError(
      f"{self.directory}: tensors that do not fit its config.json: {counts}. Mend the config or the files."
      + "".join(lines)
    )


def shards(directory):
  """Paths of the safetensors files of `directory`: the single one, or those that the index names."""
  if not directory.is_dir():
    raise CheckpointError(f"{directory} is not a folder: give one with config.json and *.safetensors files")
  if (directory / SINGLE).exists():
    return [directory / SINGLE]
  if not (directory / INDEX).exists():
    pickles = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth") for path in directory.glob(kind))
    advice = f"{pickles[0]} is a pickle, which can run code: save it as safetensors first" if pickles else "add one"
    raise CheckpointError(f"{directory} has neither {SINGLE} nor {INDEX}: {advice}")
  try:
    files = sorted(set(json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise CheckpointError(f"{directory / INDEX} is not an index with a weight_map: {error!r}") from None
  for name in files:
    if not isinstance(name, str) or pathlib.PurePath(name).name != name or "\\" in name:
      raise CheckpointError(f"{directory / INDEX} names {name!r}: files of a checkpoint must lie in its own folder")
    if not name.endswith(".safetensors"):
      raise CheckpointError(f"{directory / INDEX} names {name!r}: only safetensors files are read")
  lost = [name for name in files if not (directory / name).exists()]
  if lost:
    raise CheckpointError(f"{directory / INDEX} names files that are not there: {', '.join(lost)}; fetch them again")
  return [directory / name for name in files]


def read_header(path):
  """name -> {dtype, shape, path, offset in the file} of every tensor of a safetensors file, validated by the library."""
  try:
    with safetensors.safe_open(path, "np"):
      pass
    with open(path, "rb") as file:
      (size,) = struct.unpack("<Q", file.read(8))
      header = json.loads(file.read(size))
  except (safetensors.SafetensorError, OSError, ValueError) as error:
    raise CheckpointError(f"{path} is not a whole safetensors file: {error}; fetch it again") from None
  header.pop("__metadata__", None)
  return {
    name: {"dtype": t["dtype"], "shape": t["shape"], "path": path, "offset": 8 + size + t["data_offsets"][0]}
    for name, t in header.items()
  }


@contextlib.contextmanager
def replacing(directory, names):
  """Yields {name: path to write}; they become `names` in `directory`, in that order, when the block ends well.

  Raises CheckpointError where the disk refuses. Of a block that fails no file is left.
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


def write_tensors(directory, tensors, read, shard_bytes=None, config=None):
  """Writes a folder that transformers loads: one file, or several and their index.

  Args:
    tensors: (name, shape, NumPy dtype) of all tensors, in order. read: name -> array of that shape, cast to that dtype;
      called once for each, in order, so that one tensor is in memory at a time.
    shard_bytes: instead of SHARD_BYTES. config: what config.json is to hold; None: it is written apart, later.

  When all files are complete, what an earlier save left in the folder is deleted, its config.json first, and they get their
  names, config.json last: a folder in between is refused, and is no mixture of two.

  Raises CheckpointError where the disk refuses, or listing the tensors that are not finite in their dtype. The folder is
  as it was then, unless it is a renaming that the disk refuses.
  """
  directory, shard_bytes = pathlib.Path(directory), shard_bytes or SHARD_BYTES
  files, total = [[]], 0
  held = 0
  for name, shape, dtype in tensors:
    size = math.prod(shape) * dtype.itemsize
    if files[-1] and held + size > shard_bytes:
      files.append([])
      held = 0
    files[-1].append((name, tuple(shape), dtype))
    held, total = held + size, total + size
  several = len(files) > 1
  names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)] if several else [SINGLE]
  contents = dict(zip(names, files, strict=True))
  with replacing(directory, [*names, *[INDEX] * several, *[CONFIG] * (config is not None)]) as partial:
    bad = [n for file, content in contents.items() for n in write_file(partial[file], content, read)]
    if bad:
      raise CheckpointError(
        f"{len(bad)} tensors for {directory} are not finite in the dtype that they would have there: {', '.join(bad)}; "
        "mend them, or save in a wider dtype"
      )
    if several:
      weight_map = {name: file for file, content in contents.items() for name, _, _ in content}
      index = {"metadata": {"total_size": total}, "weight_map": weight_map}
      partial[INDEX].write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    if config is not None:
      partial[CONFIG].write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for old in [directory / CONFIG, directory / INDEX, *directory.glob("model*.safetensors")]:
      old.unlink(missing_ok=True)


def write_file(path, tensors, read):
  """One safetensors file: size of the header, header, tensors one after another. Returns the names of those not finite."""
  header, offset, bad = {"__metadata__": {"format": "pt"}}, 0, []
  for name, shape, dtype in tensors:
    end = offset + math.prod(shape) * dtype.itemsize
    header[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [offset, end]}
    offset = end
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)  # the data is aligned
  with open(path, "wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    for name, shape, dtype in tensors:
      with np.errstate(over="ignore"):
        array = np.ascontiguousarray(read(name), dtype)
      if array.shape != shape:
        raise ValueError(f"{name}: {array.shape} was read, {shape} announced")
      bad += [] if np.isfinite(array).all() else [name]
      file.write(array.reshape(-1).view(np.uint8).data)
    file.flush()
    os.fsync(file.fileno())
  return bad
