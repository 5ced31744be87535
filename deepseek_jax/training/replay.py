"""Replay: logged steps are computed again from the checkpoint before them, and compared with the run's log bit for bit.

Nothing is written to the run, which may be going on meanwhile. This is the restart-replay contract of Megatron-LM's
determinism roadmap (issue 5785): a resumed run reproduces the uninterrupted one from the checkpoint on.
"""

import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding

from deepseek_jax.checkpoint.bucket import open_reader
from deepseek_jax.checkpoint.manager import CheckpointReader
from deepseek_jax.config import Config
from deepseek_jax.console import Console, SilentConsole, current_console, set_console
from deepseek_jax.data.pipeline import Data, iterate_batches
from deepseek_jax.distributed import barrier, broadcast_from_process0, process_index
from deepseek_jax.errors import CheckpointError, DataError
from deepseek_jax.kernels.implementations import Replacements, import_libraries, replace_kernels
from deepseek_jax.mesh import check_x64
from deepseek_jax.model.transformer import graphdef
from deepseek_jax.schema import from_dict
from deepseek_jax.sharding import spec
from deepseek_jax.stages import open_stage_data, resolve_stages
from deepseek_jax.storage import local_copy
from deepseek_jax.training.batch import load_batch
from deepseek_jax.training.corruption import HOW_TO
from deepseek_jax.training.layer_aux import logged_metrics
from deepseek_jax.training.loop import make_meshes, select_stage_kernels
from deepseek_jax.training.metrics import EVENTS, METRICS, SELFTEST, iterate_jsonl, read_jsonl, to_json
from deepseek_jax.training.run_log import describe_machine, loss_in_bits_per_byte
from deepseek_jax.training.schedule import StepInputs
from deepseek_jax.training.start import Start, load_state, start_at
from deepseek_jax.training.state import state_sha256
from deepseek_jax.training.step import jit_train_step
from deepseek_jax.training.step_config import StepConfig

STARTS = ("start", "resume", "stage")  # events with the machine; the first two are of a process
SHOWN = ("loss", "grad_norm")  # always; other numbers where they differ
MOST_SHOWN = 20

Line = Mapping[str, Any]  # of metrics.jsonl


class Recorded(NamedTuple):
  """What the log of a run has of the steps that are replayed.

  lines: {step: its line}, on process 0 alone.
  start: the event of the process, or the stage, that logged the last of them.
  is_newest: whether no process has gone on after that one, so that the saved config is its own.
  state_sha256: of the run's end at that step; None where it went on.
  """

  lines: dict[int, Line]
  start: dict[str, Any]
  is_newest: bool
  state_sha256: str | None


def replay(
  config: Config, workdir: str, step: int, select_kernels: Callable[[Config, str], tuple[Sequence[str], Sequence[str]]]
) -> int:
  """Computes step `step` again, from the newest checkpoint before it, and returns 0 if all is equal, else 1.

  Every logged step on the way is compared as well. Process 0 shows on the current console both values of each number
  that differs, and those of the loss and the gradient norm in any case.

  Args:
    config: the one that the run has saved.
    workdir: of the run: a folder or a URL.
    step: completed updates after it.
    select_kernels: as in `loop.run`; it gets a copy of the run's small files.

  Raises:
    DataError: the step was not logged.
    CheckpointError: there is no checkpoint before it, or it does not fit the config.
  """
  with set_console(current_console() if process_index() == 0 else SilentConsole()) as console:
    broadcast_from_process0(lambda: check_logged(workdir, step))
    reader = open_reader(workdir)
    checkpoint = reader.latest_before(step)
    if checkpoint is None:
      oldest = min(reader.steps(), default=None)
      raise CheckpointError(
        f"no checkpoint before step {step} in {workdir}: "
        + ("there is none at all" if oldest is None else f"the oldest is of step {oldest}: replay a later step")
      )
    recorded = read_recorded(workdir, checkpoint, step)
    if not config.stages and recorded.start["step"] < checkpoint:  # the process that logged the step saved that, too
      config = from_dict(Config, reader.meta(checkpoint)["config"])
    check_x64(config.model)
    stages = resolve_stages(config)
    with tempfile.TemporaryDirectory() as copy:
      copy_selftest(workdir, copy)
      replacements = select_stage_kernels(stages, select_kernels, copy)
    meshes = make_meshes(stages)
    data = open_stage_data(config, stages)
    barrier("data")
    with replace_kernels(replacements):
      with jax.set_mesh(meshes[0]):
        index, start = start_at(checkpoint, stages, data, workdir, reader, None, accept_data_change=False)
      stage, mesh = stages[index], meshes[index]
      if step > stage.config.train.steps:
        raise CheckpointError(
          f"step {step} is beyond the end of the stage of checkpoint {checkpoint}, step {stage.config.train.steps}, whose own "
          "checkpoint is missing or damaged: replay an earlier step"
        )
      count = f"{step - start.step} step{'' if step - start.step == 1 else 's'}"
      console.print(f"replay   step {step} of {workdir}, {count} from the checkpoint of step {start.step}")
      for warning in machine_warnings(recorded.start, mesh, data[index], replacements):
        console.print(f"warning  {warning}: the numbers may differ without a fault")
      for path, old, new in start.changes:
        doubt = "" if recorded.is_newest else ", perhaps after that step: the numbers may differ without a fault"
        console.print(f"{'warning' if doubt else 'changed'}  {path}: {old!r} -> {new!r}{doubt}")
      with jax.set_mesh(mesh):
        replayed, digest = compute(stage.config, step, start, data[index], mesh, reader, replacements, console)
    differs = broadcast_from_process0(lambda: compare(recorded, replayed, digest, step, console))
    return 1 if differs else 0


def check_logged(workdir: str, step: int) -> None:
  """Raises DataError, with the nearest logged steps, unless metrics.jsonl has a line of `step`."""
  below = above = None
  with local_copy(workdir, [METRICS]) as folder:
    for _, line in iterate_jsonl(os.path.join(folder, METRICS)):
      if line["step"] == step:
        return
      if line["step"] < step:
        below = line["step"]
      elif above is None:
        above = line["step"]
  nearest = " and ".join(str(logged) for logged in (below, above) if logged is not None)
  advice = f"the nearest logged steps are {nearest}" if nearest else f"{METRICS} has no lines"
  raise DataError(f"--replay={step}: {workdir} has not logged that step: {advice}")


def read_recorded(workdir: str, checkpoint: int, step: int) -> Recorded:
  """What the run has logged of the steps after `checkpoint` up to `step`. All processes have to call this."""
  lines: dict[int, Line] = {}

  def read() -> tuple[dict[str, Any], bool, str | None]:
    with local_copy(workdir, [METRICS, EVENTS]) as folder:
      for _, line in iterate_jsonl(os.path.join(folder, METRICS)):
        if checkpoint < line["step"] <= step:
          lines[line["step"]] = line
      events = read_jsonl(os.path.join(folder, EVENTS))
    # Of processes that logged the step before another went back and logged it again, the last one counts.
    starts = [i for i, event in enumerate(events) if event["event"] in STARTS and event["step"] < step]
    if not starts:
      raise DataError(f"{workdir}/{EVENTS} has no start before step {step}: nothing says how the step was computed")
    later = events[starts[-1] :]
    digests = [event.get("state_sha256") for event in later if event["event"] == "end" and event["step"] == step]
    is_newest = not any(event["event"] in STARTS[:2] for event in later[1:])
    return events[starts[-1]], is_newest, digests[0] if digests else None

  return Recorded(lines, *broadcast_from_process0(read))


def copy_selftest(workdir: str, folder: str) -> None:
  """Copies the run's choice of kernels to `folder`, on process 0."""
  if process_index() == 0:
    with local_copy(workdir, [SELFTEST]) as source:
      if os.path.exists(path := os.path.join(source, SELFTEST)):
        shutil.copy(path, folder)


def machine_warnings(event: Mapping[str, Any], mesh: Mesh, data: Data, replacements: Replacements) -> Iterator[str]:
  """What is other here than in the run, as its `event` of a start has it."""
  here = describe_machine(mesh) | {"data_fingerprint": data.fingerprint}
  here["kernels_replaced"] = sorted(replacements.functions | replacements.calls)
  for name in sorted(here.keys() | event.keys() & {"xla_flags", "libtpu_init_args", "commit"}):
    if (then := event.get(name)) != (now := here.get(name)):
      yield f"{name} was {then!r} and is {now!r}"


def compute(
  config: Config,
  last: int,
  start: Start,
  data: Data,
  mesh: Mesh,
  reader: CheckpointReader,
  replacements: Replacements,
  console: Console,
) -> tuple[dict[int, Line], str]:
  """({step: what a line of metrics has of it}, the state's hash at the end) of the updates from `start` to step `last`."""
  import_libraries()
  train, step_config = config.train, StepConfig.of(config, data.tokenizer.bos)
  program = step_config, graphdef(config.model), replacements
  train_step = jit_train_step(*program, static_microbatches=not train.batch_ramp_from)
  state, consumed = load_state(start, step_config, config.seed, mesh, reader), start.consumed
  load = functools.partial(load_batch, data, train, sharding=NamedSharding(mesh, spec(None, "batch", None)))
  lines = {}
  with console.step_progress(start.step, last) as update:
    batches = iterate_batches(data, train, consumed, last - start.step, load)
    for step, (batch, after) in enumerate(batches, start.step + 1):
      inputs = StepInputs.at(config, step - 1, consumed.tokens, batch.target_tokens)
      state, metrics = train_step(state, batch.tokens, batch.microbatches, inputs.as_arrays(config.model.param_dtype))
      values, consumed = jax.device_get(metrics) | inputs.logged(config.model), after
      jax.block_until_ready(state)  # programs in flight on virtual CPU devices can starve a collective
      bits_per_byte = loss_in_bits_per_byte(loss := float(values["loss"]), batch)
      scalars, _ = logged_metrics(config.model, {**values, "bits_per_byte": bits_per_byte})
      lines[step] = to_json(scalars | {"tokens": consumed.tokens, "samples": consumed.samples})
      update(step, f"loss {loss:.4f}")
  return lines, state_sha256(state)


def compare(recorded: Recorded, replayed: Mapping[int, Line], digest: str, step: int, console: Console) -> bool:
  """Shows how the `recorded` and the `replayed` lines compare. Returns whether a number differs, or the state."""
  differing = {at: names for at, line in sorted(recorded.lines.items()) if (names := differences(line, replayed[at]))}
  line, again, names = recorded.lines[step], replayed[step], differing.get(step, [])
  for name in [*SHOWN, *[name for name in names if name not in SHOWN][:MOST_SHOWN]]:
    values = line.get(name), again[name]
    console.print(f"{name:16} logged {values[0]!r}, replayed {values[1]!r}: {how_far(*values)}")
  if recorded.state_sha256:
    console.print(f"{'state_sha256':16} logged {recorded.state_sha256}, replayed {digest}")
  compared = len(line.keys() & again.keys())
  if differing:
    first = min(differing)
    console.print(
      f"differs  in {len(names)} of {compared} numbers of step {step}. Step {first} is the first that differs, in "
      f"{', '.join(differing[first][:MOST_SHOWN])}. {HOW_TO} says what to do"
    )
    return True
  if recorded.state_sha256 not in (None, digest):
    console.print(
      f"differs  in the state alone, after {compared} equal numbers of step {step}. {HOW_TO} says what to do"
    )
    return True
  others = f", and those of {len(recorded.lines) - 1} logged steps before it" if len(recorded.lines) > 1 else ""
  console.print(f"equal    bit for bit: {compared} numbers of step {step}{others}")
  return False


def differences(logged: Line, replayed: Line) -> list[str]:
  """Names of the numbers that both lines have, and that differ in a bit."""
  return [name for name in replayed if name in logged and json.dumps(logged[name]) != json.dumps(replayed[name])]


def how_far(logged: float | None, replayed: float | None) -> str:
  """How two numbers differ, in words. None: not finite, or not logged."""
  if json.dumps(logged) == json.dumps(replayed):
    return "equal"
  if logged is None or replayed is None:
    return "different"
  distance = abs(replayed - logged)
  return f"{distance:.3g} apart" + (f", {distance / abs(logged):.2g} of it" if logged else "")
