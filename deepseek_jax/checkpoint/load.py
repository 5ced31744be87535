"""A saved model, to be used and not trained on: of a workdir's checkpoint or a Hugging Face folder, onto a few devices."""

import dataclasses
import os
import pathlib

import jax
from jax.typing import DTypeLike

from deepseek_jax.checkpoint.bucket import open_reader
from deepseek_jax.checkpoint.hf_model import DEFAULTS, read_config_json
from deepseek_jax.checkpoint.hf_tokenizer import TOKENIZER_FILE
from deepseek_jax.checkpoint.model_args import TOKENIZERS
from deepseek_jax.checkpoint.weights import HuggingFaceWeights, WorkdirWeights, is_hugging_face
from deepseek_jax.compilation_cache import use_compilation_cache
from deepseek_jax.config import Config, check_weights
from deepseek_jax.config_sections import DataConfig, MeshConfig
from deepseek_jax.cpu_backend import keep_freed_memory
from deepseek_jax.data.tokenizer import NO_TOKENIZER, Tokenizer, load_model_tokenizer
from deepseek_jax.errors import CheckpointError, ConfigError, DataError
from deepseek_jax.mesh import check_x64, make_mesh
from deepseek_jax.model.transformer import init_params
from deepseek_jax.model_config import ModelConfig
from deepseek_jax.schema import from_dict
from deepseek_jax.sharding import with_concrete_shardings
from deepseek_jax.typing import Params


@dataclasses.dataclass(frozen=True)
class LoadedWeights:
  """Arrays of a model on the devices of `mesh`, which is to be set (`jax.set_mesh`) where they are used."""

  mesh: jax.sharding.Mesh
  params: Params
  buffers: Params


@dataclasses.dataclass(frozen=True)
class SavedModel:
  """A model on disk or in a bucket. Its arrays are read by `load`.

  Attributes:
    source: the workdir, its URL, or the Hugging Face folder.
    config: of the run that saved it. Of a Hugging Face folder: the defaults, with its model, its tokenizer, and as
      data.seq the positions that it has (max_position_embeddings).
    step: of the checkpoint; None for a Hugging Face folder.
    weights: what reads the arrays.
    fingerprint: of the tokenizer that the run trained with; None for weights that were trained elsewhere.
    data_fingerprint: of the text that the run trained on; None as above.
  """

  source: str
  config: Config
  step: int | None
  weights: HuggingFaceWeights | WorkdirWeights
  fingerprint: str | None
  data_fingerprint: str | None

  def load_tokenizer(self, name: str | None = None) -> Tokenizer:
    """The tokenizer of the config, or the one called `name`, as data.tokenizer.

    Raises DataError where it is missing or is not the one that the run trained with, and ConfigError where its ids do
    not fit the model.
    """
    name = self.config.data.tokenizer if name is None else name
    tokenizer = load_model_tokenizer(name, self.config.model.vocab)
    if self.fingerprint not in (None, tokenizer.fingerprint):
      raise DataError(
        f"data.tokenizer={name} is not the one of the checkpoint: put that one back, or give it with --tokenizer"
      )
    return tokenizer

  def add_bos(self, tokenizer: Tokenizer) -> bool:
    """Whether prompts begin with bos: those of what a run trained do, others as transformers prompts them."""
    return tokenizer.add_bos_token or self.fingerprint is not None

  def load(
    self,
    devices: int = 1,
    model: ModelConfig | None = None,
    tensor: int = 1,
    expert: int = 1,
    params_dtype: DTypeLike | None = None,
  ) -> LoadedWeights:
    """Reads the arrays, sharded over the first `devices` devices, in the parameter dtype of `model`.

    Args:
      model: the config's, perhaps in other dtypes; None: as it is.
      tensor, expert: sizes of these mesh axes; what is left of the devices is FSDP.
      params_dtype: another dtype of the parameters, as bfloat16, in which no run trains them; buffers keep theirs.

    Raises ConfigError where there are fewer devices, or they do not divide the model; CheckpointError where the arrays
    cannot be read.
    """
    model = model or self.config.model
    check_x64(model)
    if devices > len(jax.devices()):
      advice = "; JAX_NUM_CPU_DEVICES=N makes N of a CPU" if jax.default_backend() == "cpu" else ""
      raise ConfigError(f"--devices={devices}, but {len(jax.devices())} are here{advice}")
    if devices % (tensor * expert):
      raise ConfigError(
        f"--devices={devices} does not divide over --tensor_parallel={tensor} x --expert_parallel={expert}: give a "
        f"multiple of {tensor * expert}"
      )
    mesh_config = MeshConfig(data=1, fsdp=devices // (tensor * expert), tensor=tensor, expert=expert)
    check_weights(model, mesh_config)
    use_compilation_cache()
    if jax.default_backend() == "cpu":
      keep_freed_memory()
    mesh = make_mesh(mesh_config, jax.devices()[:devices])
    with jax.set_mesh(mesh):
      shapes = jax.eval_shape(lambda: init_params(model, key=None))
      abstract = dict(zip(("params", "buffers"), with_concrete_shardings(shapes, mesh), strict=True))
      if params_dtype is not None:
        abstract["params"] = jax.tree.map(lambda a: a.update(dtype=params_dtype), abstract["params"])
      arrays = self.weights.load(abstract)
    return LoadedWeights(mesh, arrays["params"], arrays["buffers"])


def open_saved_model(source: str | os.PathLike, step: int | None = None) -> SavedModel:
  """The model in `source`: the workdir of a run, its URL, or a Hugging Face folder, told apart by their content.

  step: of a workdir's checkpoint; None: the newest that verifies. Raises CheckpointError where there is none, or the
  folder is neither.
  """
  if is_hugging_face(source):
    return open_hugging_face(source)
  return open_workdir(source, step)


def open_workdir(workdir: str | os.PathLike, step: int | None = None) -> SavedModel:
  """As `open_saved_model`, of a workdir or its URL."""
  reader = open_reader(workdir)
  step = reader.latest() if step is None else step
  if step is None:
    raise CheckpointError(
      f"no checkpoint in {workdir}; train one: python -m deepseek_jax.train --config=NAME --workdir={workdir}"
    )
  meta = reader.meta(step)
  config = from_dict(Config, meta["config"])
  fingerprints = meta["tokenizer_fingerprint"], meta["data_fingerprint"]
  return SavedModel(str(workdir), config, step, WorkdirWeights(workdir, step), *fingerprints)


def open_hugging_face(directory: str | os.PathLike) -> SavedModel:
  """As `open_saved_model`, of a Hugging Face folder. The model computes in float32."""
  directory = pathlib.Path(directory)
  weights, raw = HuggingFaceWeights(directory), read_config_json(directory)
  model = dataclasses.replace(weights.model, compute_dtype="float32")
  path = directory / TOKENIZER_FILE
  tokenizer = str(path) if path.is_file() else TOKENIZERS.get(model.vocab, NO_TOKENIZER)
  seq = (DEFAULTS[raw["model_type"]] | raw)["max_position_embeddings"]
  config = Config(model=model, data=DataConfig(seq=seq, tokenizer=tokenizer))
  return SavedModel(str(directory), config, None, weights, None, None)
