"""Where a run starts: at its newest checkpoint, from given weights, or from random parameters."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from deepseek_jax.checkpoint.bucket import BucketCheckpointer
from deepseek_jax.checkpoint.compatibility import Difference, check_compatible, check_weights_fit, saved_value
from deepseek_jax.checkpoint.manager import Checkpointer, CheckpointReader
from deepseek_jax.checkpoint.weights import HuggingFaceWeights, WorkdirWeights
from deepseek_jax.config import Config
from deepseek_jax.cpu_backend import quick_compile_options
from deepseek_jax.data.pipeline import Consumed, Data
from deepseek_jax.errors import CheckpointError
from deepseek_jax.stages import Stage, stage_after, stage_before
from deepseek_jax.training.state import TrainState, abstract_state, init_state, state_from_params
from deepseek_jax.training.step_config import StepConfig


class Start(NamedTuple):
  """What a stage of a run starts from.

  step: completed updates of the run.
  consumed: what these updates were trained on.
  checkpoint: the step whose state is restored; or None.
  weights: to start from without a checkpoint, as `open_weights` gives them; or None.
  reset_optimizer: restore all but the optimizer state.
  event: of the run's events: start, resume, or stage where the same process has trained the one before.
  changes: fields that differ from those of the checkpoint or the weights, and may.
  """

  step: int = 0
  consumed: Consumed = Consumed()
  checkpoint: int | None = None
  weights: HuggingFaceWeights | WorkdirWeights | None = None
  reset_optimizer: bool = False
  changes: tuple[Difference, ...] = ()
  event: str = "start"


def find_start(
  stages: Sequence[Stage],
  data: Sequence[Data],
  workdir: str,
  checkpointer: Checkpointer | BucketCheckpointer,
  weights: HuggingFaceWeights | WorkdirWeights | None,
  accept_data_change: bool,
  resume_from: int | None = None,
) -> tuple[int, Start]:
  """(index of the stage, what it starts from): the newest valid checkpoint, or that of step `resume_from`; or else weights.

  A checkpoint without optimizer state, as a conversion writes it, gives weights. data: of each stage. Raises
  CheckpointError where fields differ from those of the checkpoint that may not, or the weights do not fit.
  """
  newest = checkpointer.latest() if resume_from is None else checkpointer.go_back_to(resume_from)
  return start_at(newest, stages, data, workdir, checkpointer, weights, accept_data_change)


def start_at(
  newest: int | None,
  stages: Sequence[Stage],
  data: Sequence[Data],
  workdir: str,
  checkpointer: CheckpointReader,
  weights: HuggingFaceWeights | WorkdirWeights | None,
  accept_data_change: bool,
) -> tuple[int, Start]:
  """`find_start` from the checkpoint of step `newest`, which verifies; None: from weights."""
  first = stages[0]
  if newest is not None:
    meta = checkpointer.meta(newest)
    if "weights_only" not in meta:
      consumed = Consumed(meta["samples"], meta["tokens"])
      if consumed.tokens < first.first.tokens:
        raise CheckpointError(
          f"the newest checkpoint has seen {consumed.tokens:,} tokens, and the stage {first.name} starts at "
          f"{first.first.tokens:,}: leave out --stage, or use another --workdir"
        )
      saved_in, goes_on = stage_before(stages, consumed.tokens), stage_after(stages, consumed.tokens)
      changes = check_saved(meta, stages[saved_in].config, data[saved_in], accept_data_change)
      reset = goes_on != saved_in and stages[goes_on].reset_optimizer
      return goes_on, Start(newest, consumed, newest, None, reset, tuple(changes), "resume")
    weights = WorkdirWeights(workdir, newest)
  changes = check_weights_fit(weights.directory, weights.model, first.config) if weights else []
  return 0, Start(first.first_step, first.first, weights=weights, changes=tuple(changes))


def check_saved(meta: dict[str, Any], config: Config, data: Data, accept_data_change: bool) -> list[Difference]:
  """The fields of `config` that differ from those of the checkpoint with `meta`, and may.

  config, data: of the stage in which the checkpoint was saved. Raises CheckpointError where others differ, or the data.
  """
  fingerprint = data.fingerprint_at(saved_value(meta["config"], "data.seq"))
  changes = check_compatible(meta["config"], config, meta["data_fingerprint"], fingerprint, accept_data_change)
  regions = [tuple(region) for region in meta.get("data_regions", ())]
  if regions != list(data.regions) and not accept_data_change:
    raise CheckpointError(
      f"the checkpoint was trained on other parts of the data: targets {regions or 'without stages'} of the sources, now they "
      f"are {list(map(tuple, data.regions)) or 'without stages'}; put until_tokens, batch, length and weights of the stages back, and --stage "
      "where the run started with it, "
      "or pass --accept_data_change to continue on the new parts"
    )
  return changes


def next_start(stage: Stage) -> Start:
  """What `stage` starts from in the process that has trained and saved the one before."""
  return Start(stage.first_step, stage.first, stage.first_step, None, stage.reset_optimizer, event="stage")


def load_state(start: Start, config: StepConfig, seed: int, mesh: Mesh, checkpointer: CheckpointReader) -> TrainState:
  """The state of `start` on `mesh`: the checkpoint's, or a new one of the given weights or of random parameters."""
  abstract = abstract_state(config, mesh)
  from_params = jax.jit(state_from_params, static_argnums=0, donate_argnums=(1, 2))
  if start.checkpoint is not None and not start.reset_optimizer:
    return checkpointer.restore(start.checkpoint, abstract)
  if start.checkpoint is not None:
    kept = {name: getattr(abstract, name) for name in ("step", "params", "buffers", "skipped")}
    kept = checkpointer.restore(start.checkpoint, kept)
    state = from_params(config, kept["params"], kept["buffers"])
    return jax.block_until_ready(dataclasses.replace(state, step=kept["step"], skipped=kept["skipped"]))
  if start.weights:
    arrays = start.weights.load({"params": abstract.params, "buffers": abstract.buffers})
    state = from_params(config, arrays["params"], arrays["buffers"])
    return jax.block_until_ready(dataclasses.replace(state, step=state.step + start.step))
  init = jax.jit(init_state, static_argnums=0, compiler_options=quick_compile_options())
  return jax.block_until_ready(init(config, jax.random.key(seed)))
