"""A run: from a config and a workdir to trained parameters, resuming where an earlier process stopped.

What it shows and writes is in `run_log.py`.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
from jax.sharding import Mesh

from deepseek_jax.checkpoint.bucket import open_checkpointer
from deepseek_jax.checkpoint.weights import open_first_weights, refuse_hf_workdir
from deepseek_jax.compilation_cache import use_compilation_cache
from deepseek_jax.config import Config
from deepseek_jax.console import Console, SilentConsole, current_console, set_console
from deepseek_jax.cpu_backend import keep_freed_memory
from deepseek_jax.data.pipeline import Data
from deepseek_jax.data.tokenizer import load_model_tokenizer
from deepseek_jax.distributed import barrier, broadcast_from_process0, process_count, process_index
from deepseek_jax.errors import ConfigError, Stopped
from deepseek_jax.kernels.implementations import Replacements, replace_kernels
from deepseek_jax.mesh import check_x64, make_mesh, resolve_mesh
from deepseek_jax.stages import Stage, open_stage_data, resolve_stages
from deepseek_jax.storage import RunFolder
from deepseek_jax.training import metrics
from deepseek_jax.training.clock import PhaseClock
from deepseek_jax.training.goodput import GoodputWriter
from deepseek_jax.training.preemption import stop_notices
from deepseek_jax.training.run_log import RunLog, end_before_training
from deepseek_jax.training.signals import StopRequest
from deepseek_jax.training.start import Start, find_start, next_start
from deepseek_jax.training.trainer import Trainer
from deepseek_jax.training.watchdog import Watchdog


def run(
  config: Config,
  workdir: str,
  evaluate: Callable[..., dict[str, float | int]],
  sample: Callable[..., str],
  select_kernels: Callable[[Config, str], tuple[Sequence[str], Sequence[str]]],
  accept_data_change: bool = False,
  writers: Sequence[metrics.WriterFactory] = (),
  resume_from: int | None = None,
  started: float | None = None,
) -> int:
  """Trains the stages of `config`, or until a notice to stop, and returns the exit code: 0, or `Notice.exit_code`.

  Process 0 shows on the current console what the run does.

  Args:
    workdir: a folder or a URL. A run continues from the newest checkpoint in it.
    evaluate: as `evaluate.heldout.evaluate`.
    sample: as `generate.decoding.continue_prompt`.
    select_kernels: (config, local folder of the run) -> (functions, calls) of the Replacements. Process 0 calls it
      before any device is opened.
    accept_data_change: resume although the data differs from the checkpoint's.
    writers: of metrics and events, on process 0, in addition to the files of the run; see `metrics.MetricsWriter`.
    resume_from: the step of the checkpoint to continue from, instead of the newest one; newer ones are set aside.
    started: when the run began, in time.monotonic(), from where its wall time counts. None: now.

  Raises:
    UserError: the config, the data or a checkpoint cannot be used, or a file cannot be written any more.
    Diverged: `train.max_skipped` updates in a row were skipped.
    Stopped: a notice before the first step, in a run of several processes, which it ends.
  """
  refuse_hf_workdir(workdir)
  run_folder = RunFolder(workdir)
  # What process 0 shows is true of all.
  with (
    set_console(current_console() if process_index() == 0 else SilentConsole()) as console,
    stop_notices(config.checkpoint.cloud_notices) as request,
    contextlib.ExitStack() as stack,
  ):
    try:
      request.stop_at_once_from_now()  # where Stopped is handled
      goodput, watchdog = stack.enter_context(watch(config, run_folder, console, started))
      check_x64(config.model)
      # These raise errors of the tokenizer and the bucket before any device is opened.
      tokenizer = load_model_tokenizer(config.data.tokenizer, config.model.vocab)
      broadcast_from_process0(lambda: run_folder.download(metrics.RESUME_FILES))
      stages = resolve_stages(config)
      weights = open_first_weights(stages[0].config, workdir, tokenizer)
      replacements = select_stage_kernels(stages, select_kernels, run_folder.path)
      meshes = make_meshes(stages)
      arguments = workdir, run_folder, console, goodput, writers
      logs = [RunLog(config, stage, mesh, *arguments) for stage, mesh in zip(stages, meshes, strict=True)]
      logs[0].show_run()
      kept = [stage.first_step for stage in stages[1:]]
      with replace_kernels(replacements), open_checkpointer(workdir, config.checkpoint, kept) as checkpointer:
        data = open_all_data(config, stages, goodput.clock)
        with jax.set_mesh(meshes[0]), goodput.clock.measure("restore"):
          first, start = find_start(stages, data, workdir, checkpointer, weights, accept_data_change, resume_from)

        def make_trainer(index, start):
          watchdog.publish = logs[index].end_hung
          to_train = stages[index], workdir, meshes[index], data[index], checkpointer
          return Trainer(*to_train, evaluate, sample, replacements, start, logs[index])

        return train_stages(stages, first, start, logs, make_trainer, request)
    except Stopped as stop:  # nothing was trained yet
      end_before_training(workdir, run_folder, stop)
      if process_count() > 1:
        raise  # the other processes wait for this one
      return stop.exit_code


@contextlib.contextmanager
def watch(
  config: Config, run_folder: RunFolder, console: Console, started: float | None
) -> Iterator[tuple[GoodputWriter, Watchdog]]:
  """Yields the run's goodput, with its clock, and a watchdog that watches that during the block. started: as `run`."""
  with contextlib.closing(GoodputWriter(PhaseClock(started))) as goodput:
    watchdog = Watchdog(config.watchdog, goodput.clock, run_folder, console)
    with watchdog.watch():
      yield goodput, watchdog


def open_all_data(config: Config, stages: Sequence[Stage], clock: PhaseClock) -> list[Data]:
  """As `open_stage_data`, once all processes have opened theirs.

  They may wait while one packs the data, but not in a step: a collective would time out.
  """
  with clock.measure("open_data"):
    data = open_stage_data(config, stages)
    barrier("data")
  return data


def train_stages(
  stages: Sequence[Stage],
  first: int,
  start: Start,
  logs: Sequence[RunLog],
  make_trainer: Callable[[int, Start], Trainer],
  request: StopRequest,
) -> int:
  """Trains the stages from number `first` on, which starts at `start`, and returns the exit code.

  make_trainer: (number of a stage, its start) -> its Trainer, made while the stage's mesh is set.
  """
  for index, stage in enumerate(stages[first:], first):
    logs[index].show_config(is_first=index == first)  # counts parameters, which no mesh may be set for
    with jax.set_mesh(logs[index].mesh):
      trainer = make_trainer(index, start)
      if (code := trainer.main(request)) or stage.is_last:
        break
    del trainer  # and its state, before the next stage reads its own
    start = next_start(stages[index + 1])
  return code


def select_stage_kernels(
  stages: Sequence[Stage], select_kernels: Callable[[Config, str], tuple[Sequence[str], Sequence[str]]], folder: str
) -> Replacements:
  """The kernels that any of the stages replaces; process 0 selects, as `run` is told."""
  choices = broadcast_from_process0(lambda: [select_kernels(stage.config, folder) for stage in stages])
  functions, calls = (frozenset(itertools.chain(*names)) for names in zip(*choices, strict=True))
  return Replacements(functions, calls)


def make_meshes(stages: Sequence[Stage]) -> list[Mesh]:
  """The mesh of each stage, over all devices. Raises ConfigError where one does not fit them."""
  on_meshes = []
  for stage in stages:
    try:
      on_meshes.append(resolve_mesh(stage.config, len(jax.devices())))
    except ConfigError as error:
      raise ConfigError(f"stage {stage.name}: {error}" if stage.name else str(error)) from None
  use_compilation_cache()
  if jax.default_backend() == "cpu":
    keep_freed_memory()
  return [make_mesh(config.mesh) for config in on_meshes]
