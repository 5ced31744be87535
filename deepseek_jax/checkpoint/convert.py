"""Checkpoints between Hugging Face's form and ours, a part of one tensor at a time."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import time

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from deepseek_jax.checkpoint import manifest
from deepseek_jax.checkpoint.arrays import ArrayWriter, open_arrays
from deepseek_jax.checkpoint.hf_config import read_config, write_config
from deepseek_jax.checkpoint.hf_files import HFReader, write_tensors
from deepseek_jax.checkpoint.hf_names import entries
from deepseek_jax.checkpoint.manager import FORMAT_VERSION, CheckpointReader
from deepseek_jax.checkpoint.model_args import TOKENIZERS
from deepseek_jax.checkpoint.parts import layout, parts, tree_path
from deepseek_jax.checkpoint.weights import is_hugging_face, saved_config
from deepseek_jax.config import TOKENIZER_SIZES, Config, DataConfig
from deepseek_jax.errors import CheckpointError

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
PRETRAINING_SEQ = 4096  # of every release; longer contexts are an extension


def convert(source, target, dtype="float32", tokenizer=""):
  """Writes the weights of `source` to the new folder `target` in the other form, and says so.

  Args:
    source: a Hugging Face folder, or a workdir of ours, of which the newest checkpoint counts: told by its content.
    target: must be missing or empty. It appears when it is complete.
    dtype: of the matrices and vectors of a Hugging Face folder that is written; a router bias is always float32.
    tokenizer: data.tokenizer of a workdir that is written; default: tokenizer.json of `source`, or by vocabulary.

  Raises CheckpointError, one for all tensors that are missing, not expected, misshaped or not finite.
  """
  source, started = pathlib.Path(source), time.monotonic()
  with new_folder(target) as folder:
    if is_hugging_face(source):
      written = to_ours(source, folder, pathlib.Path(target).absolute().name, tokenizer)
    else:
      written = to_hugging_face(source, folder, DTYPES[dtype])
    moved = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
  print(f"wrote    {os.path.abspath(target)}: {written}, {moved / 1e9:.2f} GB in {time.monotonic() - started:.1f} s")


def to_ours(source, folder, name, tokenizer):
  """A workdir with one checkpoint, of step 0, that has parameters and buffers only. Returns what it is, in words."""
  model = read_config(source)
  config = Config(name=name, model=model, data=data_config(source, model.vocab, tokenizer))
  step = folder / "checkpoints" / "0"
  table, reader = [entry for entry in entries(model) if not entry.copy], HFReader(source)
  reader.check(entries(model))
  with ArrayWriter(step / "state", layout(model)) as writer, progress(table) as advance:
    for entry in table:
      for rows, index, shape in parts(entry):
        tensor = reader.read(entry.name, rows).astype(np.float32, copy=False)
        writer.write(tree_path(entry), index, (tensor.T if entry.transposed else tensor).reshape(shape))
        advance(tensor.size)
  reader.check_finite()
  meta = {"format_version": FORMAT_VERSION, "config": dataclasses.asdict(config), "samples": 0, "weights_only": True}
  meta |= {"data_fingerprint": None, "tokenizer_fingerprint": None}
  (step / "meta").mkdir()
  (step / "meta" / "metadata").write_text(json.dumps(meta), encoding="utf-8")
  (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2), encoding="utf-8")
  manifest.write(step)
  return f"a workdir with the weights of {len(table)} tensors, data.tokenizer={config.data.tokenizer}"


def to_hugging_face(source, folder, dtype):
  """A folder that transformers loads, from the newest checkpoint that verifies. Returns what it is, in words."""
  reader = CheckpointReader(source)
  step = reader.latest()
  if step is None:
    raise CheckpointError(f"{source} has no checkpoint: --from takes a Hugging Face folder, or a workdir that has one")
  config = saved_config(reader, step)
  model, table = config.model, entries(config.model)
  arrays = {path: array for path, array in open_arrays(reader.state(step)).items() if path[0] in ("params", "buffers")}
  check_shapes(reader.state(step), arrays, layout(model))
  by_name, not_finite = {entry.name: entry for entry in table}, []

  def read(name):
    entry = by_name[name]
    tensor = np.empty(entry.shape, kept(entry))
    for rows, index, _ in parts(entry):
      part = arrays[tree_path(entry)][index].read().result()
      tensor[rows] = part.reshape(entry.shape[1], -1).T if entry.transposed else part
      advance(part.size)
    if not np.isfinite(tensor).all():
      not_finite.append(name)
    return tensor

  def kept(entry):
    return DTYPES["float32"] if entry.buffer else dtype

  write_config(model, folder, dtype.name)
  with progress(table) as advance:
    write_tensors(folder, [(entry.name, entry.shape, kept(entry)) for entry in table], read)
  if not_finite:
    raise CheckpointError(f"tensors of {reader.state(step)} that are not finite in {dtype}: {', '.join(not_finite)}")
  tokenizer = pathlib.Path(config.data.tokenizer)
  for file in (tokenizer.with_name(name) for name in TOKENIZER_FILES):
    if tokenizer.name in TOKENIZER_FILES and file.is_file():
      shutil.copy(file, folder)
  return f"a Hugging Face folder of {len(table)} tensors in {dtype}, from step {step}"


def check_shapes(where, arrays, wanted):
  """Raises CheckpointError that lists every array that is missing, not expected or of another shape."""
  have = {path: tuple(array.shape) for path, array in arrays.items()}
  want = {path: shape for path, (shape, _) in wanted.items()}
  wrong = [path for path in sorted(have.keys() | want.keys()) if have.get(path) != want.get(path)]
  if wrong:
    lines = [
      f"\n  {'/'.join(path)}: {have.get(path, 'missing')}, expected {want.get(path, 'nothing')}" for path in wrong
    ]
    raise CheckpointError(f"{where} does not hold what its config says: {len(wrong)} arrays differ" + "".join(lines))


def data_config(source, vocab, tokenizer):
  """The data section of a converted checkpoint: the tokenizer that is given, or found, or known by `vocab`."""
  found = source.absolute() / TOKENIZER_FILES[0]
  name = tokenizer or (str(found) if found.is_file() else TOKENIZERS.get(vocab, "byte"))
  if name == "byte" and vocab < TOKENIZER_SIZES[name]:
    print(f"note     no tokenizer is known for a vocabulary of {vocab}: give --tokenizer, or put one at {found}")
    name = str(found)
  if name not in TOKENIZER_SIZES:
    name = os.path.abspath(name)
  return DataConfig(tokenizer=name, seq=PRETRAINING_SEQ)


@contextlib.contextmanager
def new_folder(target):
  """Yields an empty folder beside `target` that gets its name when the block ends well, and is removed otherwise."""
  target = pathlib.Path(os.path.abspath(target))
  partial = target.with_name(target.name + ".partial")
  try:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
      raise CheckpointError(f"--to={target} exists and is not an empty folder: give another, or remove it")
    partial.mkdir(parents=True)
  except FileExistsError:
    raise CheckpointError(f"{partial} exists: a conversion is running, or was killed; in that case remove it") from None
  except OSError as error:
    raise CheckpointError(f"cannot write {error.filename}: {error.strerror}; give another --to") from None
  try:
    yield partial
    partial.rename(target)
  except OSError as error:
    raise CheckpointError(f"{error.filename or target}: {error.strerror}; nothing was written to {target}") from error
  finally:
    shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def progress(table):
  """Yields a function that takes the elements that were moved, of those of `table`; a bar on a terminal."""
  console = Console()
  columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
  with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
    task = bar.add_task("", total=4 * sum(np.prod(entry.shape) for entry in table))
    yield lambda elements: bar.update(task, advance=4 * elements)
