"""One run of the training loop: starts steps, logs, evaluates and saves, until the last step or a stop."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from deepseek_jax.checkpoint.bucket import BucketCheckpointer
from deepseek_jax.checkpoint.manager import FORMAT_VERSION, Checkpointer
from deepseek_jax.data.pipeline import Consumed, Data, iterate_batches
from deepseek_jax.errors import CheckpointError, Stopped, UserError, format_exception
from deepseek_jax.kernels.implementations import Replacements, import_libraries
from deepseek_jax.model.transformer import graphdef
from deepseek_jax.sharding import spec
from deepseek_jax.stages import Stage
from deepseek_jax.training.batch import Batch, load_batch, load_windows
from deepseek_jax.training.corruption import Corrupted, CorruptionCheck
from deepseek_jax.training.decisions import StepDecisions
from deepseek_jax.training.rescue import rescue
from deepseek_jax.training.run_log import RunLog
from deepseek_jax.training.schedule import StepInputs
from deepseek_jax.training.signals import StopRequest
from deepseek_jax.training.skipped import Diverged, check_skipped
from deepseek_jax.training.start import Start, load_state
from deepseek_jax.training.state import TrainState, state_sha256
from deepseek_jax.training.step import jit_eval_step, jit_train_step
from deepseek_jax.training.step_config import StepConfig
from deepseek_jax.training.timing import MetricsReader, TimedMetrics


class Trainer:
  """Trains a stage from a start to its last step: the state, its counters and pending saves.

  Args:
    stage: the mesh sizes of its config may be unresolved.
    workdir: a folder or a URL.
    mesh: the one that is set.
    data, checkpointer: as `open_data` and `open_checkpointer` give them.
    evaluate, sample: as those of `loop.run`.
    replacements: those that are set.
    start: as `find_start` gives it.
    log: for all that the run shows and writes beside checkpoints.
  """

  def __init__(
    self,
    stage: Stage,
    workdir: str,
    mesh: Mesh,
    data: Data,
    checkpointer: Checkpointer | BucketCheckpointer,
    evaluate: Callable[..., dict[str, float | int]],
    sample: Callable[..., str],
    replacements: Replacements,
    start: Start,
    log: RunLog,
  ):
    self.stage, self.config = stage, stage.config
    self.workdir, self.mesh, self.data, self.log = workdir, mesh, data, log
    config = self.config
    self.checkpointer, self.evaluate_fn, self.sample_fn = checkpointer, evaluate, sample
    self.replacements, self.start = replacements, start
    self.step, self.consumed = start.step, start.consumed
    self.saved_step = start.step
    import_libraries()
    train, self.microbatch_size = config.train, config.train.microbatch or config.train.global_batch
    # Made here, because no mesh is set in the thread that reads ahead.
    self.batch_sharding = NamedSharding(mesh, spec(None, "batch", None))
    # Without a batch ramp the number of microbatches is a constant of the program, else an argument.
    self.step_config = StepConfig.of(config, data.tokenizer.bos)
    program = self.step_config, graphdef(config.model), replacements
    self.train_step = jit_train_step(*program, static_microbatches=not train.batch_ramp_from)
    self.eval_step = jit_eval_step(*program)
    # Several programs in flight on virtual CPU devices can starve a collective until it times out.
    self.block_each_step = jax.default_backend() == "cpu" and mesh.size > 1
    check = config, self.step_config, mesh, replacements, log.event, self.saved_steps
    self.corruption_check = CorruptionCheck(*check) if train.sdc_every else None
    self.skipped_in_a_row = 0  # the last updates, as far as their metrics are read
    self.checkpoint_is_overdue = False

  def main(self, request: StopRequest) -> int:
    """Trains the stage, and ends the run if it is the last, unless it has ended before. Returns the exit code."""
    self.log.show_changes(self.start.changes, self.step, self.consumed)
    last_end = self.log.last_end()
    if self.step >= self.config.train.steps and last_end == (self.step, "finished"):
      self.log.show_finished_already(self.step, self.consumed)
      return 0
    self.state = self.load_state()
    self.decisions = StepDecisions(self.mesh, request, self.config.checkpoint.minutes)
    with self.log.open(self.step):
      request.at_once = False
      try:
        self.log.start(
          self.start.event,
          self.step,
          kernels_replaced=sorted(self.replacements.functions | self.replacements.calls),
          parameters=sum(array.size for array in jax.tree.leaves(self.state.params)),
          data_fingerprint=self.data.fingerprint,
          unique_tokens=len(self.data.train) * self.data.seq,
          repeated_tokens=self.data.repeated_targets,
        )
        if self.start.event == "resume" and not self.log.has_evaluation(self.step):
          self.evaluate_if_due()  # a notice has ended it
        self.train(request)
        if not self.stage.is_last:
          self.evaluate_at_end(request)
        self.log.show_stop(self.step, request)
        with self.log.clock.measure("checkpoint"):
          self.save()
          self.checkpointer.wait()
        return self.finish(request)
      except (Diverged, Corrupted) as error:  # nothing is saved: the state may be wrong
        self.log.end_failed(self.step, type(error).__name__.lower())
        raise
      except Exception as error:
        raise self.end_failed(error) from None if isinstance(error, UserError) else error.__cause__
      except KeyboardInterrupt:
        self.log.end_failed(self.step, "failed", error="interrupted")
        raise

  def load_state(self) -> TrainState:
    """Shows what the run starts from, and returns its state."""
    weights = self.start.weights
    self.log.show_start(self.step, self.consumed, weights.directory if weights else None, self.start.event == "stage")
    self.log.show_repeats(self.data.repeated_targets)
    with self.log.clock.measure("restore"):
      return load_state(self.start, self.step_config, self.config.seed, self.mesh, self.checkpointer)

  def evaluate_at_end(self, request: StopRequest, sample: bool = False) -> None:
    """The evaluation that ends a stage, and a sample, unless the run was stopped. A notice ends both at once."""
    if not request.stop:
      # Several processes stop where all see that one has received a notice.
      with contextlib.suppress(Stopped), request.stop_at_once(jax.process_count() == 1):
        self.evaluate(self.config.eval.final_sequences)
        if sample:
          with self.log.clock.measure("sample"):
            self.log.sample(self.step, self.consumed, self.sample())

  def finish(self, request: StopRequest) -> int:
    """Ends the log, unless another stage follows; after an evaluation and a sample if all is saved. Returns the exit code."""
    if self.stage.is_last:
      self.evaluate_at_end(request, sample=self.config.sample.max_tokens > 0)
    else:
      self.decisions.agree()  # of a notice during the save: to compile the next stage may take longer than is left
      if not request.stop:
        self.log.publish()
        return 0
    self.log.end(self.step, request, state_sha256(self.state))
    return request.stop.exit_code if request.stop else 0

  def end_failed(self, error: Exception) -> Exception:
    """Saves the updates that have no checkpoint, as far as possible, and ends the log. Returns what is to be raised."""
    advice = ""
    # The other processes are in a step or a save, and end with this one.
    if jax.process_count() == 1 and self.step and self.step not in self.saved_steps():
      folder = self.log.folder
      advice = rescue(self.save_again, self.log.run_config, folder, self.step, self.state, self.checkpoint_meta())
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
      while self.step < train.steps and not request.stop:
        with self.log.clock.measure("data"):
          batch, consumed = next(data_iterator)
        if self.corruption_check and self.corruption_check.is_due(self.step):
          with self.log.clock.measure("check"):
            self.corruption_check.run(self.step, self.consumed.tokens, self.state, batch)
        step_metrics = self.start_step(batch, consumed)
        if self.block_each_step:
          self.wait_for_device()
        step_metrics["decision"] = self.decisions.propose()
        if pending:
          self.log_step(*pending)
        pending = (self.step, consumed, batch, reader.read(step_metrics))
        checkpoint_is_due = self.step % self.config.checkpoint.every == 0 or self.decisions.save_is_due
        checkpoint_is_due |= self.checkpoint_is_overdue
        if self.block_each_step or self.evaluation_is_due() or checkpoint_is_due or self.step == train.steps:
          self.wait_for_device()
          self.log_step(*pending)
          pending = None
        self.evaluate_if_due()
        if checkpoint_is_due:
          self.save_when_due()
        self.checkpointer.check()
      if pending:
        self.log_step(*pending)

  def start_step(self, batch: Batch, consumed: Consumed) -> dict[str, Any]:
    """Starts one step and returns its metrics, on the device, and its logged inputs. consumed: after the step."""
    model = self.config.model
    inputs = StepInputs.at(self.config, self.step, self.consumed.tokens, batch.target_tokens)
    start = time.monotonic()
    with self.log.clock.measure("step" if self.is_compiled else "compile"):
      self.state, step_metrics = self.train_step(
        self.state, batch.tokens, batch.microbatches, inputs.as_arrays(model.param_dtype)
      )
    # Together with the state: whatever is raised from here on, the three can be saved.
    self.step, self.consumed = self.step + 1, consumed
    if not self.is_compiled:
      self.is_compiled = True
      self.log.compiled(time.monotonic() - start)
    return {**step_metrics, **inputs.logged(model)}

  def wait_for_device(self) -> None:
    """Waits until the device has done all steps that were started."""
    with self.log.clock.measure("device"):
      jax.block_until_ready(self.state)

  def log_step(self, step: int, consumed: Consumed, batch: Batch, step_metrics: Future[TimedMetrics]) -> None:
    """Waits for the metrics of a step, applies its decision and logs them. Raises Diverged as `check_skipped`.

    step, consumed: completed updates, and what they consumed, after the step. step_metrics: of `start_step`, as
    `MetricsReader.read` gives them.
    """
    with self.log.clock.measure("device"):
      values, arrived = step_metrics.result()
    self.decisions.apply(values.pop("decision"))
    self.skipped_in_a_row = check_skipped(self.config, step, values, self.saved_steps, self.log.console.print)
    self.log.step(step, consumed, batch, values, arrived)

  def evaluation_is_due(self) -> bool:
    """Whether `eval.every` asks for one after this step. The last step has a longer one."""
    return self.step % self.config.eval.every == 0 and self.step < self.config.train.steps

  def evaluate_if_due(self) -> None:
    """Evaluates if that is due. A notice ends it; then the step is saved, and the resumed run makes up for it."""
    if self.evaluation_is_due():
      with contextlib.suppress(Stopped):
        self.evaluate(self.config.eval.sequences)

  def evaluate(self, sequences: int) -> None:
    """Logs the loss and the bits per byte of `sequences` windows of the held-out split.

    Raises Stopped, on all processes at one batch, once one of them has received a notice.
    """
    sharding = NamedSharding(self.mesh, spec("batch", None))

    def load(ids):
      self.log.clock.tick()
      self.decisions.raise_stopped()
      return load_windows(self.data.heldout, ids, self.data.seq + 1, sharding)

    with self.log.clock.measure("eval"):
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
    with self.log.clock.measure("checkpoint"):
      self.log.publish()  # before the checkpoint, which needs the metrics of the steps before it
      self.checkpointer.save(self.step, self.state, self.checkpoint_meta(), rotate=not self.skipped_in_a_row)
    self.saved_step = self.step
    self.decisions.saved()

  def save_again(self) -> None:
    """Saves a checkpoint of the current step after something has failed, and waits for it. Raises CheckpointError."""
    self.checkpointer.save(self.step, self.state, self.checkpoint_meta(), rotate=False)
    self.checkpointer.wait()

  def checkpoint_meta(self) -> dict[str, Any]:
    """What a checkpoint holds beside the state: the config, what was consumed, and what the data was."""
    meta = {"format_version": FORMAT_VERSION, "config": dataclasses.asdict(self.config)}
    meta |= {**self.consumed._asdict(), "data_fingerprint": self.data.fingerprint}
    if self.stage.name:
      meta |= {"stage": self.stage.name, "data_regions": self.data.regions}
    return meta | {"tokenizer_fingerprint": self.data.tokenizer.fingerprint}

  def saved_steps(self) -> list[int]:
    """Steps that have a checkpoint, once the pending save is complete or has failed."""
    with self.log.clock.measure("checkpoint"), contextlib.suppress(CheckpointError):
      self.checkpointer.wait()
    return self.checkpointer.steps()

  def sample(self) -> str:
    """What the model says after the prompt of the config."""
    config = self.config
    return self.sample_fn(
      config.model, self.state.params, self.state.buffers, self.data.tokenizer, config.sample,
      config.data.seq, config.seed, self.mesh,
    )  # fmt: skip
