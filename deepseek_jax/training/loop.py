"""A run: from a config and a workdir to trained parameters, resuming where an earlier process stopped.

What it shows and writes is in `run_log.py`.
"""

import contextlib
import dataclasses
import functools
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from deepseek_jax.checkpoint.bucket import BucketCheckpointer, open_checkpointer
from deepseek_jax.checkpoint.compatibility import Difference, check_compatible, check_weights_fit, saved_value
from deepseek_jax.checkpoint.manager import FORMAT_VERSION, Checkpointer
from deepseek_jax.checkpoint.weights import HuggingFaceWeights, WorkdirWeights, open_first_weights, refuse_hf_workdir
from deepseek_jax.compilation_cache import use_compilation_cache
from deepseek_jax.config import Config
from deepseek_jax.console import SilentConsole, current_console, set_console
from deepseek_jax.cpu_backend import keep_freed_memory, quick_compile_options
from deepseek_jax.data.pipeline import Consumed, Data, iterate_batches, open_data
from deepseek_jax.data.tokenizer import load_model_tokenizer
from deepseek_jax.distributed import barrier, broadcast_from_process0, process_count, process_index
from deepseek_jax.errors import CheckpointError, Stopped, UserError, format_exception
from deepseek_jax.kernels.implementations import Replacements, import_libraries, replace_kernels
from deepseek_jax.mesh import check_x64, make_mesh, make_process_max, resolve_mesh
from deepseek_jax.model.transformer import graphdef
from deepseek_jax.sharding import spec
from deepseek_jax.storage import RunFolder
from deepseek_jax.training import metrics
from deepseek_jax.training.batch import Batch, load_batch, load_windows
from deepseek_jax.training.rescue import rescue
from deepseek_jax.training.run_log import RunLog, end_before_training
from deepseek_jax.training.schedule import StepInputs
from deepseek_jax.training.signals import StopRequest, stop_requests
from deepseek_jax.training.skipped import Diverged, check_skipped
from deepseek_jax.training.state import TrainState, abstract_state, init_state, state_from_params, state_sha256
from deepseek_jax.training.step import jit_eval_step, jit_train_step
from deepseek_jax.training.step_config import StepConfig
from deepseek_jax.training.timing import MetricsReader, TimedMetrics


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
          training_run = Run(config, workdir, mesh, data, checkpointer, evaluate, sample, weights, replacements, log)
          changes = training_run.find_start(accept_data_change, resume_from)
          log.show_changes(changes, training_run.step, training_run.consumed)
          return training_run.main(request)
    except Stopped as stop:  # nothing was trained yet
      end_before_training(workdir, run_folder, stop)
      if process_count() > 1:
        raise  # the other processes wait for this one
      return 128 + stop.signal


class Run:
  """The mutable side of a run: state, counters and pending saves.

  Args, in addition to those of `run`:
    checkpointer: as `open_checkpointer` gives it.
    weights: as `open_weights` gives them, to start from; or None.
    replacements: those that are set.
    log: for all that the run shows and writes beside checkpoints.
  """

  def __init__(
    self,
    config: Config,
    workdir: str,
    mesh: Mesh,
    data: Data,
    checkpointer: Checkpointer | BucketCheckpointer,
    evaluate: Callable[..., dict[str, float | int]],
    sample: Callable[..., str],
    weights: HuggingFaceWeights | WorkdirWeights | None,
    replacements: Replacements,
    log: RunLog,
  ):
    self.config, self.workdir, self.mesh, self.data, self.log = config, workdir, mesh, data, log
    self.checkpointer, self.evaluate_fn, self.sample_fn = checkpointer, evaluate, sample
    self.weights, self.replacements = weights, replacements
    import_libraries()
    train, self.microbatch_size = config.train, config.train.microbatch or config.train.global_batch
    # Made here, because no mesh is set in the thread that reads ahead.
    self.batch_sharding = NamedSharding(mesh, spec(None, "batch", None))
    # Without a batch ramp the number of microbatches is a constant of the program, else an argument.
    self.step_config = StepConfig.of(config, data.tokenizer.bos)
    program = self.step_config, graphdef(config.model), replacements
    self.train_step = jit_train_step(*program, static_microbatches=not train.batch_ramp_from)
    self.eval_step = jit_eval_step(*program)
    self.process_max = make_process_max(mesh) if jax.process_count() > 1 else None
    # Several programs in flight on virtual CPU devices can starve a collective until it times out.
    self.block_each_step = jax.default_backend() == "cpu" and mesh.size > 1
    self.skipped_in_a_row = 0  # the last updates, as far as their metrics are read
    self.checkpoint_is_overdue = False

  def find_start(self, accept_data_change: bool, resume_from: int | None = None) -> list[Difference]:
    """Sets `step` and `consumed` to those of the newest valid checkpoint, or of step `resume_from`, or to 0.

    A checkpoint without optimizer state, as a conversion writes it, gives weights to start from at step 0.
    Returns the fields that differ from its config and may. Raises CheckpointError where others do.
    """
    newest = self.checkpointer.latest() if resume_from is None else self.checkpointer.go_back_to(resume_from)
    self.step = self.saved_step = newest or 0
    self.consumed = Consumed()
    changes: list[Difference] = []
    if newest is not None:
      meta = self.checkpointer.meta(newest)
      self.consumed = Consumed(meta["samples"], meta["tokens"])
      if "weights_only" in meta:
        self.weights = WorkdirWeights(self.workdir, newest)
      else:
        fingerprint = self.data.fingerprint_at(saved_value(meta["config"], "data.seq"))
        changes = check_compatible(
          meta["config"], self.config, meta["data_fingerprint"], fingerprint, accept_data_change
        )
    if self.weights:
      changes = check_weights_fit(self.weights.directory, self.weights.model, self.config)
    return changes

  def restore_or_init(self) -> TrainState:
    """The state to start from: a checkpoint's, or a new one with given weights or random parameters."""
    self.log.show_start(self.step, self.consumed, self.weights.directory if self.weights else None)
    if self.weights:
      abstract = abstract_state(self.step_config, self.mesh)
      weights = self.weights.load({"params": abstract.params, "buffers": abstract.buffers})
      start = jax.jit(state_from_params, static_argnums=0, donate_argnums=(1, 2))
      return jax.block_until_ready(start(self.step_config, weights["params"], weights["buffers"]))
    if self.step:
      return self.checkpointer.restore(self.step, abstract_state(self.step_config, self.mesh))
    init = jax.jit(init_state, static_argnums=0, compiler_options=quick_compile_options())
    return jax.block_until_ready(init(self.step_config, jax.random.key(self.config.seed)))

  def main(self, request: StopRequest) -> int:
    """Trains and ends the run, unless it has ended before. Returns the exit code."""
    last_end = self.log.last_end()
    if self.step >= self.config.train.steps and last_end == (self.step, "finished"):
      self.log.show_finished_already(self.step, self.consumed)
      return 0
    self.state = self.restore_or_init()
    with self.log.open(self.step):
      request.at_once = False
      try:
        self.log.start(
          self.step,
          kernels_replaced=sorted(self.replacements.functions | self.replacements.calls),
          parameters=sum(array.size for array in jax.tree.leaves(self.state.params)),
          data_fingerprint=self.data.fingerprint,
          unique_tokens=len(self.data.train) * self.data.seq,
        )
        self.train(request)
        self.save()
        self.checkpointer.wait()
        return self.finish(request)
      except Diverged:
        self.log.end_failed(self.step, "diverged")
        raise
      except Exception as error:
        raise self.end_failed(error) from None if isinstance(error, UserError) else error.__cause__
      except KeyboardInterrupt:
        self.log.end_failed(self.step, "failed", error="interrupted")
        raise

  def finish(self, request: StopRequest) -> int:
    """Evaluates and samples, unless the run was stopped, and ends the log. Returns the exit code."""
    if request.stop_signal is None:
      try:
        # All is saved. Several processes stop where all see that one has got a signal.
        with request.stop_at_once(self.process_max is None):
          self.evaluate(self.config.eval.final_sequences, request)
          if self.config.sample.max_tokens:
            self.log.sample(self.step, self.consumed, self.sample())
      except Stopped as stop:
        request.stop_signal = signal.Signals(stop.signal)
    reason = "finished" if request.stop_signal is None else request.stop_signal.name
    self.log.end(self.step, reason, state_sha256(self.state))
    return 0 if request.stop_signal is None else 128 + request.stop_signal

  def end_failed(self, error: Exception) -> Exception:
    """Saves the updates that have no checkpoint, as far as possible, and ends the log. Returns what is to be raised."""
    advice = ""
    # The other processes are in a step or a save, and end with this one.
    if jax.process_count() == 1 and self.step and self.step not in self.saved_steps():
      folder = self.log.folder
      advice = rescue(self.save_again, self.config, folder, self.step, self.state, self.checkpoint_meta())
    self.log.end_failed(self.step, "failed", error=format_exception(error))
    if isinstance(error, UserError):
      return type(error)(f"{error}; {advice}") if advice else error
    if advice:
      self.log.console.print(advice, err=True)
    return error

  def train(self, request: StopRequest) -> None:
    """Trains until the last step or a stop request.

    The metrics of a step are logged while the device works on the next one. Raises Diverged as `log_step`.
    """
    train, steps = self.config.train, self.config.train.steps - self.step
    load = functools.partial(load_batch, self.data, train, sharding=self.batch_sharding)
    data_iterator = iterate_batches(self.data, train, self.consumed, steps, load)
    pending = None
    self.is_compiled = False
    with self.log.progress(self.step), contextlib.closing(MetricsReader()) as reader:
      while self.step < train.steps and request.stop_signal is None:
        with self.log.timer.measure("data"):
          batch, consumed = next(data_iterator)
        step_metrics = self.start_step(batch, consumed)
        if self.block_each_step:
          jax.block_until_ready(self.state)
        if self.process_max:
          step_metrics["stop_signal"] = self.process_max(request.received or 0)
        if pending:
          self.log_step(request, *pending)
        pending = (self.step, consumed, batch, reader.read(step_metrics))
        eval_is_due = self.step % self.config.eval.every == 0
        checkpoint_is_due = self.step % self.config.checkpoint.every == 0 or self.checkpoint_is_overdue
        if self.block_each_step or eval_is_due or checkpoint_is_due or self.step == train.steps:
          jax.block_until_ready(self.state)
          self.log_step(request, *pending)
          pending = None
        if eval_is_due and self.step < train.steps:
          self.evaluate(self.config.eval.sequences)
        if checkpoint_is_due:
          self.save_when_due()
        self.checkpointer.check()
      if pending:
        self.log_step(request, *pending)

  def start_step(self, batch: Batch, consumed: Consumed) -> dict[str, Any]:
    """Starts one step and returns its metrics, on the device, and its logged inputs. consumed: after the step."""
    model = self.config.model
    inputs = StepInputs.at(self.config, self.step, self.consumed.tokens, batch.target_tokens)
    start = time.monotonic()
    self.state, step_metrics = self.train_step(
      self.state, batch.tokens, batch.microbatches, inputs.as_arrays(model.param_dtype)
    )
    # Together with the state: whatever is raised from here on, the three can be saved.
    self.step, self.consumed = self.step + 1, consumed
    if not self.is_compiled:
      self.is_compiled = True
      self.log.compiled(time.monotonic() - start)
    return {**step_metrics, **inputs.logged(model)}

  def log_step(
    self, request: StopRequest, step: int, consumed: Consumed, batch: Batch, step_metrics: Future[TimedMetrics]
  ) -> None:
    """Waits for the metrics of a step and logs them.

    Sets `request.stop_signal` where a process of the run received a signal. Raises Diverged as `check_skipped`.

    step, consumed: completed updates, and what they consumed, after the step. step_metrics: of `start_step`, as
    `MetricsReader.read` gives them.
    """
    values, arrived = step_metrics.result()
    if stop_signal := int(values.pop("stop_signal", 0)):
      request.stop_signal = signal.Signals(stop_signal)
    self.skipped_in_a_row = check_skipped(self.config, step, values, self.saved_steps, self.log.console.print)
    self.log.step(step, consumed, batch, values, arrived)

  def evaluate(self, sequences: int, request: StopRequest | None = None) -> None:
    """Logs the loss and the bits per byte of `sequences` windows of the held-out split.

    Raises Stopped, on all processes at one batch, once one of them has received a signal that `request` notes.
    """
    sharding = NamedSharding(self.mesh, spec("batch", None))

    def load(ids):
      if request and self.process_max and (received := int(self.process_max(request.received or 0))):
        raise Stopped(received)
      return load_windows(self.data.heldout, ids, self.data.seq + 1, sharding)

    with self.log.timer.measure("eval"):
      result = self.evaluate_fn(
        lambda tokens: self.eval_step(self.state.params, self.state.buffers, tokens),
        load,
        self.data.heldout,
        self.microbatch_size,
        sequences,
      )
      self.log.evaluation(self.step, result)

  def save_when_due(self) -> None:
    """Saves; while updates are skipped not yet, but as soon as one is applied again.

    The weights are those of the checkpoint before, or they are what gives no finite gradients.
    """
    if self.skipped_in_a_row and not self.checkpoint_is_overdue:
      self.log.console.print(f"step {self.step}: the checkpoint waits until an update is applied again")
    self.checkpoint_is_overdue = self.skipped_in_a_row > 0
    if not self.checkpoint_is_overdue:
      self.save()

  def save(self) -> None:
    """Starts to save a checkpoint of the current step, unless it has one.

    While updates are skipped, older ones stay, of which one may be needed to go back to.
    """
    if self.step == self.saved_step:
      return
    with self.log.timer.measure("checkpoint"):
      self.log.publish()  # before the checkpoint, which needs the metrics of the steps before it
      self.checkpointer.save(self.step, self.state, self.checkpoint_meta(), rotate=not self.skipped_in_a_row)
    self.saved_step = self.step

  def save_again(self) -> None:
    """Saves a checkpoint of the current step after something has failed, and waits for it. Raises CheckpointError."""
    self.checkpointer.save(self.step, self.state, self.checkpoint_meta(), rotate=False)
    self.checkpointer.wait()

  def checkpoint_meta(self) -> dict[str, Any]:
    """What a checkpoint holds beside the state: the config, what was consumed, and what the data was."""
    meta = {"format_version": FORMAT_VERSION, "config": dataclasses.asdict(self.config)}
    meta |= {**self.consumed._asdict(), "data_fingerprint": self.data.fingerprint}
    return meta | {"tokenizer_fingerprint": self.data.tokenizer.fingerprint}

  def saved_steps(self) -> list[int]:
    """Steps that have a checkpoint, once the pending save is complete or has failed."""
    with contextlib.suppress(CheckpointError):
      self.checkpointer.wait()
    return self.checkpointer.steps()

  def sample(self) -> str:
    """What the model says after the prompt of the config."""
    config = self.config
    return self.sample_fn(
      graphdef(config.model.for_sampling()), self.state.params, self.state.buffers, self.data.tokenizer, config.sample,
      config.data.seq, config.seed, self.mesh,
    )  # fmt: skip
