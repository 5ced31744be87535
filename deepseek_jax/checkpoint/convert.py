"""Converts checkpoints from Hugging Face folders to workdirs and back, a chunk of one tensor at a time."""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from deepseek_jax.checkpoint import manifest
from deepseek_jax.checkpoint.arrays import ArrayWriter, open_arrays
from deepseek_jax.checkpoint.chunks import shapes_and_chunks, tensor_chunks, tree_path
from deepseek_jax.checkpoint.compatibility import array_shapes
from deepseek_jax.checkpoint.hf_config import to_hf_config
from deepseek_jax.checkpoint.hf_files import CONFIG_FILE, HFReader, write_tensors
from deepseek_jax.checkpoint.hf_model import read_model_config
from deepseek_jax.checkpoint.hf_names import hf_tensors
from deepseek_jax.checkpoint.hf_tensor import HFTensor
from deepseek_jax.checkpoint.hf_tokenizer import (
  CODE_FILES,
  GENERATION_FILE,
  HF_FILES_FOLDER,
  TOKENIZER_FILES,
  copy_exported_files,
  copy_files,
  exported_files,
  imported_tokenizer,
)
from deepseek_jax.checkpoint.manager import FORMAT_VERSION, CheckpointReader
from deepseek_jax.checkpoint.tree import TreePath
from deepseek_jax.checkpoint.weights import is_hugging_face, saved_config
from deepseek_jax.config import Config
from deepseek_jax.config_sections import DataConfig
from deepseek_jax.console import format_bytes
from deepseek_jax.errors import CheckpointError, ConfigError
from deepseek_jax.flags import write_config
from deepseek_jax.storage import is_url

EXPORT_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
PRETRAINING_SEQ = 4096  # of every release; longer contexts are an extension


def convert(source: str | os.PathLike, target: str | os.PathLike, dtype: str = "float32", tokenizer: str = "") -> None:
  """Writes the weights of `source` to the new folder `target` in the other format, and prints what was written.

  Args:
    source: a Hugging Face folder, or a workdir, whose newest checkpoint is converted. Its content tells which it is.
    target: must be missing or empty. It appears when it is complete.
    dtype: a key of EXPORT_DTYPES, for the tensors of a new Hugging Face folder; a router bias is always float32.
    tokenizer: data.tokenizer of a new workdir. Default: a copy of the tokenizer.json of `source`, or DeepSeek's for
      this size of the vocabulary, or none.

  Raises CheckpointError, one for all tensors that are missing, not expected, misshaped or not finite, and for a
  tokenizer with ids that the model does not have; DataError for a `tokenizer` that cannot be loaded;
  ConfigError for a `dtype` or `tokenizer` that is for the other direction.
  """
  if is_url(source) or is_url(target):
    raise CheckpointError(f"convert works on local folders: copy {source} to one, and what it writes to a bucket")
  source, started = pathlib.Path(source), time.monotonic()
  hugging_face = is_hugging_face(source)
  if tokenizer and not hugging_face:
    raise ConfigError(
      f"--tokenizer={tokenizer} is for a new workdir, and {source} is one: an export has that of the run"
    )
  if dtype != "float32" and hugging_face:
    raise ConfigError(f"--dtype={dtype} is for a new Hugging Face folder, and {source} is one: workdirs are in float32")
  with new_folder(target) as folder:
    if hugging_face:
      description = import_hugging_face(source, folder, pathlib.Path(os.path.abspath(target)), tokenizer)
    else:
      description = export_hugging_face(source, folder, EXPORT_DTYPES[dtype])
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
  print(
    f"wrote    {os.path.abspath(target)}: {description}, {format_bytes(size)} in {time.monotonic() - started:.1f} s"
  )


def import_hugging_face(source: pathlib.Path, folder: pathlib.Path, target: pathlib.Path, tokenizer: str) -> str:
  """Writes a workdir with one checkpoint, of step 0, of parameters and buffers only. Returns a description of it.

  It is written to `folder`, which will be renamed to `target`.
  """
  model = read_model_config(source)
  data = DataConfig(tokenizer=imported_tokenizer(source, target, model.vocab, tokenizer), seq=PRETRAINING_SEQ)
  config = Config(name=target.name, model=model, data=data)
  hf_files = (CONFIG_FILE, GENERATION_FILE, *CODE_FILES, *(() if tokenizer else TOKENIZER_FILES))
  copy_files(source, folder / HF_FILES_FOLDER, hf_files)
  step = folder / "checkpoints" / "0"
  reader = HFReader(source)
  reader.check_tensors(hf_tensors(model))
  tensors = [tensor for tensor in hf_tensors(model) if not tensor.is_copy]
  with ArrayWriter(step / "state", shapes_and_chunks(model)) as writer, progress_bar(tensors) as advance:
    for tensor in tensors:
      for rows, index, shape in tensor_chunks(tensor):
        value = reader.read(tensor.name, rows).astype(np.float32, copy=False)
        writer.write(tree_path(tensor), index, (value.T if tensor.transposed else value).reshape(shape))
        advance(value.size)
  reader.check_finite()
  meta = {"format_version": FORMAT_VERSION, "config": dataclasses.asdict(config), "samples": 0, "tokens": 0}
  meta |= {"data_fingerprint": None, "tokenizer_fingerprint": None, "weights_only": True}
  (step / "meta").mkdir()
  (step / "meta" / "metadata").write_text(json.dumps(meta), encoding="utf-8")
  write_config(config, folder)
  manifest.write_manifest(step)
  return f"a workdir with the weights of {len(tensors)} tensors, data.tokenizer={config.data.tokenizer}"


def export_hugging_face(source: pathlib.Path, folder: pathlib.Path, dtype: np.dtype) -> str:
  """Writes a folder that transformers loads, from the newest checkpoint that verifies. Returns a description of it."""
  reader = CheckpointReader(source)
  step = reader.latest()
  if step is None:
    raise CheckpointError(f"{source} has no checkpoint: --from takes a Hugging Face folder, or a workdir that has one")
  config = saved_config(reader, step)
  model, tensors = config.model, hf_tensors(config.model)
  state = reader.state_folder(step)
  arrays = {path: array for path, array in open_arrays(state).items() if path[0] in ("params", "buffers")}
  check_shapes(state, {path: array.shape for path, array in arrays.items()}, array_shapes(model))
  by_name = {tensor.name: tensor for tensor in tensors}

  def export_dtype(tensor: HFTensor) -> np.dtype:
    return EXPORT_DTYPES["float32"] if tensor.buffer else dtype

  def read(name: str) -> np.ndarray:
    tensor = by_name[name]
    value = np.empty(tensor.shape, export_dtype(tensor))
    for rows, index, _ in tensor_chunks(tensor):
      chunk = arrays[tree_path(tensor)][index].read().result()
      value[rows] = chunk.reshape(tensor.shape[1], -1).T if tensor.transposed else chunk
      advance(chunk.size)
    return value

  original, copies = exported_files(source, config.data.tokenizer, model)
  config_json = to_hf_config(model, dtype.name, original)
  with progress_bar(tensors) as advance:
    specs = [(tensor.name, tensor.shape, export_dtype(tensor)) for tensor in tensors]
    write_tensors(folder, specs, read, config=config_json)
  copy_exported_files(copies, config.data.tokenizer, folder)
  return f"a Hugging Face folder of {len(tensors)} tensors in {dtype}, from step {step}"


def check_shapes(
  where: pathlib.Path,
  shapes: Mapping[TreePath, tuple[int, ...]],
  expected: Mapping[TreePath, tuple[int, ...]],
) -> None:
  """Raises CheckpointError that lists every array that is missing, not expected or of another shape."""
  actual = {path: tuple(shape) for path, shape in shapes.items()}
  wrong = [path for path in sorted(actual.keys() | expected.keys()) if actual.get(path) != expected.get(path)]
  if wrong:
    lines = [
      f"\n  {'/'.join(path)}: {actual.get(path, 'missing')}, expected {expected.get(path, 'nothing')}" for path in wrong
    ]
    raise CheckpointError(f"{where} does not match its config: {len(wrong)} arrays differ" + "".join(lines))


@contextlib.contextmanager
def new_folder(target: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Yields an empty folder beside `target`. It is renamed to `target` after the block, or removed after an error.

  Raises CheckpointError where `target` exists and is not empty, or the disk refuses.
  """
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
def progress_bar(tensors: Sequence[HFTensor]) -> Iterator[Callable[[int], None]]:
  """Yields a function that takes the number of elements of `tensors` that were converted; a bar on a terminal."""
  console = Console()
  columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
  with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
    task = bar.add_task("", total=4 * sum(math.prod(tensor.shape) for tensor in tensors))
    yield lambda elements: bar.update(task, advance=4 * elements)
