"""Runs in Python: `run` trains, `load` opens what a run has left. Both give a `Run`.

import deepseek_jax

run = deepseek_jax.run("tiny", overrides={"model.layers": 6, "train.steps": 300})
run.metrics["loss"], run.sample("def "), run.report(), run.model
"""

import html
import os
import signal
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deepseek_jax.api import Model, load_workdir
from deepseek_jax.checkpoint.bucket import open_reader
from deepseek_jax.checkpoint.weights import has_hf_config
from deepseek_jax.config import Config
from deepseek_jax.console import Console
from deepseek_jax.errors import CheckpointError
from deepseek_jax.flags import file_exists, load_config
from deepseek_jax.notebook_console import NotebookConsole, in_notebook
from deepseek_jax.schema import flatten_config
from deepseek_jax.storage import RunFolder, local_copy
from deepseek_jax.train import train
from deepseek_jax.training import metrics
from deepseek_jax.training.goodput import Goodput, read_goodput
from deepseek_jax.training.metrics import WriterFactory
from deepseek_jax.training.report import write_report
from deepseek_jax.training.run_records import CONFIG, RunRecords, is_number, read_run


def run(
  config: Config | str,
  workdir: str | os.PathLike[str] | None = None,
  overrides: Mapping[str, Any] | None = None,
  *,
  console: Console | None = None,
  writers: Sequence[WriterFactory] = (),
  selftest: bool = True,
  accept_data_change: bool = False,
  resume_from: int | None = None,
) -> "Run":
  """Trains `config` in `workdir`, or goes on there, as `python -m deepseek_jax.train` does. Returns the finished Run.

  An interrupt (Ctrl-C, the stop button of a notebook) saves after the step that runs, and is raised then. The same call
  goes on from there.

  Args:
    config: a Config, the name of a shipped one ("tiny"), or a .py or .json file.
    workdir: a folder or a gs:// or s3:// URL. Default: runs/NAME, NAME from the config.
    overrides: {path of a field: value}, as {"model.layers": 6}.
    console: for all that the run shows. Default: a bar and a chart in a notebook, else the current console.
    writers, selftest, accept_data_change, resume_from: as `train.train`.

  Raises:
    UserError: the config, the data or a checkpoint cannot be used, or a file cannot be written any more.
    Diverged: `train.max_skipped` updates in a row were skipped.
    Corrupted: a device computed wrong, as `train.sdc_every` has found.
    KeyboardInterrupt: the run was interrupted, and is saved.
    SystemExit: with code 143, after SIGTERM or another notice to stop; the run is saved.
  """
  config = with_overrides(config, overrides or {})
  workdir = os.fspath(workdir) if workdir is not None else os.path.join("runs", config.name)
  if console is None and in_notebook():
    console = NotebookConsole()
    writers = [*writers, console.metrics_writer]
  code = train(config, workdir, selftest, accept_data_change, console, writers, resume_from=resume_from)
  if code == 128 + signal.SIGINT:
    raise KeyboardInterrupt
  if code:
    raise SystemExit(code)
  return Run(workdir)


def with_overrides(config: Config | str, overrides: Mapping[str, Any]) -> Config:
  """`config`, as `run` takes it, with `overrides`. Raises ConfigError for a config or a field that there is not."""
  if isinstance(config, Config):
    return load_config(None, flatten_config(config) | dict(overrides))
  return load_config(config, overrides)


def load(workdir: str | os.PathLike[str]) -> "Run":
  """The run in `workdir`, a folder or a gs:// or s3:// URL; finished or not.

  Raises CheckpointError for a Hugging Face folder, and for a folder without a run.
  """
  if has_hf_config(workdir):
    raise CheckpointError(
      f"{workdir} is a Hugging Face folder, and load opens the workdir of a run: deepseek_jax.load_pretrained({str(workdir)!r})"
    )
  if not file_exists(os.path.join(workdir, CONFIG)):
    raise CheckpointError(f"{workdir} holds no run: expected its {CONFIG}; give the --workdir that the run had")
  return Run(workdir)


class Run:
  """A run: what it has logged, its report, its newest checkpoint. What it wrote is read anew each time.

  Only `report` writes to the workdir.

  Attributes:
    workdir: its folder or URL.
  """

  def __init__(self, workdir: str | os.PathLike[str]):
    self.workdir = os.fspath(workdir)
    self._folder = RunFolder(self.workdir)
    self._model: Model | None = None
    self._model_steps: list[int] = []  # the checkpoints that were there when it was loaded

  def __repr__(self) -> str:
    """Name, workdir, state and held-out result, in one line."""
    records = self.records
    ends = [e for e in records.events if e["event"] in metrics.PROCESS_EVENTS][-1:]
    state = str(ends[0].get("reason")) if ends and ends[0]["event"] == "end" else "not ended"
    step = max([e["step"] for e in records.events] + records.steps[-1:].tolist(), default=0)
    heldout = [e.get("bits_per_byte") for e in records.events_by_step("eval")][-1:]
    bits = f", {heldout[0]:.4f} held-out bits per byte" if heldout and is_number(heldout[0]) else ""
    return f"<Run {records.config.get('name')} in {self.workdir}: {state} at step {step:,}{bits}>"

  @property
  def records(self) -> RunRecords:
    """All that the run has written. Raises DataError for a file that is damaged."""
    with local_copy(self.workdir, (CONFIG, metrics.METRICS, metrics.EVENTS)) as folder:
      return read_run(folder)

  @property
  def config(self) -> Config:
    """The config that the run had last."""
    with local_copy(self.workdir, (CONFIG,)) as folder:
      return load_config(os.path.join(folder, CONFIG), saved=True)

  @property
  def metrics(self) -> dict[str, np.ndarray]:
    """{name: [logged steps]}: "step" and every metric; NaN where it was not measured or not finite."""
    records = self.records
    columns = {"step": records.steps}
    for name, column in records.columns.items():
      columns[name] = np.full(len(records.steps), np.nan)
      columns[name][np.searchsorted(records.steps, column.steps)] = column.values
    return columns

  @property
  def evaluations(self) -> dict[str, np.ndarray]:
    """{name: [evaluations]}: "step", held-out "loss" in nats per token, "bits_per_byte" and "sequences"."""
    events = self.records.events_by_step("eval")
    names = [name for name in (events[0] if events else {}) if name not in ("event", "time")]
    return {name: np.asarray([np.nan if e.get(name) is None else e[name] for e in events]) for name in names}

  @property
  def goodput(self) -> Goodput:
    """Where the wall time went, over all restarts: `seconds` by category, `fraction`, and a line as its text."""
    with local_copy(self.workdir, (metrics.GOODPUT,)) as folder:
      return read_goodput(folder)

  def report(self) -> "ReportPage":
    """Writes report.html anew; a notebook shows the page."""
    self._folder.download((CONFIG, *metrics.RESUME_FILES))
    path = write_report(self._folder.path)
    self._folder.upload()
    return ReportPage(path)

  def sample(self, prompt: str | None = None, seed: int = 0, **fields: Any) -> str:
    """Text that the newest checkpoint writes after `prompt`, by default the config's. See `Model.sample`."""
    return self.model.sample(self.config.sample.prompt if prompt is None else prompt, seed, **fields)

  @property
  def model(self) -> Model:
    """The model of the newest checkpoint, on one device. Raises CheckpointError where there is none.

    It is kept until there is a newer one, with what was assigned to its params.
    """
    steps = open_reader(self.workdir).steps()
    if self._model is None or steps != self._model_steps:  # which of them verifies is known when all of it was read
      self._model, self._model_steps = load_workdir(self.workdir), steps
    return self._model


class ReportPage(os.PathLike):
  """The report of a run at `path`; a notebook shows it."""

  def __init__(self, path: str):
    self.path = path

  def __fspath__(self) -> str:
    return self.path

  def __repr__(self) -> str:
    return f"<report in {self.path}>"

  def _repr_html_(self) -> str:
    with open(self.path, encoding="utf-8") as file:
      page = html.escape(file.read(), quote=True)
    return f'<iframe srcdoc="{page}" style="width: 100%; height: 620px; border: 0"></iframe>'
