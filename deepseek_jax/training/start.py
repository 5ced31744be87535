"""Where a run starts: at its newest checkpoint, from given weights, or from random parameters."""

from typing import NamedTuple

import jax
from jax.sharding import Mesh

from deepseek_jax.checkpoint.bucket import BucketCheckpointer
from deepseek_jax.checkpoint.compatibility import Difference, check_compatible, check_weights_fit, saved_value
from deepseek_jax.checkpoint.manager import Checkpointer
from deepseek_jax.checkpoint.weights import HuggingFaceWeights, WorkdirWeights
from deepseek_jax.config import Config
from deepseek_jax.cpu_backend import quick_compile_options
from deepseek_jax.data.pipeline import Consumed, Data
from deepseek_jax.training.state import TrainState, abstract_state, init_state, state_from_params
from deepseek_jax.training.step_config import StepConfig


class Start(NamedTuple):
  """What a run starts from.

  checkpoint: its step, in completed updates, whose whole state is restored; or None.
  consumed: what these updates were trained on.
  weights: to start from at step 0, as `open_weights` gives them; or None.
  changes: fields that differ from those of the checkpoint or the weights, and may.
  """

  checkpoint: int | None = None
  consumed: Consumed = Consumed()
  weights: HuggingFaceWeights | WorkdirWeights | None = None
  changes: tuple[Difference, ...] = ()

  @property
  def step(self) -> int:
    """Completed updates."""
    return self.checkpoint or 0


def find_start(
  config: Config,
  workdir: str,
  data: Data,
  checkpointer: Checkpointer | BucketCheckpointer,
  weights: HuggingFaceWeights | WorkdirWeights | None,
  accept_data_change: bool,
  resume_from: int | None = None,
) -> Start:
  """The newest valid checkpoint, or that of step `resume_from`; without one, `weights` or nothing.

  A checkpoint without optimizer state, as a conversion writes it, gives weights to start from at step 0. Raises
  CheckpointError where fields differ from those of the checkpoint that may not, or the weights do not fit.
  """
  newest = checkpointer.latest() if resume_from is None else checkpointer.go_back_to(resume_from)
  if newest is not None:
    meta = checkpointer.meta(newest)
    if "weights_only" not in meta:
      fingerprint = data.fingerprint_at(saved_value(meta["config"], "data.seq"))
      saved = meta["config"], config, meta["data_fingerprint"], fingerprint
      changes = check_compatible(*saved, accept_data_change)
      return Start(newest, Consumed(meta["samples"], meta["tokens"]), changes=tuple(changes))
    weights = WorkdirWeights(workdir, newest)
  if weights:
    return Start(weights=weights, changes=tuple(check_weights_fit(weights.directory, weights.model, config)))
  return Start()


def load_state(
  start: Start, config: StepConfig, seed: int, mesh: Mesh, checkpointer: Checkpointer | BucketCheckpointer
) -> TrainState:
  """The state of `start` on `mesh`: the checkpoint's, or a new one of the given weights or of random parameters."""
  if start.checkpoint is not None:
    return checkpointer.restore(start.checkpoint, abstract_state(config, mesh))
  if start.weights:
    abstract = abstract_state(config, mesh)
    arrays = start.weights.load({"params": abstract.params, "buffers": abstract.buffers})
    from_params = jax.jit(state_from_params, static_argnums=0, donate_argnums=(1, 2))
    return jax.block_until_ready(from_params(config, arrays["params"], arrays["buffers"]))
  init = jax.jit(init_state, static_argnums=0, compiler_options=quick_compile_options())
  return jax.block_until_ready(init(config, jax.random.key(seed)))
