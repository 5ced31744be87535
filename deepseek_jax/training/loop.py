"""A run: from a config and a workdir to trained parameters, resuming where an earlier process stopped.

What it shows and writes is in `run_log.py`.
"""

from collections.abc import Callable, Sequence

import jax

from deepseek_jax.checkpoint.bucket import open_checkpointer
from deepseek_jax.checkpoint.weights import open_first_weights, refuse_hf_workdir
from deepseek_jax.compilation_cache import use_compilation_cache
from deepseek_jax.config import Config
from deepseek_jax.console import SilentConsole, current_console, set_console
from deepseek_jax.cpu_backend import keep_freed_memory
from deepseek_jax.data.pipeline import open_data
from deepseek_jax.data.tokenizer import load_model_tokenizer
from deepseek_jax.distributed import barrier, broadcast_from_process0, process_count, process_index
from deepseek_jax.errors import Stopped
from deepseek_jax.kernels.implementations import Replacements, replace_kernels
from deepseek_jax.mesh import check_x64, make_mesh, resolve_mesh
from deepseek_jax.storage import RunFolder
from deepseek_jax.training import metrics
from deepseek_jax.training.run_log import RunLog, end_before_training
from deepseek_jax.training.signals import stop_requests
from deepseek_jax.training.start import find_start
from deepseek_jax.training.trainer import Trainer


def run(
  config: Config,
  workdir: str,
  evaluate: Callable[..., dict[str, float | int]],
  sample: Callable[..., str],
  select_kernels: Callable[[Config, str], tuple[Sequence[str], Sequence[str]]],
  accept_data_change: bool = False,
  writers: Sequence[metrics.WriterFactory] = (),
  resume_from: int | None = None,
) -> int:
  """Trains until `train.steps`, or a stop signal, and returns the exit code: 0, or 130 / 143 after SIGINT / SIGTERM.

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

  Raises:
    UserError: the config, the data or a checkpoint cannot be used, or a file cannot be written any more.
    Diverged: `train.max_skipped` updates in a row were skipped.
    Stopped: a signal before the first step, in a run of several processes, which it ends.
  """
  # What process 0 shows is true of all.
  with (
    set_console(current_console() if process_index() == 0 else SilentConsole()) as console,
    stop_requests() as request,
  ):
    refuse_hf_workdir(workdir)
    run_folder = RunFolder(workdir)
    try:
      check_x64(config.model)
      # These raise errors of the tokenizer and the bucket before any device is opened.
      tokenizer = load_model_tokenizer(config.data.tokenizer, config.model.vocab)
      broadcast_from_process0(lambda: run_folder.download(metrics.RESUME_FILES))
      weights = open_first_weights(config, workdir, tokenizer)
      functions, calls = broadcast_from_process0(lambda: select_kernels(config, run_folder.path))
      replacements = Replacements(frozenset(functions), frozenset(calls))
      on_mesh = resolve_mesh(config, len(jax.devices()))
      use_compilation_cache()
      if jax.default_backend() == "cpu":
        keep_freed_memory()
      mesh = make_mesh(on_mesh.mesh)
      log = RunLog(config, workdir, run_folder, mesh, console, writers)
      log.show_run()
      with replace_kernels(replacements), open_checkpointer(workdir, config.checkpoint) as checkpointer:
        data = open_data(config.data, config.model.vocab, config.seed)
        # The other processes may wait while one packs the data, but not in a step: a collective would time out.
        barrier("data")
        log.show_config(on_mesh)
        with jax.set_mesh(mesh):
          start = find_start(config, workdir, data, checkpointer, weights, accept_data_change, resume_from)
          log.show_changes(start.changes, start.step, start.consumed)
          trainer = Trainer(config, workdir, mesh, data, checkpointer, evaluate, sample, replacements, start, log)
          return trainer.main(request)
    except Stopped as stop:  # nothing was trained yet
      end_before_training(workdir, run_folder, stop)
      if process_count() > 1:
        raise  # the other processes wait for this one
      return 128 + stop.signal
