"""A run: from a config and a workdir to trained parameters, resuming where an earlier process stopped."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from deepseek_jax.checkpoint.bucket import BucketCheckpointer, open_checkpointer, open_reader
from deepseek_jax.checkpoint.compatibility import check_compatible, check_weights_fit, saved_value
from deepseek_jax.checkpoint.manager import FORMAT_VERSION, Checkpointer
from deepseek_jax.checkpoint.weights import HuggingFaceWeights, WorkdirWeights, open_weights
from deepseek_jax.config import Config
from deepseek_jax.data.pipeline import Consumed, Data, iterate_batches, load_model_tokenizer, open_data
from deepseek_jax.distributed import barrier, broadcast_from_process0
from deepseek_jax.errors import ConfigError
from deepseek_jax.kernels.implementations import Replacements, import_libraries, replace_kernels
from deepseek_jax.mesh import check_x64, make_mesh, make_process_max, resolve_mesh
from deepseek_jax.model.transformer import graphdef
from deepseek_jax.plan.flops import training_flops
from deepseek_jax.plan.summary import config_summary, format_changed_fields
from deepseek_jax.sharding import spec
from deepseek_jax.storage import RunFolder, is_url
from deepseek_jax.training import metrics, report
from deepseek_jax.training.batch import Batch, load_batch, load_windows
from deepseek_jax.training.layer_aux import logged_metrics
from deepseek_jax.training.next_commands import next_commands
from deepseek_jax.training.progress import StepProgress
from deepseek_jax.training.schedule import StepInputs
from deepseek_jax.training.signals import StopRequest, stop_requests
from deepseek_jax.training.skipped import Diverged, check_skipped
from deepseek_jax.training.state import TrainState, abstract_state, init_state, state_from_params, state_sha256
from deepseek_jax.training.step import jit_eval_step, jit_train_step
from deepseek_jax.training.step_config import StepConfig
from deepseek_jax.training.timing import IntervalTimer, device_metrics


def _absolute(workdir: str) -> str:
  return workdir if is_url(workdir) else os.path.abspath(workdir)


def run(
  config: Config,
  workdir: str,
  evaluate: Callable[..., dict[str, float | int]],
  sample: Callable[..., str],
  select_kernels: Callable[[Config, str], tuple[Sequence[str], Sequence[str]]],
  accept_data_change: bool = False,
) -> int:
  """Trains until `train.steps`, or a stop signal, and returns the exit code: 0, or 130 / 143 after SIGINT / SIGTERM.

  Args:
    workdir: a folder or a URL. A run continues from the newest checkpoint in it.
    evaluate: as `evaluate.heldout.evaluate`.
    sample: as `generate.decoding.continue_prompt`.
    select_kernels: (config, local folder of the run) -> (functions, calls) of the Replacements. Process 0 calls it
      before any device is opened.
    accept_data_change: resume although the data differs from the checkpoint's.

  Raises:
    UserError: the config, the data or a checkpoint cannot be used.
    Diverged: `train.max_skipped` updates in a row were skipped.
  """
  check_x64(config.model)
  # These raise errors of the tokenizer and the bucket before any device is opened.
  load_model_tokenizer(config.data, config.model.vocab)
  run_folder = RunFolder(workdir)
  broadcast_from_process0(lambda: run_folder.download(metrics.RESUME_FILES))
  weights = None
  has_checkpoint = bool(config.init_from) and broadcast_from_process0(open_reader(workdir).steps)
  if config.init_from and not has_checkpoint:
    weights = open_weights(config.init_from)
    check_weights_fit(weights.directory, weights.model, config)
  functions, calls = broadcast_from_process0(lambda: select_kernels(config, run_folder.path))
  replacements = Replacements(frozenset(functions), frozenset(calls))
  on_mesh = resolve_mesh(config, len(jax.devices()))
  mesh = make_mesh(on_mesh.mesh)
  print(f"run      {config.name} in {_absolute(workdir)}")
  processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
  device = f"{mesh.size} x {mesh.devices.flat[0].device_kind} ({jax.default_backend()})"
  print(f"devices  {device}, jax {jax.__version__}{processes}")
  print(f"{config_summary(on_mesh)}\n{format_changed_fields(config)}", flush=True)
  flops = training_flops(config.model, config.data.seq).causal
  with (
    jax.set_mesh(mesh),
    replace_kernels(replacements),
    open_checkpointer(workdir, config.checkpoint) as checkpointer,
  ):
    # The other processes may wait while one packs the data, but not in a step: a collective would time out.
    with contextlib.redirect_stderr(sys.stdout if jax.process_index() else sys.stderr):
      data = open_data(config.data, config.model.vocab, config.seed)
    barrier("data")
    training_run = Run(
      config, workdir, run_folder, mesh, data, checkpointer, evaluate, sample, weights, flops, replacements
    )
    training_run.find_start(accept_data_change)
    return training_run.main()


class Run:
  """The mutable side of a run: state, counters, clocks and open files.

  Args, in addition to those of `run`:
    run_folder: the local folder of small files.
    checkpointer: as `open_checkpointer` gives it.
    weights: as `open_weights` gives them, to start from; or None.
    flops_per_token: model FLOPs of a training step per token.
    replacements: those that are set.
  """

  def __init__(
    self,
    config: Config,
    workdir: str,
    run_folder: RunFolder,
    mesh: Mesh,
    data: Data,
    checkpointer: Checkpointer | BucketCheckpointer,
    evaluate: Callable[..., dict[str, float | int]],
    sample: Callable[..., str],
    weights: HuggingFaceWeights | WorkdirWeights | None,
    flops_per_token: float,
    replacements: Replacements,
  ):
    self.config, self.workdir, self.run_folder, self.mesh, self.data = config, workdir, run_folder, mesh, data
    self.checkpointer, self.evaluate_fn, self.sample_fn = checkpointer, evaluate, sample
    self.weights, self.flops_per_token, self.replacements = weights, flops_per_token, replacements
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
    self.timer = IntervalTimer()  # since the last line of metrics
    self.writer: metrics.MetricsWriter = metrics.NullWriter()

  def find_start(self, accept_data_change: bool) -> None:
    """Sets `step` and `consumed` to those of the newest valid checkpoint, or to 0.

    A checkpoint without optimizer state, as a conversion writes it, gives weights to start from at step 0.
    Raises CheckpointError where the checkpoint does not fit the config.
    """
    newest = self.checkpointer.latest()
    self.step = self.saved_step = newest or 0
    self.consumed = Consumed()
    changes: list[tuple[str, Any, Any]] = []
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
    for path, old, new in changes:
      print(f"changed  {path}: {old!r} -> {new!r}")

  def restore_or_init(self) -> TrainState:
    """The state to start from: a checkpoint's, or a new one with given weights or random parameters."""
    if self.weights:
      print(f"start    from the weights in {self.weights.directory}: at step 0, with a new optimizer state", flush=True)
      abstract = abstract_state(self.step_config, self.mesh)
      weights = self.weights.load({"params": abstract.params, "buffers": abstract.buffers})
      start = jax.jit(state_from_params, static_argnums=0, donate_argnums=(1, 2))
      return jax.block_until_ready(start(self.step_config, weights["params"], weights["buffers"]))
    if self.step:
      seen = f"{self.consumed.samples:,} sequences, {self.consumed.tokens:,} tokens seen"
      print(f"resume   from the checkpoint of step {self.step} ({seen})")
      return self.checkpointer.restore(self.step, abstract_state(self.step_config, self.mesh))
    print("start    no checkpoint here: from scratch")
    return jax.block_until_ready(
      jax.jit(init_state, static_argnums=0)(self.step_config, jax.random.key(self.config.seed))
    )

  def main(self) -> int:
    """Trains and ends the run, unless it has ended before. Returns the exit code."""
    events = os.path.join(self.run_folder.path, metrics.EVENTS)
    ends = broadcast_from_process0(
      lambda: [[e["step"], e["reason"]] for e in metrics.read_jsonl(events) if e["event"] == "end"]
    )
    if self.step >= self.config.train.steps and ends[-1:] == [[self.step, "finished"]]:
      print(f"finished already: step {self.step} of {self.config.train.steps}; raise --config.train.steps to go on")
      return 0
    self.state = self.restore_or_init()
    self.open_files()
    try:
      return self.train_and_finish()
    finally:
      self.writer.close()

  def open_files(self) -> None:
    """On process 0: writes config.json, and opens metrics and events, cut to the step that the run starts from.

    Raises ConfigError where they cannot be written.
    """
    if jax.process_index():
      return
    try:
      self.writer = metrics.MetricsWriter(self.run_folder.path, self.config.log.tensorboard, self.step)
      with open(os.path.join(self.run_folder.path, "config.json.partial"), "w", encoding="utf-8") as f:
        json.dump(dataclasses.asdict(self.config), f, indent=2)
      os.replace(f.name, os.path.join(self.run_folder.path, "config.json"))
    except OSError as error:
      raise ConfigError(f"cannot write {error.filename}: {error.strerror}; use another --workdir") from None

  def train_and_finish(self) -> int:
    """Trains to the last step or a stop signal, saves, and writes the report. Returns the exit code."""
    self.writer.event(
      "resume" if self.step else "start",
      self.step,
      devices=f"{self.mesh.size} x {self.mesh.devices.flat[0].device_kind}",
      jax=jax.__version__,
      mesh=dict(self.mesh.shape),
      kernels_replaced=sorted(self.replacements.functions | self.replacements.calls),
      parameters=sum(array.size for array in jax.tree.leaves(self.state.params)),
      data_fingerprint=self.data.fingerprint,
      processes=jax.process_count(),
    )
    with stop_requests() as request:
      try:
        self.train(request)
      except Diverged:
        self.checkpointer.wait()
        self.writer.event("end", self.step, reason="diverged")
        self.write_report()
        raise
      self.save()
      self.checkpointer.wait()
    if request.stop_signal is None:
      self.finish()
    reason = "finished" if request.stop_signal is None else request.stop_signal.name
    digest = state_sha256(self.state)
    self.writer.event("end", self.step, reason=reason, state_sha256=digest)
    print(f"state_sha256 {digest}\nreport   {self.write_report()}")
    if request.stop_signal is None:
      return 0
    print(f"stopped by {reason} at step {self.step}, saved; the same command continues from there")
    return 128 + request.stop_signal

  def write_report(self) -> str:
    """Writes the report, on process 0, and returns its path or URL."""
    if jax.process_index() == 0:
      report.write_report(self.run_folder.path)
      self.publish()
    return os.path.join(self.workdir, "report.html")

  def train(self, request: StopRequest) -> None:
    """Trains until the last step or a stop request.

    The metrics of a step are read while the device works on the next one. Raises Diverged as `log_step`.
    """
    train, steps = self.config.train, self.config.train.steps - self.step
    load = functools.partial(load_batch, self.data, train, sharding=self.batch_sharding)
    data_iterator = iterate_batches(self.data, train, self.consumed, steps, load)
    pending = None
    self.is_compiled = False
    with StepProgress(self.step, train.steps) as self.progress:
      self.timer.reset()
      while self.step < train.steps and request.stop_signal is None:
        with self.timer.measure("data"):
          batch, consumed = next(data_iterator)
        step_metrics = self.start_step(batch)
        if self.block_each_step:
          jax.block_until_ready(self.state)
        if self.process_max:
          step_metrics["stop_signal"] = self.process_max(request.received or 0)
        self.consumed = consumed
        if pending:
          self.log_step(request, *pending)
        pending = (self.step, consumed, batch, step_metrics)
        eval_is_due = self.step % self.config.eval.every == 0
        checkpoint_is_due = self.step % self.config.checkpoint.every == 0
        if self.block_each_step or eval_is_due or checkpoint_is_due or self.step == train.steps:
          jax.block_until_ready(self.state)
          self.log_step(request, *pending)
          pending = None
        if eval_is_due and self.step < train.steps:
          self.evaluate(self.config.eval.sequences)
        if checkpoint_is_due:
          self.save()
        self.checkpointer.check()
      if pending:
        self.log_step(request, *pending)

  def start_step(self, batch: Batch) -> dict[str, Any]:
    """Starts one step and returns its metrics, on the device, and its logged inputs."""
    model = self.config.model
    inputs = StepInputs.at(self.config, self.step, self.consumed.tokens, batch.target_tokens)
    start = time.monotonic()
    self.state, step_metrics = self.train_step(
      self.state, batch.tokens, batch.microbatches, inputs.as_arrays(model.param_dtype)
    )
    if not self.is_compiled:
      self.is_compiled = True
      self.progress.print(f"compiled in {time.monotonic() - start:.1f} s")
      self.timer.reset()  # compilation does not count in the throughput
    self.step += 1
    return {**step_metrics, **inputs.logged(model)}

  def log_step(
    self, request: StopRequest, step: int, consumed: Consumed, batch: Batch, step_metrics: dict[str, Any]
  ) -> None:
    """Reads the metrics of a step, shows them, and writes a line every `log.every` steps.

    Sets `request.stop_signal` where a process of the run received a signal. Raises Diverged as `check_skipped`.

    step, consumed: completed updates, and what they consumed, after the step. step_metrics: of `start_step`.
    """
    values = jax.device_get(step_metrics)
    if stop_signal := int(values.pop("stop_signal", 0)):
      request.stop_signal = signal.Signals(stop_signal)
    skipped, mtp_losses = values.pop("skipped"), values.pop("mtp_loss", ())
    values |= {f"mtp_loss_{depth}": loss for depth, loss in enumerate(mtp_losses, 1)}
    timer, loss = self.timer, float(values["loss"])
    timer.tokens += batch.target_tokens
    if skipped["in_a_row"]:
      in_a_row, overflow = int(skipped["in_a_row"]), int(values.get("overflow", 0))
      check_skipped(self.config, step, in_a_row, overflow, self.saved_step, self.progress.print)
    values["bits_per_byte"] = loss * batch.target_tokens / math.log(2) / max(batch.target_bytes, 1)
    throughput = timer.throughput()
    tokens_per_second = throughput["tokens_per_second"]
    self.progress.update(step, loss, values["bits_per_byte"], tokens_per_second)
    if step % self.config.log.every and step != self.config.train.steps:
      return
    scalars, histograms = logged_metrics(self.config.model, values)
    scalars |= {"tokens": consumed.tokens, "samples": consumed.samples, "skipped": int(skipped["total"])}
    scalars |= throughput | device_metrics(self.mesh, tokens_per_second * self.flops_per_token)
    self.writer.write(step, scalars, histograms=histograms)
    timer.reset()

  def evaluate(self, sequences: int) -> None:
    """Prints and logs the loss and the bits per byte of `sequences` windows of the held-out split."""
    sharding = NamedSharding(self.mesh, spec("batch", None))
    with self.timer.measure("eval"):
      result = self.evaluate_fn(
        lambda tokens: self.eval_step(self.state.params, self.state.buffers, tokens),
        lambda ids: load_windows(self.data.heldout, ids, self.data.seq + 1, sharding),
        self.data.heldout,
        self.microbatch_size,
        sequences,
      )
    if math.isnan(result["loss"]) and self.config.model.moe.buffer_factor:
      self.progress.print(
        f"step {self.step}: the held-out loss is NaN. If the training loss is finite, assignments overflowed the expert "
        "buffers: raise model.moe.buffer_factor"
      )
    self.writer.event("eval", self.step, **result)
    self.publish()
    self.progress.print(
      f"step {self.step}: held-out loss {result['loss']:.4f}, {result['bits_per_byte']:.4f} bits per byte "
      f"({result['sequences']} sequences)"
    )

  def save(self) -> None:
    """Starts to save a checkpoint of the current step, unless it has one."""
    if self.step == self.saved_step:
      return
    meta = {"format_version": FORMAT_VERSION, "config": dataclasses.asdict(self.config)}
    meta |= {**self.consumed._asdict(), "data_fingerprint": self.data.fingerprint}
    meta |= {"tokenizer_fingerprint": self.data.tokenizer.fingerprint}
    with self.timer.measure("checkpoint"):
      self.publish()  # before the checkpoint, which needs the metrics of the steps before it
      self.checkpointer.save(self.step, self.state, meta)
    self.saved_step = self.step

  def publish(self) -> None:
    """Uploads the small files of the run to its bucket, if it has one; process 0 does."""
    if jax.process_index() == 0:
      self.run_folder.upload()

  def finish(self) -> None:
    """Ends a finished run with a held-out evaluation, a sample, and commands for what to do next."""
    config, workdir, prompt = self.config, self.workdir, self.config.sample.prompt
    self.evaluate(config.eval.final_sequences)
    text = self.sample_fn(
      graphdef(config.model.for_sampling()), self.state.params, self.state.buffers, self.data.tokenizer, config.sample,
      config.data.seq, config.seed, self.mesh,
    )  # fmt: skip
    self.writer.event("sample", self.step, prompt=prompt, text=text)
    print(f"sample\n{prompt}{text}\n\nwrote    {_absolute(workdir)}\nnext\n{next_commands(config, workdir)}")
