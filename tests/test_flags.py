"""The command line of `deepseek_jax.train`, as a user meets it: real processes."""

import importlib
import os
import pathlib
import subprocess
import sys

import pytest
from absl import flags

from deepseek_jax import train
from deepseek_jax.config import Config
from deepseek_jax.errors import ConfigError, Stopped
from deepseek_jax.flags import load_config, parse_positional, run_program, shipped_configs, split_overrides
from deepseek_jax.schema import leaf_paths

ROOT = pathlib.Path(__file__).parents[1]


def command(*arguments, module="deepseek_jax.train", cwd=None, env=os.environ):
  argv = [sys.executable, "-m", module, *arguments]
  result = subprocess.run(argv, capture_output=True, text=True, cwd=cwd, env=env)
  return result.returncode, result.stdout, result.stderr


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (["--config=tiny", "--config.train.stepz=3"], ["train.stepz", "did you mean 'train.steps'"]),
    (["--config=tiny", "--config.train.steps=few"], ["train.steps must be an integer", "few"]),
    (["--config=tiny", "--config.data.verify=yes"], ["data.verify must be true or false, got 'yes'"]),
    (["--config=tiny", "--config.data.weights=a"], ["data.weights must be a list of numbers, as 0.5,1, got 'a'"]),
    (["--config=tiny", "--config.name="], ["name must be a relative path of printable names inside runs/, got ''"]),
    (["--config=tiny", "--config.trian.steps=3"], ["'trian.steps'; did you mean 'train.steps'?"]),
    (["--config=tiny", "--config.modle.atention.heads=3"], ["did you mean 'model.attention.heads'?"]),
    (["--config=tiny", "--config.steps=3"], ["did you mean 'train.steps' or 'schedule.steps'?"]),
    (["--config=tiny", "--config.model=3"], ["'model' is a section: set one of its fields, vocab, embed"]),
    (["--config=tiny", "--config.zzz=3"], ["unknown config field 'zzz' (--help"]),
    (["--foo=1"], ["unknown flag --foo; the flags are --config,"]),
    (["--wokdir=x"], ["unknown flag --wokdir; did you mean --workdir?"]),
    (["--train.steps=1"], ["by their path: --config.train.steps"]),
    (["--peak=1"], ["by their path: --config.schedule.peak"]),
    (["--config=tiny", "--dry_run=yes"], ["--dry_run must be true or false, got 'yes'"]),
    (["--config=tiny", "--devices=few"], ["--devices must be an integer, got 'few'"]),
    (["--config=tiny", "--config.train.steps"], ["needs a value"]),
    (["--config=configs/tinny.py"], ["no config file 'configs/tinny.py'", "did you mean --config=tiny?"]),
    (["--config=tiny.yaml"], ["no config file 'tiny.yaml'", "; a config file is Python (.py) or JSON (.json)"]),
    (["--confg=configs/tiny.py"], ["confg", "config"]),
    (["--config=tiny", "stray"], ["unexpected argument 'stray'"]),
    ([], ["--config=NAME", "--config=tiny"]),
  ],
)
def test_user_errors_are_one_line_and_exit_2(arguments, words, capsys):
  with pytest.raises(ConfigError) as error:
    train.main(["train", *arguments])
  for word in words:
    assert word in str(error.value)
  assert "\n" not in str(error.value)


def test_error_has_no_traceback():
  code, out, err = command("--config=tiny", "--config.model.layrs=3")
  assert code == 2 and out == ""
  assert err == "error: unknown config field 'model.layrs'; did you mean 'model.layers'? (--help lists all)\n"


def test_a_notice_before_a_run_has_begun_ends_the_program_with_its_code(capsys, monkeypatch):
  def main(argv):
    raise Stopped("SIGTERM", 143)

  monkeypatch.setattr(sys, "argv", ["program"])
  with pytest.raises(SystemExit) as end:
    run_program(main)
  assert end.value.code == 143 and capsys.readouterr().err == "stopped by SIGTERM\n"


def test_help_lists_every_field_without_importing_jax():
  code = "import sys; from deepseek_jax import train\ntry: train.main(['train', '--help'])\nexcept SystemExit: print('jax' in sys.modules)"
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
  assert "--config.model.attention.kv_heads=4\n      gqa: key and value heads" in out
  assert out.endswith("False\n")


def test_help_shows_the_values_of_the_given_config(capsys):
  with pytest.raises(SystemExit) as stop:
    train.main(["train", "--config=67b", "--help"])
  assert stop.value.code == 0
  assert "--config.model.layers=95" in capsys.readouterr().out


def test_dry_run_of_67b_needs_none_of_its_devices(capsys):
  assert train.main(["train", "--config=67b", "--dry_run", "--devices=512"]) == 0
  out = capsys.readouterr().out
  for words in (
    "67,425,001,472",
    "fsdp=256",
    "model.layers = 95",
    "fields differ from the defaults",
    "2,000,003,530,752 in 105,964 steps",
    "\ndevices          512\n",
    "GiB per device, of 512, as on TPUs (params ",
  ):
    assert words in out


def test_print_config_prints_every_field_and_stops(capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert train.main(["train", "--config=67b", "--print_config", "--devices=512", "--config.seed=3"]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert [line.split(" = ")[0].strip() for line in lines] == list(leaf_paths(Config))
  assert {"  seed = 3", "  mesh.fsdp = 256", "  model.norm_eps = 1e-06"} <= set(lines)
  assert not list(tmp_path.iterdir())


def test_dry_run_prints_the_fields_that_differ(capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  arguments = ["train", "--config=tiny", "--config.seed=3", "--config.train.steps=9", "--dry_run"]
  assert train.main(arguments) == 0
  out = capsys.readouterr().out
  assert "  train.steps = 9\n" in out and "  seed = 3\n" in out and "\nparameters " in out
  assert "model.norm_eps" not in out and "mesh.data =" not in out
  assert "devices          1, the fewest that the mesh takes: --devices=N plans for N\n" in out
  [memory] = [line for line in out.splitlines() if line.startswith("memory estimate")]
  assert " MiB per device, of 1, as on TPUs (params " in memory and " 0.0" not in memory
  assert train.main([*arguments, "--print_config"]) == 0
  out = capsys.readouterr().out
  assert "  model.norm_eps = 1e-06\n" in out and "\nparameters " in out


def test_list_configs_in_another_folder(tmp_path):
  """A process, as everything that an installed package has to find by itself; no jax is imported."""
  code = "import sys; from deepseek_jax import train\ntry: train.main(['train', '--list_configs'])\nexcept SystemExit as e: print(e.code, 'jax' in sys.modules)"
  env = {**os.environ, "PYTHONPATH": str(ROOT)}
  result = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, env=env
  )
  *lines, last = result.stdout.splitlines()
  assert last == "0 False"
  assert [line.split()[0] for line in lines] == list(shipped_configs())
  assert all("parameters" in line for line in lines)


@pytest.mark.parametrize("program", ["plan", "selftest"])
def test_other_programs_list_the_configs(program, capsys):
  main = importlib.import_module(f"deepseek_jax.{program}.__main__").main
  with pytest.raises(SystemExit) as stop:
    main([program, "--list_configs"])
  assert stop.value.code == 0 and "  v3 " in capsys.readouterr().out
  with pytest.raises(ConfigError, match="did you mean --config=v3"):
    main([program, "--config=vv3", *(["--topology=v5e:2x2"] if program == "plan" else [])])


def test_dry_run_checks_the_target_mesh():
  with pytest.raises(ConfigError, match=r"train\.microbatch=512 does not divide .*=1024"):
    train.main(["train", "--config=67b", "--dry_run", "--devices=2048"])


def test_a_reader_that_has_gone_is_no_traceback():
  command = f"{sys.executable} -m deepseek_jax.train --config=tiny --print_config | true; echo ${{PIPESTATUS[0]}}"
  done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
  assert (done.stdout, done.stderr) == ("141\n", "")


def test_overrides_in_both_spellings():
  rest, overrides = split_overrides(
    ["x", "--config=a.py", "--config.train.steps", "1e2", "--config.mesh.data=-1", "--config.data.verify"]
  )
  assert rest == ["x", "--config=a.py"]
  assert overrides == {"train.steps": "1e2", "mesh.data": "-1", "data.verify": "true"}


def test_a_failing_config_file_names_its_line(tmp_path):
  path = tmp_path / "bad.py"
  path.write_text("def get_config():\n  return 1 / 0\n")
  with pytest.raises(ConfigError, match=r"bad\.py:2: ZeroDivisionError"):
    load_config(str(path))


@pytest.mark.parametrize(
  ("name", "content", "words"),
  [
    ("a.yaml", "model: {}", "must be Python (.py, with a get_config()) or JSON (.json"),
    ("a.py", "x = 1", "a.py defines no function get_config()"),
    ("a.py", "get_config = 3", "a.py defines no function get_config()"),
    ("a.py", "import sys\ndef get_config():\n  sys.exit(0)", "a.py:3: it ends the program"),
    ("a.py", "raise SystemExit", "a.py:1: it ends the program"),
    ("a.py", "raise ValueError('first\\nsecond')", "a.py:1: ValueError: first"),
    ("a.py", "def get_config(size): pass", "get_config() missing 1 required"),
    ("a.json", "model: {}", "a.json:1: JSONDecodeError"),
    ("a.json", None, "a.json is a folder: give a file"),
    ("a.json", '{"model_type": "llama"}', "a.json is the config.json of a Hugging Face model, not of a run"),
    ("a.json", '{"dim": 8, "n_layers": 2}', "convert --from_model_args="),
  ],
)
def test_a_file_that_is_no_config_is_one_line(tmp_path, name, content, words):
  path = tmp_path / name
  path.mkdir() if content is None else path.write_text(content)
  with pytest.raises(ConfigError) as error:
    load_config(str(path))
  assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["[]", "null", "3", '{"model.layers": 3}', '{"model": 3}'])
def test_a_config_that_is_no_mapping_of_sections(tmp_path, content):
  path = tmp_path / "config.json"
  path.write_text(content)
  with pytest.raises(ConfigError) as error:
    load_config(str(path), {"model.layers": "2"})
  assert "config.json" in str(error.value) and "\n" not in str(error.value)


def test_devices_are_for_dry_runs_only():
  with pytest.raises(ConfigError, match="--devices=4 is for --dry_run"):
    train.main(["train", "--config=tiny", "--devices=4"])


def test_json_config_is_data(tmp_path):
  path = tmp_path / "config.json"
  path.write_text('{"train": {"steps": 7}}')
  assert load_config(str(path), {"train.global_batch": 8}).train.steps == 7


def test_positional_arguments_may_stand_anywhere():
  values = flags.FlagValues()
  flags.DEFINE_boolean("verdict", False, "", flag_values=values)
  flags.DEFINE_string("x", "steps", "", flag_values=values)
  _, runs = parse_positional(["compare", "a", "--verdict", "b", "--x", "tokens", "c"], values, "")
  assert runs == ["a", "b", "c"] and values.verdict and values.x == "tokens"
