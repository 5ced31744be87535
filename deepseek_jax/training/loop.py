"""A run: from a config and a folder to trained parameters, resuming where an earlier process stopped."""

import collections
import contextlib
import dataclasses
import json
import math
import os
import shlex
import signal
import sys
import time

import jax
import numpy as np
from jax.sharding import NamedSharding

from deepseek_jax.checkpoint.bucket import open_checkpointer, open_reader
from deepseek_jax.checkpoint.compatibility import check_compatible, check_fits
from deepseek_jax.checkpoint.manager import FORMAT_VERSION
from deepseek_jax.checkpoint.weights import WorkdirWeights, open_weights
from deepseek_jax.config import Config
from deepseek_jax.data.pipeline import iterate_batches, load_model_tokenizer, open_data
from deepseek_jax.distributed import barrier, broadcast_from_process0
from deepseek_jax.errors import ConfigError
from deepseek_jax.kernels.implementations import Replacements, import_libraries, replace_kernels
from deepseek_jax.mesh import check_x64, make_mesh, make_process_max, resolve_mesh
from deepseek_jax.model.transformer import graphdef
from deepseek_jax.plan.flops import training_flops
from deepseek_jax.plan.summary import config_summary, format_changed_fields
from deepseek_jax.plan.topology import peak_flops
from deepseek_jax.sharding import spec
from deepseek_jax.storage import RunFolder, is_url
from deepseek_jax.training import metrics, report
from deepseek_jax.training.balance import load_metrics
from deepseek_jax.training.batch import Batch, place_rows
from deepseek_jax.training.progress import StepProgress
from deepseek_jax.training.schedule import schedules
from deepseek_jax.training.signals import stop_requests
from deepseek_jax.training.state import abstract_state, first_state, init_state, state_sha256
from deepseek_jax.training.step import make_eval_step, make_train_step


class Diverged(RuntimeError):
  """Too many updates in a row were skipped."""


def _shown(workdir):
  return workdir if is_url(workdir) else os.path.abspath(workdir)


def run(config: Config, workdir: str, evaluate, sample, select_kernels, accept_data_change=False) -> int:
  """Trains until `train.steps`, or a stop signal, and returns the exit code: 0, or 130 / 143 after SIGINT / SIGTERM.

  Args:
    config, workdir: what and where, a folder or a URL. Running again continues from the newest checkpoint in `workdir`.
    evaluate: as `evaluate.heldout.evaluate`. sample: as `generate.decoding.continue_prompt`.
    select_kernels: (config, folder of the run) -> [functions, calls] of the Replacements; process 0 calls it, and no device
      has been opened.
    accept_data_change: resume although the data is not what the checkpoint saw.

  Raises:
    UserError: the config, the data or a checkpoint cannot be used. Diverged: `train.max_skipped` updates in a row.
  """
  check_x64(config.model)
  load_model_tokenizer(config.data, config.model.vocab)  # an unfit one is an error before any device is touched
  files = RunFolder(workdir)
  broadcast_from_process0(lambda: files.download(metrics.RESUMED))  # and so is a bucket that cannot be written
  weights = None
  if config.init_from and not broadcast_from_process0(
    open_reader(workdir).steps
  ):  # a run that resumes has weights of its own
    weights = open_weights(config.init_from)
    check_fits(weights.directory, weights.model, config)
  functions, calls = broadcast_from_process0(lambda: select_kernels(config, files.path))
  on_mesh = resolve_mesh(config, len(jax.devices()))
  mesh = make_mesh(on_mesh.mesh)
  print(f"run      {config.name} in {_shown(workdir)}")
  processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
  device = f"{mesh.size} x {mesh.devices.flat[0].device_kind} ({jax.default_backend()})"
  print(f"devices  {device}, jax {jax.__version__}{processes}")
  print(f"{config_summary(on_mesh)}\n{format_changed_fields(config)}", flush=True)
  flops = training_flops(config.model, config.data.seq).causal
  with (
    jax.set_mesh(mesh),
    replace_kernels(Replacements(frozenset(functions), frozenset(calls))),
    open_checkpointer(workdir, config.checkpoint) as checkpointer,
  ):
    # Where one process packs others may wait, but not in a step: that would time out.
    with contextlib.redirect_stderr(sys.stdout if jax.process_index() else sys.stderr):
      data = open_data(config.data, config.model.vocab, config.seed)
    barrier("data")
    replaced = [*functions, *calls]
    this = Run(config, workdir, files, mesh, data, checkpointer, evaluate, sample, weights, flops, replaced)
    this.find_start(accept_data_change)
    return this.main()


class Run:
  """The mutable side of a run: state, counters, clocks and open files."""

  def __init__(
    self, config, workdir, files, mesh, data, checkpointer, evaluate, sample, weights, flops_per_token, replaced
  ):
    # replaced: kernels, by name or call, in whose place XLA's forms are. files: the folder that small files are written to.
    self.replaced, self.files = replaced, files
    self.weights, self.flops_per_token = weights, flops_per_token  # weights: to start from, or None
    self.config, self.workdir, self.mesh, self.data, self.checkpointer = config, workdir, mesh, data, checkpointer
    self.graphdef, self.evaluate_rows, self.sample_text = graphdef(config.model), evaluate, sample
    import_libraries()
    train, self.microbatch = config.train, config.train.microbatch or config.train.global_batch
    # Made here, because the thread that reads ahead has no mesh set.
    self.batch_sharding = NamedSharding(mesh, spec(None, "batch", None))
    # Without a ramp the number of microbatches is a constant of the program; with one it is an argument of it.
    static = () if train.batch_ramp_from else ("microbatches",)
    step = make_train_step(config, self.graphdef, data.tokenizer.bos)
    self.train_step = jax.jit(step, donate_argnames="state", static_argnames=static)
    self.row_nats = jax.jit(make_eval_step(config, self.graphdef, data.tokenizer.bos))
    moe, depths = config.model.moe, config.model.num_mtp_layers
    self.logged_rates = (
      {"learning_rate"} | ({"mtp_weight"} if depths else set()) | ({"bias_update_rate"} if moe.router_bias else set())
    )
    self.vote = make_process_max(mesh) if jax.process_count() > 1 else None
    # Several programs in flight on virtual CPU devices can starve a collective until it times out.
    self.one_at_a_time = jax.default_backend() == "cpu" and mesh.size > 1
    self.interval = collections.Counter()  # seconds and tokens since the last logged line

  def find_start(self, accept_data_change):
    """Step and samples of the newest checkpoint that verifies and that this run may continue, or 0.

    A checkpoint without a state of the optimizer, as a conversion writes it, is not continued but started from.
    """
    newest = self.checkpointer.latest()
    self.step = self.saved_step = newest or 0
    self.samples, changes = 0, []
    if newest is not None:
      meta = self.checkpointer.meta(newest)
      self.samples = meta["samples"]
      if "weights_only" in meta:
        self.weights = WorkdirWeights(self.workdir, newest)
      else:
        changes = check_compatible(
          meta["config"], self.config, meta["data_fingerprint"], self.data.fingerprint, accept_data_change
        )
    if self.weights:
      changes = check_fits(self.weights.directory, self.weights.model, self.config)
    for path, old, new in changes:
      print(f"changed  {path}: {old!r} -> {new!r}")

  def first_state(self):
    """The state to start from: the checkpoint's, or a new one, of given weights or random."""
    if self.weights:
      print(f"start    from the weights in {self.weights.directory}: at step 0, the optimizer anew", flush=True)
      abstract = abstract_state(self.config, self.mesh)
      weights = self.weights.load({"params": abstract.params, "buffers": abstract.buffers})
      start = jax.jit(first_state, static_argnums=0, donate_argnums=(1, 2))
      return jax.block_until_ready(start(self.config, weights["params"], weights["buffers"]))
    if self.step:
      print(f"resume   from the checkpoint of step {self.step} ({self.samples:,} sequences seen)")
      return self.checkpointer.restore(self.step, abstract_state(self.config, self.mesh))
    print("start    no checkpoint here: from scratch")
    return jax.block_until_ready(jax.jit(init_state, static_argnums=0)(self.config, jax.random.key(self.config.seed)))

  def main(self) -> int:
    """Trains and ends the run, unless it has ended before. Returns the exit code."""
    events = os.path.join(self.files.path, metrics.EVENTS)
    ends = broadcast_from_process0(
      lambda: [[e["step"], e["reason"]] for e in metrics.read(events) if e["event"] == "end"]
    )
    if self.step >= self.config.train.steps and ends[-1:] == [[self.step, "finished"]]:
      print(f"finished already: step {self.step} of {self.config.train.steps}; raise --config.train.steps to go on")
      return 0
    self.state = self.first_state()
    self.open_files()
    try:
      return self.run_to_the_end()
    finally:
      self.writer.close()

  def open_files(self):
    """Saves the config and opens metrics and events, cut to the step that the run starts from; process 0 does."""
    if jax.process_index():
      self.writer = metrics.NoWriter()
      return
    try:
      self.writer = metrics.MetricsWriter(self.files.path, self.config.log.tensorboard, self.step)
      with open(os.path.join(self.files.path, "config.json.partial"), "w", encoding="utf-8") as f:
        json.dump(dataclasses.asdict(self.config), f, indent=2)
      os.replace(f.name, os.path.join(self.files.path, "config.json"))
    except OSError as error:
      raise ConfigError(f"cannot write {error.filename}: {error.strerror}; use another --workdir") from None

  def run_to_the_end(self) -> int:
    """Trains to the last step or a stop signal, and leaves the run as it should be found."""
    device = self.mesh.devices.flat[0].device_kind
    facts = {"devices": f"{self.mesh.size} x {device}", "jax": jax.__version__, "mesh": dict(self.mesh.shape)}
    parameters = sum(array.size for array in jax.tree.leaves(self.state.params))
    facts |= {
      "kernels_replaced": self.replaced,
      "parameters": parameters,
      "data_fingerprint": self.data.fingerprint,
      "processes": jax.process_count(),
    }
    self.writer.event("resume" if self.step else "start", self.step, **facts)
    with stop_requests() as request:
      try:
        self.train(request)
      except Diverged:
        self.checkpointer.wait()
        self.writer.event("end", self.step, reason="diverged")
        self.report()
        raise
      self.save()
      self.checkpointer.wait()
    if request.signal is None:
      self.finish()
    reason = "finished" if request.signal is None else request.signal.name
    digest = state_sha256(self.state)
    self.writer.event("end", self.step, reason=reason, state_sha256=digest)
    print(f"state_sha256 {digest}\nreport   {self.report()}")
    if request.signal is None:
      return 0
    print(f"stopped by {reason} at step {self.step}, saved; the same command continues from there")
    return 128 + request.signal

  def report(self):
    """Where the report is, which process 0 writes."""
    if jax.process_index() == 0:
      report.write(self.files.path)
      self.publish()
    return os.path.join(self.workdir, "report.html")

  def train(self, request):
    """Updates until the last step or a stop request."""
    train = self.config.train
    stream = iterate_batches(self.data, train, self.samples, train.steps - self.step, self.place)
    pending = None
    self.compiled = False
    with StepProgress(self.step, train.steps) as self.progress:
      self.marked = time.monotonic()
      while self.step < train.steps and request.signal is None:
        with self.clock("data"):
          batch, samples = next(stream)
        values = self.update(batch)
        if self.one_at_a_time:
          jax.block_until_ready(self.state)
        if self.vote:
          values["stop"] = self.vote(request.received or 0)
        self.samples = samples
        if pending:
          self.record(request, *pending)  # the numbers of the step before, while the device works on this one
        pending = (self.step, samples, batch, values)
        due = [what for what in ("eval", "checkpoint") if self.step % getattr(self.config, what).every == 0]
        if self.one_at_a_time or due or self.step == train.steps:
          jax.block_until_ready(self.state)
          self.record(request, *pending)
          pending = None
        if "eval" in due and self.step < train.steps:
          self.evaluate(self.config.eval.sequences)
        if "checkpoint" in due:
          self.save()
        self.checkpointer.check()
      if pending:
        self.record(request, *pending)

  def update(self, batch):
    """Dispatches one update; returns its metrics with its rates among them."""
    now = schedules(self.config, self.step, self.samples * self.config.data.seq, batch.target_tokens)
    arrays = {name: np.asarray(rate, self.config.model.param_dtype) for name, rate in now.items()}
    started = time.monotonic()
    self.state, values = self.train_step(self.state, batch.tokens, batch.microbatches, arrays)
    if not self.compiled:
      self.compiled = True
      self.progress.say(f"compiled in {time.monotonic() - started:.1f} s")
      self.interval.clear()  # compilation is no part of the throughput
      self.marked = time.monotonic()
    self.step += 1
    return {**values, **{name: rate for name, rate in now.items() if name in self.logged_rates}}

  def record(self, request, step, samples, batch, values):
    """Reads the metrics of a step, shows them, logs them when due, and sees whether all are to stop."""
    values = jax.device_get(values)
    if stop := int(values.pop("stop", 0)):
      request.signal = signal.Signals(stop)
    skipped, loads, ahead = values.pop("skipped"), values.pop("load"), values.pop("mtp_loss", ())
    values = {name: float(value) for name, value in values.items()}
    values |= {f"mtp_loss_{depth}": float(loss) for depth, loss in enumerate(ahead, 1)}
    self.interval["tokens"] += batch.target_tokens
    if skipped["in_a_row"]:
      cause, cure = self.why_skipped(int(values.get("overflow", 0)))
      self.progress.say(f"step {step}: {cause}, update skipped ({skipped['in_a_row']} in a row); {cure}")
      if skipped["in_a_row"] >= self.config.train.max_skipped:
        raise Diverged(
          f"{skipped['in_a_row']} updates in a row up to step {step} were skipped, the last one because {cause}; "
          f"the newest checkpoint is of step {self.saved_step}. {cure}, or raise train.max_skipped"
        )
    values["bits_per_byte"] = values["loss"] * batch.target_tokens / math.log(2) / max(batch.target_bytes, 1)
    wall = time.monotonic() - self.marked
    step_seconds = max(wall - sum(self.interval[name] for name in ("data", "eval", "checkpoint")), 1e-9)
    rate = self.interval["tokens"] / (step_seconds + self.interval["data"])
    self.progress.update(step, values["loss"], values["bits_per_byte"], rate)
    if step % self.config.log.every and step != self.config.train.steps:
      return
    values |= {"tokens": samples * self.config.data.seq, "samples": samples, "skipped": int(skipped["total"])}
    values |= {"tokens_per_second": rate, "step_seconds": step_seconds}
    values |= {f"{name}_seconds": self.interval[name] for name in ("data", "eval", "checkpoint")}
    values["model_flops_per_second"] = rate * self.flops_per_token
    device = self.mesh.devices.flat[0]
    if peak := peak_flops(device.device_kind):
      values["mfu"] = values["model_flops_per_second"] / (peak * self.mesh.size)
    if memory := self.mesh.local_devices[0].memory_stats():
      values["memory_bytes"] = memory["peak_bytes_in_use"]
    scalars, shares = load_metrics(self.config.model, loads)
    self.writer.write(step, values | scalars, histograms=shares)
    self.interval.clear()
    self.marked = time.monotonic()

  def why_skipped(self, overflow):
    """(why an update was skipped, what helps); `overflow`: assignments over the expert buffers."""
    factor = self.config.model.moe.buffer_factor
    if overflow:
      cause = f"{overflow:,} assignments overflowed the expert buffers of {factor:g} times an even load"
      return cause, "raise model.moe.buffer_factor (0: room for any load)"
    return "gradients are not finite", "lower schedule.peak if it goes on"

  def evaluate(self, sequences):
    """Loss and bits per byte on the held-out split, shown and logged."""
    heldout = NamedSharding(self.mesh, spec("batch", None))
    with self.clock("eval"):
      result = self.evaluate_rows(
        lambda tokens: self.row_nats(self.state.params, self.state.buffers, tokens),
        lambda ids: place_rows(self.data.heldout, ids, self.data.seq + 1, heldout),
        self.data.heldout,
        self.microbatch,
        sequences,
      )
    if math.isnan(result["loss"]) and self.config.model.moe.buffer_factor:
      self.progress.say(
        f"step {self.step}: no held-out loss if assignments overflowed the expert buffer: raise model.moe.buffer_factor"
      )
    self.writer.event("eval", self.step, **result)
    self.publish()
    self.progress.say(
      f"step {self.step}: held-out loss {result['loss']:.4f}, {result['bits_per_byte']:.4f} bits per byte "
      f"({result['sequences']} sequences)"
    )

  def save(self):
    """Starts a checkpoint of the current step, unless it has one."""
    if self.step == self.saved_step:
      return
    meta = {"format_version": FORMAT_VERSION, "config": dataclasses.asdict(self.config)}
    meta |= {"samples": self.samples, "data_fingerprint": self.data.fingerprint}
    meta |= {"tokenizer_fingerprint": self.data.tokenizer.fingerprint}
    with self.clock("checkpoint"):
      self.publish()  # first: a step must not outlive the metrics of the steps before it
      self.checkpointer.save(self.step, self.state, meta)
    self.saved_step = self.step

  def publish(self):
    """Copies the small files of the run to its bucket, if it has one."""
    if jax.process_index() == 0:
      self.files.upload()

  def finish(self):
    """What a finished run shows: a held-out evaluation, a sample, and what to do next."""
    self.evaluate(self.config.eval.final_sequences)
    prompt, workdir = self.config.sample.prompt, self.workdir
    model = graphdef(self.config.model.for_sampling())
    weights, c = (self.state.params, self.state.buffers), self.config
    text = self.sample_text(model, *weights, self.data.tokenizer, c.sample, c.data.seq, c.seed, self.mesh)
    self.writer.event("sample", self.step, prompt=prompt, text=text)
    print(f"sample\n{prompt}{text}\n\nwrote    {_shown(workdir)}")
    here = os.path.relpath(sys.executable)
    python = shlex.quote(sys.executable if here.startswith("..") else here)
    folder = shlex.quote(f"--workdir={workdir}")
    print(
      "next\n"
      f"  {python} -m deepseek_jax.train {folder} --config.train.steps={2 * self.config.train.steps}    # train on\n"
      f"  {python} -m deepseek_jax.generate {folder} {shlex.quote(f'--prompt={prompt}')}    # sample\n"
      f"  {python} -m deepseek_jax.train --config=small    # a bigger config"
    )

  def place(self, ids):
    """Window ids [sequences] of a global batch -> Batch; a ramp's missing microbatches repeat the first and never run."""
    rows = ids.reshape(-1, self.microbatch)
    microbatches = len(rows)
    missing = self.config.train.global_batch // self.microbatch - microbatches
    padded = np.concatenate([rows, np.repeat(rows[:1], missing, 0)])
    tokens = place_rows(self.data.train, padded, self.data.seq + 1, self.batch_sharding)
    return Batch(tokens, microbatches, len(ids) * self.config.data.seq, int(self.data.train.target_bytes(ids).sum()))

  @contextlib.contextmanager
  def clock(self, name):
    """Adds the time of the block to `self.interval[name]`."""
    started = time.monotonic()
    yield
    self.interval[name] += time.monotonic() - started
