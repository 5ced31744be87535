"""What a run shows and writes: lines for people, metrics and events for the writers, and the small files of its folder."""

import contextlib
import math
import os
import pathlib
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from deepseek_jax.checkpoint.compatibility import Difference
from deepseek_jax.checkpoint.lock import lock_workdir
from deepseek_jax.config import Config
from deepseek_jax.console import Console, current_console
from deepseek_jax.data.pipeline import Consumed
from deepseek_jax.distributed import broadcast_from_process0, process_index
from deepseek_jax.errors import ConfigError, Stopped, UserError
from deepseek_jax.flags import load_config, shipped_configs, write_config
from deepseek_jax.mesh import resolve_mesh
from deepseek_jax.plan.flops import training_flops
from deepseek_jax.plan.summary import config_summary, format_differences, format_planned_tokens, format_stage
from deepseek_jax.stages import Stage
from deepseek_jax.storage import RunFolder, is_url
from deepseek_jax.training import report
from deepseek_jax.training.batch import Batch
from deepseek_jax.training.goodput import GoodputWriter, read_goodput
from deepseek_jax.training.layer_aux import logged_metrics
from deepseek_jax.training.metrics import EVENTS, MetricsWriter, WriterFactory, end_unopened, read_jsonl
from deepseek_jax.training.next_commands import next_commands, train_on_command
from deepseek_jax.training.schedule_check import changed_rate_warning, last_learning_rate, schedule_warnings
from deepseek_jax.training.signals import StopRequest
from deepseek_jax.training.skipped import heldout_nan_hint
from deepseek_jax.training.stragglers import Stragglers
from deepseek_jax.training.timing import IntervalTimer, device_metrics
from deepseek_jax.training.writer_thread import WriterThread
from deepseek_jax.training.writers import WRITERS


class RunLog:
  """The output of a run. All processes have one; only process 0 writes files, and its console alone shows lines.

  Args:
    run_config: of the whole run; its mesh sizes may be unresolved.
    stage: of the run.
    mesh: of the stage.
    workdir: a folder or a URL.
    run_folder: the local folder of small files.
    console: for what people read.
    goodput: of the run, with its clock.
    writers: opened in addition to those that the report is made of, and to tensorboard with `log.tensorboard`.
  """

  def __init__(
    self,
    run_config: Config,
    stage: Stage,
    mesh: Mesh,
    workdir: str,
    run_folder: RunFolder,
    console: Console,
    goodput: GoodputWriter,
    writers: Sequence[WriterFactory] = (),
  ):
    self.run_config, self.stage, self.config = run_config, stage, stage.config
    self.workdir, self.mesh, self.console, config = workdir, mesh, console, stage.config
    self._run_folder, self.folder = run_folder, run_folder.path
    names = [name for name in WRITERS if name != "tensorboard" or config.log.tensorboard]
    self._factories = [*(WRITERS[name] for name in names), *writers] if jax.process_index() == 0 else []
    self._writers: WriterThread | None = None  # while the log is open, on process 0
    self._flops_per_token = training_flops(config.model, config.data.seq).causal
    self.goodput, self.clock, self._stragglers = goodput, goodput.clock, Stragglers(goodput.clock, console)
    self._timer: IntervalTimer  # intervals between lines of metrics, while steps are trained
    self._has_hung = False
    self._has_warned = False  # that the report cannot be written
    self._update_progress: Callable[[int, str], None] = lambda step, text: None

  def show_run(self) -> None:
    """Shows the workdir and the devices."""
    processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    self.console.print(f"run      {self.config.name} in {_absolute(self.workdir)}")
    self.console.print(
      f"devices  {describe_machine(self.mesh)['devices']} ({jax.default_backend()}), jax {jax.__version__}{processes}"
    )

  def show_config(self, is_first: bool) -> None:
    """Shows what is trained and how. is_first: the stage is the first since the start, which shows the run's fields too."""
    config, schedule, steps = self.config, self.config.schedule, self.config.train.steps
    is_shipped = config.name in shipped_configs()
    base, base_name = (load_config(config.name), config.name) if is_shipped else (Config(), "the defaults")
    if self.stage.name:
      self.console.print(format_stage(self.run_config, self.stage))
    warmup = f"{schedule.warmup_tokens:,} tokens" if schedule.warmup_tokens else f"{schedule.warmup_steps:,} steps"
    last = last_learning_rate(config, self.stage.first_step, self.stage.first.tokens)
    if is_first:
      self.console.print(format_differences(self.run_config, base, base_name))
    self.console.print(
      f"{config_summary(resolve_mesh(config, self.mesh.size), jax.devices()[0].device_kind)}\n"
      f"learning rate    {schedule.kind}: {schedule.peak:g} after {warmup} of warm-up, {last:.3g} at step {steps:,}"
    )

  def show_changes(self, changes: Sequence[Difference], step: int, consumed: Consumed) -> None:
    """Shows the fields that differ from those of the checkpoint, of `step`, or of the weights that the run starts from."""
    for path, old, new in changes:
      self.console.print(f"changed  {path}: {old!r} -> {new!r}")
    for warning in changed_rate_warning(self.config, changes, step, consumed.tokens):
      self.console.print(f"warning  {warning}")

  def show_start(
    self, step: int, consumed: Consumed, weights: str | os.PathLike | None, is_same_process: bool = False
  ) -> None:
    """Shows what the run starts from: given `weights`, or the checkpoint of `step`, or nothing; and the tokens planned.

    is_same_process: it has trained the stage before.
    """
    if weights:
      self.console.print(f"start    from the weights in {weights}: at step {step}, with a new optimizer state")
    elif step:
      seen = f"{consumed.samples:,} sequences, {consumed.tokens:,} tokens seen"
      how = "goes on " if is_same_process else "resume   "
      self.console.print(f"{how}from the checkpoint of step {step} ({seen})")
    else:
      self.console.print("start    no checkpoint here: from scratch")
    self.console.print(format_planned_tokens(self.config, step, consumed.tokens))
    # The schedule of a stage may go on in the next one.
    for warning in schedule_warnings(self.config, step, consumed.tokens, self.stage.name) if self.stage.is_last else ():
      self.console.print(f"warning  {warning}")

  def show_repeats(self, repeated: int) -> None:
    """Shows how many of the stage's tokens earlier stages or epochs have consumed, if any."""
    if repeated:
      tokens = self.stage.last.tokens - self.stage.first.tokens
      self.console.print(
        f"data     {repeated:,} of the stage's {tokens:,} tokens are repeats: the sources have no more"
      )

  def last_end(self) -> tuple[int, str] | None:
    """(step, reason) of the newest end that the run's events have. All processes have to call this."""
    path = os.path.join(self.folder, EVENTS)
    ends = broadcast_from_process0(
      lambda: [(e["step"], e["reason"]) for e in read_jsonl(path) if e["event"] == "end"][-1:]
    )
    return tuple(ends[0]) if ends else None

  def has_evaluation(self, step: int) -> bool:
    """Whether the run's events have an evaluation of `step`. All processes have to call this."""
    path = os.path.join(self.folder, EVENTS)
    return broadcast_from_process0(lambda: any(e["event"] == "eval" and e["step"] == step for e in read_jsonl(path)))

  def show_finished_already(self, step: int, consumed: Consumed) -> None:
    """Shows that there is nothing to do after `step`, and how to go on."""
    steps = self.config.train.steps
    beyond = f", and train.steps={steps} asks for no more" if step > steps else ""
    command = train_on_command(self.config, self.workdir, step, consumed.tokens, jax.process_count())
    how = " append a stage to its config" if self.stage.name else f"\n  {command}"
    self.console.print(f"finished already, at step {step}{beyond}. To train on:{how}")

  @contextlib.contextmanager
  def open(self, step: int) -> Iterator[None]:
    """Opens the log of a run from `step` on for the block.

    Process 0 writes config.json and opens the writers.

    Raises ConfigError where the folder cannot be written, and what a writer that a program passed raises.
    """
    with contextlib.ExitStack() as stack:
      writers: list[MetricsWriter] = []
      for factory in self._factories:
        with self._user_errors() if factory in WRITERS.values() else contextlib.nullcontext():
          writer = factory(self.folder, step)
        stack.callback(writer.close)
        writers.append(writer)
      stack.callback(self._stragglers.close)
      self.clock.step = step
      if jax.process_index() == 0:
        with self._user_errors():
          write_config(self.run_config, self.folder)
          self.goodput.open(self.folder)
      if writers:
        self._writers = WriterThread(writers)
        stack.callback(self._writers.close)
      yield

  @contextlib.contextmanager
  def _user_errors(self) -> Iterator[None]:
    """Raises ConfigError for a file of the run that cannot be written in the block."""
    try:
      yield
    except OSError as error:
      path = error.filename or self.folder  # without a name where it is the content that has no room
      raise ConfigError(f"cannot write {path}: {error.strerror}; make room, or use another --workdir") from None

  def event(self, name: str, step: int, **values: Any) -> None:
    """Writes an event, see MetricsWriter. Raises what a writer raised since the last call."""
    if self._writers:
      self._writers.event(name, step, **values)

  def drain(self) -> None:
    """Waits until lines and events are written. Raises what a writer raised."""
    if self._writers:
      self._writers.drain()

  def start(self, name: str, step: int, **details: Any) -> None:
    """Writes the event `name` of a start, a resume or a stage, with `details` and the machine's."""
    stage = {"stage": self.stage.name} if self.stage.name else {}
    self.event(
      name,
      step,
      **stage,
      **describe_machine(self.mesh),
      **details,
    )

  @contextlib.contextmanager
  def progress(self, step: int) -> Iterator[None]:
    """Shows progress from `step` on, as `step` of this class updates it, during the block."""
    steps = self.config.train.steps
    with self.clock.measure("step"), self.console.step_progress(step, steps) as self._update_progress:
      self._stragglers.start_interval()
      self._timer = IntervalTimer(self.clock)
      yield

  def compiled(self, seconds: float) -> None:
    """Shows how long the program of a step took to compile, which does not count in the throughput."""
    self.console.print(f"compiled in {seconds:.1f} s")
    self._stragglers.start_interval()
    self._timer.start_interval(time.monotonic())

  def step(self, step: int, consumed: Consumed, batch: Batch, values: dict[str, Any], arrived: float) -> None:
    """Shows the metrics of an update, and writes them every `log.every` steps and after the last one.

    Args:
      step, consumed: completed updates, and what they consumed.
      batch: of the update.
      values: as `logged_metrics` takes them; "loss" is among them.
      arrived: when the device was done with the update, in time.monotonic(). The interval of its line ends there.

    Raises what a writer raised since the last call.
    """
    self.clock.finish_step(step)
    self.goodput.record(at_once=False)
    self._timer.tokens += batch.target_tokens
    loss = float(values["loss"])
    bits_per_byte = loss_in_bits_per_byte(loss, batch)
    throughput = self._timer.throughput(arrived)
    tokens_per_second = throughput["tokens_per_second"]
    speed = f"{tokens_per_second:,.0f} tok/s"
    self._update_progress(step, f"loss {loss:.4f}  {bits_per_byte:.3f} bits/byte  {speed}")
    if step % self.config.log.every and step != self.config.train.steps:
      return
    self._timer.start_interval(arrived)
    host_times = self._stragglers.share()
    if not self._writers:
      return
    counts: dict[str, float] = {"tokens": consumed.tokens, "samples": consumed.samples}
    counts |= throughput | device_metrics(self.mesh, tokens_per_second * self._flops_per_token)

    def make_line():  # in the thread of the writers
      scalars, histograms = logged_metrics(self.config.model, {**values, "bits_per_byte": bits_per_byte})
      return scalars | counts | (self._stragglers.metrics(*host_times) if host_times else {}), histograms

    self._writers.write(step, make_line)

  def evaluation(self, step: int, result: dict[str, float | int]) -> None:
    """Shows and writes the `result` of a held-out evaluation, and a report that has it."""
    if math.isnan(result["loss"]) and (hint := heldout_nan_hint(self.config)):
      self.console.print(f"step {step}: the held-out loss is NaN. If the training loss is finite, {hint}")
    self.event("eval", step, **result)
    self._write_report()
    self.console.print(
      f"step {step}: held-out loss {result['loss']:.4f}, {result['bits_per_byte']:.4f} bits per byte "
      f"({result['sequences']} sequences)"
    )

  def sample(self, step: int, consumed: Consumed, text: str) -> None:
    """Shows and writes the `text` that follows the prompt in a finished run, and shows what to do next."""
    prompt = self.config.sample.prompt
    self.event("sample", step, prompt=prompt, text=text)
    commands = next_commands(self.run_config, self.workdir, step, consumed.tokens, jax.process_count())
    self.console.print(f"sample\n{prompt}{text}\n\nwrote    {_absolute(self.workdir)}\nnext\n{commands}")

  def end_failed(self, step: int, reason: str, **details: str) -> None:
    """Writes the event of an end by an error and the report, as far as they can be written; the error is to be raised.

    reason: "diverged", or "failed" or "hung" with the `error` in `details`.
    """
    if self._has_hung and reason != "hung":
      return  # what the loop raises when the other processes end is no news
    for attempt in (
      self.drain,  # what a writer raised before is known
      lambda: self.event("end", step, reason=reason, **details),
      lambda: None if reason == "hung" else self.goodput.end(reason),
      self.drain,
      self._write_report,
    ):
      with contextlib.suppress(Exception):
        attempt()

  def show_stop(self, step: int, request: StopRequest) -> None:
    """Shows what the run stops for, if it does, before it saves."""
    if request.stop:
      self.console.print(f"stopping at step {step} for {request.cause()}")

  def end_hung(self, step: int, what: str) -> None:
    """As `end_failed`, of a hang that the watchdog describes; every process uploads the files that it has written."""
    self._has_hung = True
    self.end_failed(step, "hung", error=what)
    self._run_folder.upload()

  def end(self, step: int, request: StopRequest, digest: str) -> None:
    """Writes the event of the end and the report, and shows them. digest: the state's hash."""
    reason = request.stop.name if request.stop else "finished"
    self.event("end", step, reason=reason, state_sha256=digest)
    self.goodput.end(reason)
    self._write_report()
    if jax.process_index() == 0:
      self.console.print(str(read_goodput(self.folder)))
    self.console.print(f"state_sha256 {digest}\nreport   {os.path.join(self.workdir, 'report.html')}")
    if request.stop:
      self.console.print(f"stopped by {request.cause()} at step {step}, saved; the same command continues from there")

  def publish(self) -> None:
    """Writes what is not yet written, and uploads the small files of the run to its bucket, if it has one; process 0 does.

    Raises what a writer raised.
    """
    self.drain()
    if not self._has_hung:  # the time of a hang is in no record, and so the next start counts it as down
      self.goodput.record()
    if jax.process_index() == 0:
      self._run_folder.upload()

  def _write_report(self) -> None:
    self.drain()
    if jax.process_index() != 0:
      return
    path = os.path.join(self.folder, "report.html")
    try:
      report.write_report(self.folder)
    except OSError as error:  # it can be made again at any time
      with contextlib.suppress(OSError):
        os.remove(f"{path}.partial")
      if not self._has_warned:
        self.console.print(f"{path} cannot be written: {error.strerror}; the run goes on without a new one", err=True)
      self._has_warned = True
    self.publish()


def end_before_training(workdir: str, run_folder: RunFolder, stop: Stopped) -> None:
  """Shows that a run was stopped before its first step; process 0 writes the event, unless another run has `workdir`."""
  current_console().print(f"{stop} before the first step; the same command starts again")
  if process_index() != 0:
    return
  with contextlib.ExitStack() as stack, contextlib.suppress(OSError, UserError):
    if not is_url(workdir):
      checkpoints = pathlib.Path(os.path.abspath(workdir), "checkpoints")
      checkpoints.mkdir(parents=True, exist_ok=True)
      stack.enter_context(lock_workdir(checkpoints))
    end_unopened(run_folder.path, stop.notice)
    run_folder.upload()


def loss_in_bits_per_byte(loss: float, batch: Batch) -> float:
  """The mean `loss` in nats per token of `batch`, in bits per byte of its text."""
  return loss * batch.target_tokens / math.log(2) / max(batch.target_bytes, 1)


def describe_machine(mesh: Mesh) -> dict[str, Any]:
  """What the bits of a step depend on beside the config, for an event: devices, mesh, versions, flags and the code."""
  flags = {name.lower(): os.environ[name] for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS") if os.environ.get(name)}
  described = {"devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}", "jax": jax.__version__}
  return {**described, "mesh": dict(mesh.shape), "processes": jax.process_count(), **flags, **code_commit()}


def code_commit() -> dict[str, str]:
  """{"commit": hash of the commit that this code is of, "-dirty" where files differ}; {} without a git checkout of it."""
  root = pathlib.Path(__file__).parents[2]
  if not (root / ".git").exists():
    return {}
  command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
  try:
    return {"commit": subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()}
  except (OSError, subprocess.SubprocessError):  # no git here, or it does not trust the folder
    return {}


def _absolute(workdir: str) -> str:
  return workdir if is_url(workdir) else os.path.abspath(workdir)
