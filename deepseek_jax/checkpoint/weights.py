"""Weights that a run starts from: of a Hugging Face folder or another run's workdir, read straight onto the mesh."""

import json
import os
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from deepseek_jax.checkpoint.bucket import open_reader
from deepseek_jax.checkpoint.chunks import tree_path
from deepseek_jax.checkpoint.compatibility import check_weights_fit
from deepseek_jax.checkpoint.hf_files import CONFIG_FILE, HFReader, missing_folder
from deepseek_jax.checkpoint.hf_model import read_model_config
from deepseek_jax.checkpoint.hf_names import hf_tensors
from deepseek_jax.checkpoint.hf_tensor import HFTensor
from deepseek_jax.checkpoint.hf_tokenizer import TOKENIZER_FILE
from deepseek_jax.checkpoint.manager import CheckpointReader
from deepseek_jax.config import Config
from deepseek_jax.console import current_console
from deepseek_jax.data.tokenizer import Tokenizer, load_tokenizer
from deepseek_jax.distributed import broadcast_from_process0
from deepseek_jax.errors import CheckpointError, ConfigError, DataError
from deepseek_jax.schema import from_dict
from deepseek_jax.storage import is_url
from deepseek_jax.typing import PyTree

Bounds = tuple[tuple[int, int], ...]  # (start, stop) along each axis


def is_hugging_face(directory: str | os.PathLike) -> bool:
  """Whether `directory` has the config.json of a Hugging Face model; False for a workdir with checkpoints.

  A URL counts as a workdir: Hugging Face folders are only read from disk. Raises CheckpointError for any other folder.
  """
  if is_url(directory):
    return False
  directory = pathlib.Path(directory)
  if not directory.is_dir():
    raise missing_folder(directory)
  hugging_face = has_hf_config(directory)
  if not hugging_face and not (directory / "checkpoints").is_dir():
    raise CheckpointError(
      f"{directory} is no checkpoint: expected a Hugging Face folder (config.json with a model_type, and *.safetensors) or "
      "the workdir of a run (checkpoints/)"
    )
  return hugging_face


def has_hf_config(directory: str | os.PathLike) -> bool:
  """Whether `directory` is a folder with the config.json of a Hugging Face model."""
  try:
    return "model_type" in json.loads((pathlib.Path(directory) / CONFIG_FILE).read_bytes())
  except (OSError, ValueError, TypeError, RecursionError):
    return False


def refuse_hf_workdir(workdir: str | os.PathLike) -> None:
  """Raises ConfigError where `workdir` is a Hugging Face folder: the config.json of a run would take the place of its own."""
  if has_hf_config(workdir):
    raise ConfigError(
      f"--workdir={workdir} is a Hugging Face folder, and a run has a config.json of its own there: give another workdir; "
      f"--config.init_from={workdir} starts from its weights, and python -m deepseek_jax.checkpoint convert makes a workdir of it"
    )


def saved_config(reader: CheckpointReader, step: int) -> Config:
  """The config of the run that saved `step`."""
  return from_dict(Config, reader.meta(step)["config"])


class HuggingFaceWeights:
  """The weights of a Hugging Face folder; `model` is their ModelConfig."""

  def __init__(self, directory: str | os.PathLike):
    self.directory, self.model = directory, read_model_config(directory)

  def tokenizer_fingerprint(self) -> str | None:
    """Of the tokenizer.json beside the weights; None where there is none, or it cannot be loaded."""
    return _fingerprint(pathlib.Path(self.directory) / TOKENIZER_FILE)

  def load(self, abstract: PyTree) -> PyTree:
    """Arrays for `abstract`, {"params", "buffers"} of jax.ShapeDtypeStruct with NamedShardings, in its dtypes.

    Every tensor is read once; those that multi-token prediction copies are read again, to be compared. The host holds
    one parameter (of all layers and experts) at a time. Raises CheckpointError that lists all tensors that do not fit.
    """
    reader, tensors = HFReader(self.directory), hf_tensors(self.model)
    reader.check_tensors(tensors)
    by_path: dict[tuple[str, ...], list[HFTensor]] = {}
    for tensor in tensors:
      if not tensor.is_copy:
        by_path.setdefault(tree_path(tensor), []).append(tensor)

    def leaf(path: tuple[jax.tree_util.DictKey, ...], leaf_abstract: jax.ShapeDtypeStruct) -> jax.Array:
      return _place(reader, by_path[tuple(key.key for key in path)], leaf_abstract)

    arrays = jax.tree.map_with_path(leaf, abstract)
    reader.check_finite()
    return arrays


def _place(reader: HFReader, tensors: Sequence[HFTensor], abstract: jax.ShapeDtypeStruct) -> jax.Array:
  """The array `abstract` from its `tensors`: the shards of this process's devices are filled tensor by tensor."""
  shape, sharding = abstract.shape, abstract.sharding
  assert sharding is not None
  shards: dict[Bounds, np.ndarray] = {}
  for index in sharding.addressable_devices_indices_map(shape).values():
    bounds = _bounds(index, shape)  # replicas have one buffer
    shards[bounds] = np.empty([stop - start for start, stop in bounds], abstract.dtype)
  for tensor in tensors:
    num_leading, value = len(tensor.index), None
    for bounds, shard in shards.items():
      leading = list(zip(tensor.index, bounds[:num_leading], strict=True))
      if all(start <= i < stop for i, (start, stop) in leading):
        value = tensor.to_param(reader.read(tensor.name)) if value is None else value
        local_index = tuple(i - start for i, (start, _) in leading)
        shard[local_index] = value[tuple(slice(*bound) for bound in bounds[num_leading:])]
  return jax.make_array_from_callback(shape, sharding, lambda index: shards[_bounds(index or (), shape)])


def _bounds(index: Sequence[slice], shape: tuple[int, ...]) -> Bounds:
  return tuple(axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True))


class WorkdirWeights:
  """The weights of the newest checkpoint that verifies in a workdir, a folder or a URL, or of `step`.

  `model` is their ModelConfig.
  """

  def __init__(self, directory: str | os.PathLike, step: int | None = None):
    self.directory, self._reader, self._step = directory, open_reader(directory), step
    steps = broadcast_from_process0(self._reader.steps)
    if not steps:
      raise self._no_checkpoint()
    # All steps of a workdir have the same model. Which step is the newest that verifies is known only when it was all
    # read.
    for candidate in reversed(steps) if step is None else [step]:
      try:
        meta = self._reader.meta(candidate)
        config = from_dict(Config, meta["config"])
        self.model, self._tokenizer, self._fingerprint = (
          config.model,
          config.data.tokenizer,
          meta.get("tokenizer_fingerprint"),
        )
        break
      except CheckpointError:
        if candidate in (step, steps[0]):
          raise

  def tokenizer_fingerprint(self) -> str | None:
    """Of the tokenizer that the weights were trained with; None where nothing says which, or it cannot be loaded."""
    return self._fingerprint or _fingerprint(self._tokenizer)

  def _no_checkpoint(self) -> CheckpointError:
    return CheckpointError(
      f"{self.directory} has no checkpoint yet: its run has to save one before another starts from it"
    )

  def load(self, abstract: PyTree) -> PyTree:
    """As HuggingFaceWeights.load."""
    step = self._reader.latest() if self._step is None else self._step
    if step is None:
      raise self._no_checkpoint()
    self._reader.meta(step)  # refuses a newer format
    saved = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, self.model.param_dtype, sharding=a.sharding), abstract)
    return jax.tree.map(lambda array, a: array.astype(a.dtype), self._reader.restore(step, saved), abstract)


def _fingerprint(tokenizer: str | os.PathLike) -> str | None:
  """The fingerprint of data.tokenizer, or None where it cannot be loaded here."""
  try:
    return load_tokenizer(str(tokenizer)).fingerprint
  except DataError:
    return None


def open_weights(directory: str | os.PathLike) -> HuggingFaceWeights | WorkdirWeights:
  """The weights of a Hugging Face folder or of a workdir, told apart by their content; only their config is read."""
  return HuggingFaceWeights(directory) if is_hugging_face(directory) else WorkdirWeights(directory)


def open_first_weights(
  config: Config, workdir: str | os.PathLike, tokenizer: Tokenizer
) -> HuggingFaceWeights | WorkdirWeights | None:
  """The weights of `init_from` where a run in `workdir` starts from them, and has no checkpoint of its own.

  Prints a note where they are known to be of another tokenizer than `tokenizer`, which is that of the run. Raises
  CheckpointError where they do not fit the config.
  """
  if not config.init_from or broadcast_from_process0(open_reader(workdir).steps):
    return None
  weights = open_weights(config.init_from)
  check_weights_fit(weights.directory, weights.model, config)
  if weights.tokenizer_fingerprint() not in (None, tokenizer.fingerprint):
    current_console().print(
      f"note     {config.init_from} has another tokenizer than data.tokenizer={config.data.tokenizer}"
    )
  return weights
