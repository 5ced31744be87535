"""Runs in stages of training through the command line: boundaries, resumes inside and at the edge of each, and --stage."""

import os
import signal

import pytest

from deepseek_jax import train
from deepseek_jax.checkpoint.manager import Checkpointer, CheckpointReader
from deepseek_jax.data.pipeline import Consumed
from deepseek_jax.errors import CheckpointError, DataError
from deepseek_jax.flags import load_config
from deepseek_jax.generate.__main__ import main as generate_main
from deepseek_jax.stages import open_stage_data, resolve_stages
from tests.configs import RUN, write_texts
from tests.end_to_end.test_run import call, lines, run

# 4 updates of 8 x 16 bytes; 3 of 4 x 32 with YaRN and a schedule of its own; 3 of 2 x 64 on another mesh, of attention alone.
STAGES = """
    stages=(
      dict(name="short", until_tokens=500, data=dict(seq=16)),
      dict(name="long", until_tokens=896, data=dict(seq=32, weights=(0.5, 0.5)),
           train=dict(global_batch=4), model=dict(attention=dict(yarn=dict(factor=2, original_seq=16))),
           schedule=dict(kind="constant", peak=1e-4, factors=())),
      dict(name="longest", until_tokens=1280, data=dict(seq=64, order="by_length"), train=dict(global_batch=2, microbatch=2),
           reset_optimizer=True, optimizer=dict(trainable=("moe_layers/attn/*",)),
           mesh=dict(data=1, fsdp=2, tensor=2), eval=dict(every=100)),
    ),
"""
STEPS = {"short": 4, "long": 7, "longest": 10}  # at the end of each


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder with two texts, a config in stages and a data cache."""
  folder = tmp_path_factory.mktemp("stages")
  for name, words in (("text", 60), ("more", 70)):
    write_texts(folder / name, files=20, words=words)
  config = RUN.format(source=str(folder / "text"), cache=str(folder / "cache"), steps=0)
  for old, new in (
    (f"sources=({str(folder / 'text')!r},)", f"sources={(str(folder / 'text'), str(folder / 'more'))!r}"),
    (", batch_ramp_from=4, batch_ramp_tokens=800", ""),
    ("warmup_steps=4, steps=0", "warmup_steps=2, steps=100"),
    ("layers=3, first_dense_layers=1, num_mtp_layers=1", "layers=1, first_dense_layers=0, num_mtp_layers=0"),
    ("checkpoint=dict(every=3, keep=3)", "checkpoint=dict(every=2, keep=1)"),
    ("eval=dict(every=5", "eval=dict(every=100"),
    ("    name=", STAGES + "    name="),
  ):
    assert old in config, old
    config = config.replace(old, new)
  (folder / "config.py").write_text(config)
  return folder


@pytest.fixture(scope="module")
def whole(folder):
  """What a run of all stages prints, in the workdir "whole"."""
  return run(folder, "whole")


def events(folder, workdir, name):
  return [e for e in lines(folder, workdir, "events.jsonl") if e["event"] == name]


def test_a_run_trains_each_stage_to_its_tokens_and_keeps_a_checkpoint_of_each_boundary(folder, whole):
  metrics = lines(folder, "whole")
  assert [m["tokens"] for m in metrics] == [128, 256, 384, 512, 640, 768, 896, 1024, 1152, 1280]
  assert [m["samples"] for m in metrics] == [8, 16, 24, 32, 36, 40, 44, 46, 48, 50]
  assert [m["learning_rate"] for m in metrics[4:7]] == pytest.approx(
    [5e-5, 1e-4, 1e-4]
  )  # a schedule of its own: warm-up
  assert metrics[7]["learning_rate"] > 1e-3  # the schedule of the run goes on
  assert whole.count("config           ") == 1 and whole.count("learning rate    ") == 3
  reader = CheckpointReader(folder / "whole")
  assert reader.steps() == [4, 7, 10]
  assert [reader.meta(step)["stage"] for step in reader.steps()] == ["short", "long", "longest"]
  # A checkpoint has the config of its stage, with which it is sampled and evaluated.
  assert [reader.meta(step)["config"]["model"]["attention"]["yarn"]["factor"] for step in (4, 7, 10)] == [1, 2, 1]
  assert [e["stage"] for e in events(folder, "whole", "stage")] == ["long", "longest"]
  assert [e["step"] for e in events(folder, "whole", "eval")] == [4, 7, 10]
  [end] = events(folder, "whole", "end")
  assert (end["step"], end["reason"]) == (10, "finished")
  assert "stage            long, 2 of 3: steps 4 to 7, tokens 512 to 896, " in whole
  assert "finished already" in run(folder, "whole")


@pytest.mark.parametrize("step", [4, 6, *(pytest.param(step, marks=pytest.mark.chaos) for step in (3, 5, 7, 9))])
def test_a_resume_inside_and_at_the_edge_of_each_stage_is_exact(folder, whole, step):
  workdir = f"stopped-{step}"
  run(folder, workdir, f"--config.train.steps={step}", "--config.checkpoint.keep=9", "--config.sample.max_tokens=0")
  assert lines(folder, workdir)[-1]["step"] == step
  out = run(folder, workdir)
  assert f"resume   from the checkpoint of step {step} " in out
  assert events(folder, workdir, "end")[-1]["state_sha256"] == events(folder, "whole", "end")[-1]["state_sha256"]
  for key in ("loss", "grad_norm", "samples", "learning_rate"):
    assert [m[key] for m in lines(folder, workdir)] == [m[key] for m in lines(folder, "whole")]


def test_a_notice_while_a_boundary_is_saved_ends_the_run_there(folder, whole):
  write_manifest = Checkpointer._write_manifest

  def interrupt_and_write(checkpointer):
    if checkpointer._saving_step == STEPS["short"]:
      os.kill(os.getpid(), signal.SIGTERM)
    write_manifest(checkpointer)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Checkpointer, "_write_manifest", interrupt_and_write)
    assert "stopped by SIGTERM at step 4, saved" in run(folder, "noticed", code=143)
  assert CheckpointReader(folder / "noticed").steps()[-1] == STEPS["short"]
  assert not events(folder, "noticed", "stage") and [e["step"] for e in events(folder, "noticed", "eval")] == [4]


def test_no_stage_takes_what_an_earlier_one_took(folder, whole):
  config = load_config(f"{folder}/config.py")
  stages = resolve_stages(config)
  assert [(s.first_step, s.config.train.steps) for s in stages] == [(0, 4), (4, 7), (7, 10)]
  assert stages[1].first == Consumed(32, 512) and stages[1].last == Consumed(44, 896)
  targets = []
  for stage, data in zip(stages, open_stage_data(config, stages), strict=True):
    ids = data.window_ids(stage.first.samples, stage.last.samples - stage.first.samples)
    sizes = [len(split) for split in data.train._splits]
    for window in ids:
      source = int(window >= sizes[0])
      start = (window - source * sizes[0]) * data.seq
      targets += [(source, start + i) for i in range(data.seq)]
  assert len(targets) == stages[-1].last.tokens == len(set(targets))
  with pytest.raises(DataError, match="sample 3 is of an earlier stage than the one that starts with sample 44"):
    data.window_ids(3, 1)


def test_a_boundary_is_sampled_from_by_its_step(folder, whole, capsys):
  assert generate_main(["generate", f"--workdir={folder}/whole", "--step=7", "--prompt=a", "--max_tokens=2"]) == 0
  out, err = capsys.readouterr()
  assert out.startswith("a") and "checkpoint of step 7 in" in err
  with pytest.raises(CheckpointError, match=r"no checkpoint 5 in .* it holds \[4, 7, 10\]"):
    generate_main(["generate", f"--workdir={folder}/whole", "--step=5"])


def test_repeats_are_counted_where_the_sources_have_no_more(folder, whole):
  out = run(folder, "repeats", "--config.stages.longest.until_tokens=60_000", "--config.train.steps=8")
  tokens = 60_032 - 896
  [event] = [e for e in events(folder, "repeats", "stage") if e["stage"] == "longest"]
  assert 0 < event["repeated_tokens"] < tokens and f"{event['repeated_tokens']:,} of the stage's" in out


def test_a_run_starts_with_a_stage_from_given_weights(folder, whole):
  options = "--stage=long", f"--config.init_from={folder}/whole"
  out = run(folder, "from-long", *options)
  assert "start    from the weights in" in out and "at step 4" in out
  assert [m["tokens"] for m in lines(folder, "from-long")] == [640, 768, 896, 1024, 1152, 1280]
  assert CheckpointReader(folder / "from-long").steps() == [7, 10]
  assert "finished already" in call(train.main, f"--workdir={folder}/from-long")
  assert "tokens, and the stage longest starts at" in run(
    folder, "too-early", "--config.train.steps=3", "--config.sample.max_tokens=0"
  ) + run(folder, "too-early", "--stage=longest", f"--config.init_from={folder}/whole", code=2)


@pytest.mark.parametrize(
  ("options", "words"),
  [
    (["--stage=none"], "there is no stage 'none': stages has short, long, longest"),
    (["--stage=long"], "needs the weights of the stage before: give --config.init_from"),
    (["--config.stages.long.until_tokens=500"], "until_tokens counts from the start of the run, so it must rise"),
    (["--config.stages.long.until_tokens=510"], "the last update of the stage before ends at 512 tokens"),
    (["--config.stages.longest.reset_optimizer=false"], "longest) changes optimizer.trainable"),
    (["--config.stages.long.model.embed=64"], "stages[1] (long): no stage can change model.embed"),
    (["--config.stages.long.data.seq=x"], "--config.stages.long.data.seq must be an integer, got 'x'"),
    (
      ["--config.stages.long.data.sq=16"],
      "--config.stages.long.data.sq: unknown config field 'data.sq'; did you mean 'data.seq'",
    ),
    (
      ["--config.stages.long.until_token=9"],
      "unknown config field 'stages.until_token'; did you mean 'stages.until_tokens'",
    ),
    (
      ["--config.stages.long.checkpoint.every=2"],
      "--config.stages.long.checkpoint.every: no stage can change checkpoint.every",
    ),
    (["--config.stages.other.data.seq=16"], "which has short, long, longest"),
    (["--config.stages.long.mesh.fsdp=3"], "mesh"),
    (["--config.train.steps=3", "--stage=long", "--config.init_from=x"], "train.steps=3 ends before the stage long"),
  ],
)
def test_mistakes_are_one_message_before_anything_is_trained(folder, options, words):
  out = run(folder, "mistake", *options, code=2)
  assert words in out and len(out.strip().splitlines()) == 1
  assert not (folder / "mistake").exists()


def test_other_boundaries_are_refused_on_resume(folder, whole):
  run(folder, "moved", "--config.train.steps=5", "--config.sample.max_tokens=0")
  out = run(folder, "moved", "--config.stages.short.until_tokens=300", code=2)
  assert "other parts of the data" in out and "--accept_data_change" in out


def test_dry_run_shows_each_stage(folder):
  out = call(train.main, f"--config={folder}/config.py", "--dry_run")
  assert [line.split()[1] for line in out.splitlines() if line.startswith("stage ")] == ["short,", "long,", "longest,"]
  assert out.count("memory estimate") == 3 and "  stages = ('short', 'long', 'longest')\n" in out
  assert "reset_optimizer=True" in " ".join(out[out.index("longest, 3 of 3") :].split())
  cut = call(train.main, f"--config={folder}/config.py", "--dry_run", "--config.train.steps=5")
  assert "long, 2 of 3: steps 4 to 5, tokens 512 to 640" in cut


@pytest.mark.parametrize("step, checkpoint", [(5, 4), (9, 7)])
def test_a_step_after_a_boundary_is_replayed_from_there(folder, whole, step, checkpoint):
  """The first of a stage with a schedule of its own, and one of a stage with a new optimizer state on another mesh."""
  out = call(train.main, f"--workdir={folder}/whole", f"--replay={step}")
  assert f"from the checkpoint of step {checkpoint}" in out and "equal    bit for bit" in out and "warning" not in out
