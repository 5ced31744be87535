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
from deepseek_jax.checkpoint.hf_config import to_json
from deepseek_jax.checkpoint.hf_files import CONFIG, HFReader, write_tensors
from deepseek_jax.checkpoint.hf_model import read_config, read_json
from deepseek_jax.checkpoint.hf_names import entries
from deepseek_jax.checkpoint.manager import FORMAT_VERSION, CheckpointReader
from deepseek_jax.checkpoint.model_args import TOKENIZERS
from deepseek_jax.checkpoint.parts import layout, parts, tree_path
from deepseek_jax.checkpoint.weights import is_hugging_face, saved_config
from deepseek_jax.config import TOKENIZER_SIZES, Config, DataConfig
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.errors import CheckpointError, DataError
from deepseek_jax.storage import is_url

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
ORIGINAL = "hugging_face"  # folder of a converted workdir: what its source says beside the weights, for the way back
GENERATION = "generation_config.json"
PRETRAINING_SEQ = 4096  # of every release; longer contexts are an extension


def convert(source, target, dtype="float32", tokenizer=""):
  """Writes the weights of `source` to the new folder `target` in the other form, and says so.

  Args:
    source: a Hugging Face folder, or a workdir of ours, of which the newest checkpoint counts: told by its content.
    target: must be missing or empty. It appears when it is complete.
    dtype: of the matrices and vectors of a Hugging Face folder that is written; a router bias is always float32.
    tokenizer: data.tokenizer of a workdir that is written; default: a copy of tokenizer.json of `source`, or by vocabulary.

  Raises CheckpointError, one for all tensors that are missing, not expected, misshaped or not finite.
  """
  if is_url(source) or is_url(target):
    raise CheckpointError(f"convert works on local folders: copy {source} to one, and what it writes to a bucket")
  source, started = pathlib.Path(source), time.monotonic()
  with new_folder(target) as folder:
    if is_hugging_face(source):
      written = to_ours(source, folder, pathlib.Path(os.path.abspath(target)), tokenizer)
    else:
      written = to_hugging_face(source, folder, DTYPES[dtype])
    moved = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
  print(f"wrote    {os.path.abspath(target)}: {written}, {moved / 1e9:.2f} GB in {time.monotonic() - started:.1f} s")


def to_ours(source, folder, target, tokenizer):
  """A workdir with one checkpoint, of step 0, that has parameters and buffers only. Returns what it is, in words.

  It is written to `folder`, which will become `target`.
  """
  model = read_config(source)
  copy_files(source, folder / ORIGINAL, (CONFIG, GENERATION, *(() if tokenizer else TOKENIZER_FILES)))
  config = Config(name=target.name, model=model, data=data_config(folder, target, model.vocab, tokenizer))
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
  by_name = {entry.name: entry for entry in table}

  def read(name):
    entry = by_name[name]
    tensor = np.empty(entry.shape, kept(entry))
    for rows, index, _ in parts(entry):
      part = arrays[tree_path(entry)][index].read().result()
      tensor[rows] = part.reshape(entry.shape[1], -1).T if entry.transposed else part
      advance(part.size)
    return tensor

  def kept(entry):
    return DTYPES["float32"] if entry.buffer else dtype

  kept_files, tokenizer = source / ORIGINAL, pathlib.Path(config.data.tokenizer)
  original = read_json(kept_files) if (kept_files / CONFIG).exists() else {}
  if original and (tokenizer.parent.name == ORIGINAL or str(tokenizer) == TOKENIZERS.get(model.vocab)):
    files = ((kept_files, (GENERATION, *TOKENIZER_FILES)),)
  else:  # another tokenizer than the source's, whose special ids hold no longer
    original |= special_ids(config.data.tokenizer)
    files = ((tokenizer.parent, TOKENIZER_FILES),) if tokenizer.name in TOKENIZER_FILES else ()
  config_json = to_json(model, dtype.name, original)
  with progress(table) as advance:
    write_tensors(folder, [(entry.name, entry.shape, kept(entry)) for entry in table], read, config=config_json)
  for place, names in files:
    copy_files(place, folder, names)
  return f"a Hugging Face folder of {len(table)} tensors in {dtype}, from step {step}"


def copy_files(source, folder, names):
  """Copies those of `names` that `source` has."""
  folder.mkdir(exist_ok=True)
  for file in (source / name for name in names):
    if file.is_file():
      shutil.copyfile(file, folder / file.name)


def special_ids(tokenizer):
  """What a config.json says of `tokenizer`: transformers would take 1 and 2 where it says nothing."""
  try:
    found = load_tokenizer(tokenizer)
  except DataError as error:
    print(f"note     config.json has no bos_token_id and no eos_token_id: {error}")
    return {}
  return {"bos_token_id": found.bos, "eos_token_id": found.eos}


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


def data_config(folder, target, vocab, tokenizer):
  """The data section of a converted checkpoint: the tokenizer that is given, or was copied, or is known by `vocab`."""
  place = pathlib.Path(ORIGINAL, TOKENIZER_FILES[0])
  name = tokenizer or (str(target / place) if (folder / place).exists() else TOKENIZERS.get(vocab, "byte"))
  if name == "byte" and vocab < TOKENIZER_SIZES[name]:
    print(
      f"note     no tokenizer is known for a vocabulary of {vocab}: give --tokenizer, or put one at {target / place}"
    )
    name = str(target / place)
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
