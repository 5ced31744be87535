"""The program `new`: every file that it writes passes a dry run, wrong answers are one line, and a terminal asks again."""

import json
import os
import pathlib
import pty
import re
import select
import signal
import subprocess
import sys
import time

import jsonschema
import pytest

from deepseek_jax import train
from deepseek_jax.errors import ConfigError
from deepseek_jax.flags import load_config
from deepseek_jax.new import layout
from deepseek_jax.new.__main__ import main

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
  """An empty folder, in which the test runs, without a terminal, and with a search of one plan."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "stdin", open(os.devnull))
  monkeypatch.setattr(layout, "MAX_PLANS", 1)
  return tmp_path


# Answers, with extremes: few and many tokens, one device and thousands, short and odd sequences, models that do not fit.
TABLE = [
  "--tokens=1e5",
  "--tokens=1e5 --model=moe --seq=2",
  "--tokens=1e13",
  "--hours=0.5 --model=moe",
  "--tokens=2e6 --seq=1000 --tokenizer=deepseek-v3",
  "--tokens=3e10 --topology=h200 --seq=64",
  "--tokens=1e13 --topology=v5p:16x16x24",
  "--tokens=1e12 --topology=2*v5e:16x16 --tokenizer=byte",
  "--hours=24 --topology=v5p:4x4x12",
  "--tokens=1e9 --topology=h100:3x8 --seq=1001",
  "--tokens=1e11 --topology=h100:1x8 --model=moe --tokenizer=byte",
]


@pytest.mark.parametrize("flags", TABLE)
def test_what_it_writes_passes_a_dry_run(flags, capsys):
  assert main(["new", *flags.split(), "--yes", "--out=configs/mine.py"]) == 0
  out = capsys.readouterr().out
  assert "wrote        configs/mine.py" in out
  config = load_config("configs/mine.py")
  wanted = re.search(r"--tokens=(\S+)", flags)
  tokens = config.train.steps * config.train.global_batch * config.data.seq
  assert not wanted or tokens == pytest.approx(float(wanted[1]), rel=0.06)
  assert train.main(["train", "--config=configs/mine.py", "--dry_run"]) == 0
  assert "warning" not in capsys.readouterr().out
  (dry_run,) = re.findall(r"deepseek_jax\.train (--config=\S+ --dry_run.*)", out)
  assert train.main(["train", *dry_run.split()]) == 0


def test_json_names_its_schema_and_is_the_same_config(capsys):
  arguments = ["new", "--model=moe", "--tokens=1e6", "--name=a/b"]
  assert main([*arguments, "--out=mine.json"]) == 0 and main(arguments) == 0
  assert load_config("mine.json") == load_config("b.py") and load_config("b.py").name == "a/b"
  tree = json.loads(pathlib.Path("mine.json").read_text())
  schema = json.loads(pathlib.Path(tree["$schema"]).read_text())
  jsonschema.Draft202012Validator(schema).validate(tree)
  out = capsys.readouterr().out
  assert "seq          256 (the default; --seq sets it)" in out and "--workdir=runs/a/b" in out


@pytest.mark.parametrize("flags", ["--model=dense --data=a'\\b.txt", "--model=moe"])
def test_python_is_formatted_and_says_why(flags):
  pathlib.Path("a'\\b.txt").write_text("some text")
  assert main(["new", *flags.split(), "--tokens=1e6", "--out=mine.py"]) == 0
  source = pathlib.Path("mine.py").read_text()
  compile(source, "mine.py", "exec")
  assert max(map(len, source.splitlines())) <= 120
  command = [sys.executable, "-m", "ruff", "format", "--check", "--config", str(ROOT / "pyproject.toml"), "mine.py"]
  assert subprocess.run(command, capture_output=True, check=False).returncode == 0
  written = re.search(r"python -m deepseek_jax\.new (.*?)\n\n", source, re.S)[1].split()
  assert "--tokens=1e+06" in written and "--seq=256" in written
  assert "(arXiv:2401.02954, eq. 2" in source and "an extrapolation" in " ".join(source.split())
  config = load_config("mine.py")
  if "data" in flags:
    assert config.data.sources == ("a'\\b.txt",)


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    ("--tokens=many", "--tokens=many: expected a positive number of tokens"),
    ("--tokens=-5", "--tokens=-5: expected a positive number"),
    ("--out=a/config.schema.json", "is the name of the schema that is written beside a JSON config"),
    ("--tokens=0", "--tokens=0: expected a positive number"),
    ("--tokens=1e999", "expected a positive number"),
    ("--tokens=1e300", "--tokens=1e300: expected at most 1e+16 tokens"),
    ("--hours=1e300", "--hours=1e300: expected at most 1e+06 hours"),
    ("--tokens=3h", "--tokens=3h: expected a positive number of tokens"),
    ("--hours=soon", "--hours=soon: expected a positive number of hours, as 12 or 0.5"),
    ("--tokens=1e6 --hours=3", "exclude each other"),
    ("--model=mamba", "--model=mamba: expected dense or moe"),
    ("--topology=v9:4x4", "--topology=v9:4x4: expected KIND:SHAPE"),
    ("--topology=v5p:4x4", "a v5p torus has 3 dimensions"),
    ("--data=none.txt", "there is no none.txt"),
    ("--data=,", "expected files, folders or globs"),
    ("--tokenizer=gpt2", "--tokenizer=gpt2: expected byte, deepseek-llm"),
    ("--seq=1", "expected a whole number from 2"),
    ("--seq=2.5", "expected a whole number from 2"),
    ("--name=../x", "must be a relative path of printable names inside runs/"),
    ("--out=mine.yaml", "--out=mine.yaml must end in .py or .json"),
    ("--out=there.py", "--out=there.py is there already: give --overwrite"),
    ("--name=there", "there.py is there already"),
    ("--tokens=1e5 --topology=v5p:8x8x8", "are 0 steps of 512 sequences"),
    ("--tokens=500", "10 are the fewest: ask for"),
    ("--sequence=3", "unknown flag --sequence"),
    ("--config.seed=3", "this program takes no --config.seed"),
  ],
)
def test_wrong_flags_are_one_line_and_write_nothing(flags, words):
  pathlib.Path("there.py").write_text("mine")
  with pytest.raises(ConfigError) as error:
    main(["new", *flags.split()])
  assert words in str(error.value) and "\n" not in str(error.value)
  assert os.listdir() == ["there.py"] and pathlib.Path("there.py").read_text() == "mine"


def test_overwrite_replaces_the_file():
  pathlib.Path("mine.py").write_text("mine")
  assert main(["new", "--tokens=1e5", "--overwrite"]) == 0
  assert load_config("mine.py").name == "mine"


def test_help_needs_no_jax():
  code = (
    "import sys; from deepseek_jax.new.__main__ import main\n"
    "try: main(['new', '--help'])\nexcept SystemExit: print('jax' in sys.modules)"
  )
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
  assert "--hours=None" in out and out.endswith("False\n")


class Terminal:
  """The program at a terminal of its own: `read` until a text comes, `send` keys."""

  def __init__(self, *arguments):
    self.file, program_end = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    # In a session of its own, the terminal that a process opens first is the one whose Ctrl-C it gets.
    shell = f'exec "$@" <>{os.ttyname(program_end)} >&0 2>&1'
    self.process = subprocess.Popen(
      ["sh", "-c", shell, "sh", sys.executable, "-m", "deepseek_jax.new", *arguments],
      env=environment, start_new_session=True,
      preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where the tests run in the background
    )  # fmt: skip
    os.close(program_end)
    self.shown = ""

  def read(self, until, seconds=120):
    """All that is shown up to `until`, which has to come."""
    end = time.monotonic() + seconds
    while until not in self.shown:
      assert time.monotonic() < end, f"no {until!r} in {self.shown!r}"
      if select.select([self.file], [], [], 1)[0]:
        try:
          self.shown += os.read(self.file, 4096).decode(errors="replace")
        except OSError:  # the program has ended, or has not yet opened the terminal
          assert self.process.poll() is None, f"no {until!r} in {self.shown!r}"
          time.sleep(0.1)
    found, _, self.shown = self.shown.partition(until)
    return found

  def send(self, keys):
    os.write(self.file, keys.encode())

  def interrupt(self):
    """Presses Ctrl-C until the program says so: Python does not see one that comes just before it waits for a line."""
    while True:
      self.send("\x03")
      try:
        return self.read("interrupted", seconds=2)
      except AssertionError:
        assert self.process.poll() is None, self.shown

  def exit_code(self):
    code = self.process.wait(60)
    os.close(self.file)
    return code


def test_at_a_terminal_nonsense_is_asked_again(folder):
  pathlib.Path("taken.py").write_text("mine")
  terminal = Terminal("--seq=64")
  for question, answers in (
    ("Which kind of model", [("7", "expected dense or moe, got '7'"), ("moe", "")]),
    ("On which hardware", [("v5p:9", "a v5p torus has 3 dimensions"), ("toaster", "expected KIND:SHAPE"), ("", "")]),
    ("How many tokens", [("lots", "expected a positive number"), ("-2e9", "expected a positive"), ("100", "")]),
    ("Which text", [("nowhere/*.txt", "no file matches nowhere/*.txt"), ("", "")]),
    ("Which tokenizer", [("tokenizer.json", "cannot read tokenizer.json"), ("byte", "")]),
    ("experiment called", [("taken", "taken.py is there already"), ("../x", "inside runs/"), ("good", "")]),
    # 100 tokens are too few: all is asked again, and an empty line keeps an answer.
    ("10 are the fewest", []),
    ("Which kind of model, dense or moe? [moe]", [("dense", "")]),
    ("On which hardware", [("", "")]),
    ("How many tokens, or hours? [100]", [("1e5", "")]),
    ("Which text", [("", "")]),
    ("Which tokenizer", [("", "")]),
    ("experiment called? [good]", [("", "")]),
  ):
    terminal.read(question)
    for answer, reason in answers:
      terminal.send(f"{answer}\n")
      if reason:
        terminal.read(reason)
  shown = terminal.read("--workdir=runs/good")
  assert terminal.exit_code() == 0 and "--config=good.py --dry_run" in shown
  config = load_config("good.py")
  assert (config.data.seq, config.data.tokenizer, config.model.moe.num_routed_experts) == (64, "byte", 0)
  assert pathlib.Path("taken.py").read_text() == "mine"


def test_bytes_that_are_no_text_are_asked_again(folder, monkeypatch):
  """As where the terminal of a UTF-8 locale sends Latin-1."""
  monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")
  terminal = Terminal()
  terminal.read("Which kind of model")
  os.write(terminal.file, b"\xff\n")
  terminal.read("expected text in utf-8")
  terminal.read("Which kind of model")
  terminal.interrupt()
  assert terminal.exit_code() == 130


@pytest.mark.parametrize("interrupted", [True, False])
def test_ctrl_c_and_the_end_of_input_write_nothing(folder, interrupted):
  terminal = Terminal()
  terminal.read("Which kind of model")
  terminal.send("dense\n")
  terminal.read("On which hardware")
  if interrupted:
    terminal.interrupt()
  else:
    terminal.send("\x04")
    terminal.read("error: the input ended at the question for --topology")
  assert terminal.exit_code() == (130 if interrupted else 2) and not os.listdir(folder)
