"""Weights that a run starts from: of a Hugging Face folder, or of a workdir of ours, placed on the mesh as they are read."""

import json
import pathlib

import jax
import numpy as np

from deepseek_jax.checkpoint.bucket import open_reader
from deepseek_jax.checkpoint.hf_files import HFReader
from deepseek_jax.checkpoint.hf_model import read_config
from deepseek_jax.checkpoint.hf_names import entries
from deepseek_jax.checkpoint.manager import CheckpointReader
from deepseek_jax.checkpoint.parts import tree_path
from deepseek_jax.config import Config
from deepseek_jax.distributed import broadcast_from_process0
from deepseek_jax.errors import CheckpointError
from deepseek_jax.schema import from_dict
from deepseek_jax.storage import is_url


def is_hugging_face(directory):
  """True for a folder with Hugging Face's config.json, False for a workdir with checkpoints; else CheckpointError.

  A URL is taken for a workdir: Hugging Face folders are read from disk alone.
  """
  if is_url(directory):
    return False
  directory = pathlib.Path(directory)
  try:
    hugging_face = "model_type" in json.loads((directory / "config.json").read_bytes())
  except (OSError, ValueError, TypeError):
    hugging_face = False
  if not hugging_face and not (directory / "checkpoints").is_dir():
    raise CheckpointError(
      f"{directory} is no checkpoint: expected a Hugging Face folder (config.json with a model_type, and *.safetensors) or "
      "a workdir of ours (checkpoints/)"
    )
  return hugging_face


def saved_config(reader: CheckpointReader, step) -> Config:
  """The config of the run that saved `step`."""
  return from_dict(Config, reader.meta(step)["config"])


class HuggingFaceWeights:
  """The weights of a Hugging Face folder; `model` is their ModelConfig."""

  def __init__(self, directory):
    self.directory, self.model = directory, read_config(directory)

  def load(self, abstract):
    """Arrays for `abstract`, {"params", "buffers"} of jax.ShapeDtypeStruct with NamedShardings, in its dtypes.

    Every tensor is read once (what multi-token prediction copies: once more, to compare), and the host holds one array of
    ours at a time. Raises CheckpointError that lists all
    tensors that do not fit.
    """
    reader, table = HFReader(self.directory), entries(self.model)
    reader.check(table)
    by_path = {}
    for entry in table:
      if not entry.copy:
        by_path.setdefault(tree_path(entry), []).append(entry)

    def leaf(path, wanted):
      return _place(reader, by_path[tuple(key.key for key in path)], wanted)

    arrays = jax.tree.map_with_path(leaf, abstract)
    reader.check_finite()
    return arrays


def _place(reader, table, wanted):
  """The array `wanted` from the tensors of `table`: what the devices of this process hold is filled tensor by tensor."""
  shards = {}
  for index in wanted.sharding.addressable_devices_indices_map(wanted.shape).values():
    bounds = _bounds(index, wanted.shape)  # replicas have one buffer
    shards[bounds] = np.empty([stop - start for start, stop in bounds], wanted.dtype)
  for entry in table:
    lead, tensor = len(entry.index), None
    for bounds, shard in shards.items():
      if all(start <= i < stop for i, (start, stop) in zip(entry.index, bounds, strict=False)):
        tensor = entry.to_ours(reader.read(entry.name)) if tensor is None else tensor
        here = tuple(i - start for i, (start, _) in zip(entry.index, bounds, strict=False))
        shard[here] = tensor[tuple(slice(*bound) for bound in bounds[lead:])]
  return jax.make_array_from_callback(wanted.shape, wanted.sharding, lambda index: shards[_bounds(index, wanted.shape)])


def _bounds(index, shape):
  return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


class WorkdirWeights:
  """The weights of the newest checkpoint of a workdir, a folder or a URL, that verifies, or of `step`; `model` is their ModelConfig."""

  def __init__(self, directory, step=None):
    self.directory, self._reader, self._step = directory, open_reader(directory), step
    steps = broadcast_from_process0(self._reader.steps)
    if not steps:
      raise CheckpointError(f"{directory} has no checkpoint yet: its run has to save one before another starts from it")
    # All steps of a workdir have the same model; which is the newest that verifies is known after reading it all.
    for candidate in reversed(steps) if step is None else [step]:
      try:
        self.model = saved_config(self._reader, candidate).model
        break
      except CheckpointError:
        if candidate in (step, steps[0]):
          raise

  def load(self, abstract):
    """As of a Hugging Face folder."""
    step = self._reader.latest() if self._step is None else self._step
    self._reader.meta(step)  # refuses a newer format
    saved = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, self.model.param_dtype, sharding=a.sharding), abstract)
    return jax.tree.map(lambda array, a: array.astype(a.dtype), self._reader.restore(step, saved), abstract)


def open_weights(directory):
  """The weights of `directory`, whose kind its content tells; only their config is read."""
  return HuggingFaceWeights(directory) if is_hugging_face(directory) else WorkdirWeights(directory)
