"""Published weights in a notebook: load, inspect, differentiate, save.

One device, no mesh to set up, no global state.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from deepseek_jax.checkpoint.hf_config import to_hf_config
from deepseek_jax.checkpoint.hf_files import CONFIG_FILE, DTYPES, HFReader, missing_folder, write_tensors
from deepseek_jax.checkpoint.hf_model import read_config_json, read_model_config
from deepseek_jax.checkpoint.hf_names import hf_tensors
from deepseek_jax.checkpoint.hf_tokenizer import CODE_FILES, GENERATION_FILE, TOKENIZER_FILES, copy_files
from deepseek_jax.config_sections import MeshConfig
from deepseek_jax.errors import CheckpointError, ConfigError
from deepseek_jax.mesh import check_x64, make_mesh
from deepseek_jax.model.transformer import graphdef, init_params
from deepseek_jax.model_config import ModelConfig
from deepseek_jax.sharding import with_concrete_shardings
from deepseek_jax.storage import is_url
from deepseek_jax.training.objective import Objective
from deepseek_jax.training.step_config import StepConfig
from deepseek_jax.typing import Params, PyTree

# dtype of load_pretrained -> (parameters, computation)
PRECISIONS = {"float32": ("float32", "float32"), "float64": ("float64",) * 2, "bfloat16": ("float32", "bfloat16")}
SAVED_DTYPES = {str(dtype): dtype for code, dtype in DTYPES.items() if code != "F8_E4M3"}


def load_pretrained(directory: str | Path, dtype: str = "float32") -> "Model":
  """The model of a Hugging Face folder (config.json and safetensors files) of any DeepSeek generation up to V3 and R1.

  Args:
    directory: the folder, on this machine's disk.
    dtype: of the computation: float32, bfloat16 (with parameters in float32), or float64, which needs JAX's x64 mode.

  Raises:
    ConfigError: another dtype, or float64 without x64 mode.
    CheckpointError: a folder that is incomplete, or holds another kind of model. Lists everything that is wrong. For a
      workdir, a URL and a name on the hub it says how to get a folder.
  """
  if dtype not in PRECISIONS:
    raise ConfigError(f"dtype={dtype!r} is not one of {', '.join(PRECISIONS)}")
  directory = local_folder(directory)
  param_dtype, compute_dtype = PRECISIONS[dtype]
  config = dataclasses.replace(read_model_config(directory), param_dtype=param_dtype, compute_dtype=compute_dtype)
  check_x64(config)
  reader, table = HFReader(directory), hf_tensors(config)
  reader.check_tensors(table)
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  with jax.set_mesh(mesh):
    abstract = with_concrete_shardings(jax.eval_shape(lambda: init_params(config, key=None)), mesh)
    arrays = jax.tree.map(lambda a: np.empty(a.shape, a.dtype), abstract)
    for entry in table:
      if not entry.is_copy:
        get_at_path(arrays[entry.buffer], entry.path)[entry.index] = entry.to_param(reader.read(entry.name))
    reader.check_finite()
    params, buffers = jax.tree.map(lambda array, a: jax.device_put(array, a.sharding), arrays, abstract)
  names = set(reader.names)
  dtypes = {entry.name: reader.dtype(entry.name) for entry in table if entry.name in names}
  return Model(config, params, buffers, mesh, dtypes, read_config_json(directory), directory)


def local_folder(directory: str | Path) -> Path:
  """`directory` as a path. Raises CheckpointError, which says what to do, where it cannot be a Hugging Face folder."""
  if is_url(directory):
    raise CheckpointError(f"load_pretrained reads folders on this machine's disk: copy {directory} to one")
  path = Path(directory).expanduser()
  if not path.is_dir():
    raise missing_folder(path)
  step = path.parent if path.name.isdigit() else path  # one checkpoint of a run
  steps = next((p for p in (path / "checkpoints", step) if p.name == "checkpoints" and p.is_dir()), None)
  if steps is not None and not ((path / CONFIG_FILE).is_file() and "model_type" in read_config_json(path)):
    workdir = steps.parent
    raise CheckpointError(
      f"{directory} belongs to the workdir of a run, and load_pretrained reads Hugging Face folders: write one with "
      f"python -m deepseek_jax.checkpoint convert --from={workdir} --to={workdir}-hf, and load that"
    )
  return path


def get_at_path(tree: Mapping[str, Any], path: Sequence[str]) -> Any:
  """The array at the keys `path` of nested dicts."""
  return functools.reduce(lambda node, key: node[key], path, tree)


class Model:
  """A loaded model.

  Attributes:
    config: its ModelConfig.
    source: the folder that it was loaded from.
    params: nested dict of arrays. A tree of the same structure and shapes may be assigned to it.
    buffers: nested dict with the bias of each router, empty in a model without; it has no gradient.

  Tokens are integers [batch, seq] below the vocabulary size: NumPy, JAX or lists. Each new shape of them compiles once.
  Methods that take tokens raise ConfigError for others. All methods but `save_pretrained` raise it for a float64 model
  without x64 mode.
  """

  def __init__(
    self,
    config: ModelConfig,
    params: Params,
    buffers: Params,
    mesh: jax.sharding.Mesh,
    dtypes: dict[str, np.dtype],
    hf_config: dict[str, Any],
    source: Path,
  ):
    self.config, self.buffers, self.source = config, buffers, source
    self._params, self._mesh, self._dtypes, self._hf_config = params, mesh, dtypes, hf_config
    with jax.set_mesh(mesh):
      self._graphdef = graphdef(config)

  def __repr__(self) -> str:
    """Model, parameters, dtype and source, in one line."""
    config, count = self.config, sum(x.size for x in jax.tree.leaves(self._params))
    experts = f", {config.moe.num_routed_experts} experts" if config.num_moe_layers else ""
    mtp = f" and {config.num_mtp_layers} of multi-token prediction" if config.num_mtp_layers else ""
    return (
      f"<Model {self._hf_config['model_type']}: {config.layers} layers{mtp}, width {config.embed}{experts}, {count:,} "
      f"parameters in {config.param_dtype}, computes in {config.compute_dtype}, from {self.source}>"
    )

  @property
  def params(self) -> Params:
    """Nested dict of arrays."""
    return self._params

  @params.setter
  def params(self, tree: PyTree) -> None:
    check_x64(self.config)
    self._params = validate_params(tree, self._params)

  def logits(self, tokens: Any) -> jax.Array:
    """Logits [batch, seq, vocab] of the token after each position, in float32, or float64 when loaded so."""
    return self._run(self._logits, self._check_tokens(tokens))

  def loss_and_grads(self, tokens: Any, mtp_weight: float = 0.0) -> tuple[jax.Array, Params]:
    """Mean cross entropy [] of the next token in nats, and its gradients, a tree like `params`.

    Args:
      tokens: [batch, seq], with seq at least 2; at least 2 + depths with a weight.
      mtp_weight: weight of the multi-token prediction loss, the mean over the targets of each depth, then over depths.

    Balance losses are not part of it. Raises ConfigError for a weight in a model without multi-token prediction.
    """
    depths = self.config.num_mtp_layers
    if mtp_weight and not depths:
      raise ConfigError(
        f"mtp_weight={mtp_weight}, but this model has no layers for multi-token prediction: leave it at 0"
      )
    depths = depths if mtp_weight else 0
    return self._run(self._loss_and_grads, self._check_tokens(tokens, min_seq=depths + 2), mtp_weight, depths)

  def routing(self, tokens: Any) -> tuple[jax.Array, jax.Array]:
    """Chosen experts, int32, and their weights, each [moe_layers, batch, seq, experts per token].

    Raises ConfigError for a model without experts.
    """
    if not self.config.num_moe_layers:
      raise ConfigError("routing() needs experts, and this model is dense: there is nothing to route")
    return self._run(self._routing, self._check_tokens(tokens))

  def save_pretrained(self, directory: str | Path, dtype: str | None = None) -> None:
    """Writes a Hugging Face folder that transformers loads: `params` as they are now, the buffers as they were loaded.

    - Each tensor has the dtype that it was loaded with (FP8 becomes float32), or `dtype`: float64, float32, float16 or
      bfloat16. Buffers keep theirs.
    - The embedding and head that multi-token prediction repeats are copies of the main model's.
    - An earlier save in the folder is replaced only when the new files are complete.
    - The tokenizer's files, chat templates and generation_config.json of `source` are copied, if it is still there.

    Raises:
      ConfigError: another dtype, or a URL.
      CheckpointError: values that are not finite in their dtype (lists the tensors), a config that no config.json
        describes, or a disk that cannot be written.
    """
    if is_url(directory):
      raise ConfigError(
        f"save_pretrained writes to this machine's disk: save to a folder, and copy that to {directory}"
      )
    if dtype is not None and dtype not in SAVED_DTYPES:
      raise ConfigError(f"dtype={dtype!r} is not one of {', '.join(SAVED_DTYPES)}, nor None for each tensor's own")
    table = {entry.name: entry for entry in hf_tensors(self.config)}
    loaded_dtypes = {entry.path: self._dtypes[entry.name] for entry in table.values() if not entry.is_copy}

    def saved_dtype(entry):
      loaded_dtype = self._dtypes.get(entry.name, loaded_dtypes[entry.path])
      return loaded_dtype if dtype is None or entry.buffer else SAVED_DTYPES[dtype]

    arrays = jax.device_get((self.params, self.buffers))

    def read(name):
      entry = table[name]
      return entry.to_hf(get_at_path(arrays[entry.buffer], entry.path)[entry.index])

    main_dtype = dtype or str(loaded_dtypes["embed",])
    config = to_hf_config(self.config, main_dtype, self._hf_config)
    tensors = [(name, entry.shape, saved_dtype(entry)) for name, entry in table.items()]
    write_tensors(directory, tensors, read, config=config)
    if self.source.is_dir() and self.source.resolve() != Path(directory).resolve():
      try:
        copy_files(self.source, Path(directory), (GENERATION_FILE, *TOKENIZER_FILES, *CODE_FILES))
      except OSError as error:
        raise CheckpointError(f"cannot copy {error.filename} to {directory}: {error.strerror}; make room") from error

  def _run(self, function: Callable, *arguments: Any) -> Any:
    check_x64(self.config)
    with jax.set_mesh(self._mesh):
      return function(self.params, self.buffers, *arguments)

  def _check_tokens(self, tokens: Any, min_seq: int = 1) -> np.ndarray:
    """`tokens` as int32 [batch, seq]. They are checked here, because JAX clamps an index that is out of range."""
    tokens, vocab = np.asarray(tokens), self.config.vocab
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
      raise ConfigError(f"tokens are integers [batch, seq], got {tokens.dtype} {list(tokens.shape)}")
    if not tokens.shape[0] or tokens.shape[1] < min_seq:
      raise ConfigError(
        f"tokens {list(tokens.shape)} are too few: expected at least one sequence of at least {min_seq} tokens"
      )
    if tokens.min() < 0 or tokens.max() >= vocab:
      raise ConfigError(f"tokens from {tokens.min()} to {tokens.max()} are outside the vocabulary, 0 to {vocab - 1}")
    return tokens.astype(np.int32)

  @functools.cached_property
  def _logits(self) -> Callable:
    def logits(params, buffers, tokens):
      model = nnx.merge(self._graphdef, params, buffers)
      hidden, _ = model(tokens)
      return model.logits(hidden)

    return jax.jit(logits)

  @functools.cached_property
  def _routing(self) -> Callable:
    def chosen_experts(output):
      routing = output.aux.get("routing")
      return None if routing is None else (routing.indices, routing.weights)

    def routing(params, buffers, tokens):
      _, aux = nnx.merge(self._graphdef, params, buffers)(tokens, aux_fn=chosen_experts)
      return aux["moe_layers"]

    return jax.jit(routing)

  @functools.cached_property
  def _loss_and_grads(self) -> Callable:
    def loss(params, buffers, tokens, mtp_weight, depths):
      config = StepConfig(dataclasses.replace(self.config, num_mtp_layers=depths))
      if not depths:
        params, buffers = ({k: v for k, v in tree.items() if k != "mtp_layers"} for tree in (params, buffers))
      model = nnx.merge(graphdef(config.model), params, buffers)
      _, objective, _ = Objective(config)(model, tokens, mtp_weight=mtp_weight)
      return objective / (tokens.shape[0] * (tokens.shape[1] - 1))

    return jax.jit(jax.value_and_grad(loss), static_argnums=4)


def validate_params(tree: PyTree, expected: Params) -> Params:
  """`tree` with the dtypes and shardings of `expected`.

  Raises ConfigError, listing all that differs, unless it has the structure and shapes of `expected`.
  """

  def by_path(tree):
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree.leaves_with_path(tree)}

  got, want = by_path(tree), by_path(expected)
  problems = [f"{path} is missing" for path in want if path not in got]
  problems += [f"{path} is not a parameter" for path in got if path not in want]
  problems += [
    f"{path} is {np.shape(got[path])} where {x.shape} is expected"
    for path, x in want.items()
    if path in got and np.shape(got[path]) != x.shape
  ]
  if problems:
    raise ConfigError("params must keep their structure and shapes: " + "; ".join(problems))
  leaves = [place_like(got[path], x) for path, x in want.items()]
  return jax.tree.unflatten(jax.tree.structure(expected), leaves)


def place_like(leaf: Any, like: jax.Array) -> jax.Array:
  """`leaf` with the dtype and sharding of `like`. It is copied unless it has them, so that no NumPy array is shared."""
  if isinstance(leaf, jax.Array) and (leaf.dtype, leaf.sharding) == (like.dtype, like.sharding):
    return leaf
  return jax.device_put(np.array(leaf, like.dtype), like.sharding)
