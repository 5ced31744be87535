"""The command line of `deepseek_jax.train`, as a user meets it: real processes."""

import os
import subprocess
import sys

import pytest

from deepseek_jax import train
from deepseek_jax.errors import ConfigError
from deepseek_jax.flags import enough_threads, load_config, split_overrides


def command(*arguments, module="deepseek_jax.train"):
  result = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, env=os.environ)
  return result.returncode, result.stdout, result.stderr


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (["--config=configs/tiny.py", "--config.train.stepz=3"], ["train.stepz", "did you mean 'train.steps'"]),
    (["--config=configs/tiny.py", "--config.train.steps=few"], ["train.steps must be int", "few"]),
    (["--config=configs/tiny.py", "--config.train.steps"], ["needs a value"]),
    (["--config=configs/none.py"], ["no config file 'configs/none.py'", "tiny.py"]),
    (["--confg=configs/tiny.py"], ["confg", "config"]),
    (["--config=configs/tiny.py", "stray"], ["unexpected argument 'stray'"]),
    ([], ["--config=FILE"]),
  ],
)
def test_user_errors_are_one_line_and_exit_2(arguments, words, capsys):
  with pytest.raises(ConfigError) as error:
    train.main(["train", *arguments])
  for word in words:
    assert word in str(error.value)
  assert "\n" not in str(error.value)


def test_error_has_no_traceback():
  code, out, err = command("--config=configs/tiny.py", "--config.model.layrs=3")
  assert code == 2 and out == ""
  assert err == "error: unknown config field 'model.layrs'; did you mean 'model.layers'? (--help lists all)\n"


def test_help_lists_every_field_without_importing_jax():
  code = "import sys; from deepseek_jax import train\ntry: train.main(['train', '--help'])\nexcept SystemExit: print('jax' in sys.modules)"
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
  assert "--config.model.attention.kv_heads=4\n      gqa: key and value heads" in out
  assert out.endswith("False\n")


def test_help_shows_the_values_of_the_given_config(capsys):
  with pytest.raises(SystemExit) as stop:
    train.main(["train", "--config=configs/67b.py", "--help"])
  assert stop.value.code == 0
  assert "--config.model.layers=95" in capsys.readouterr().out


def test_dry_run_of_67b_needs_none_of_its_devices(capsys):
  assert train.main(["train", "--config=configs/67b.py", "--dry_run", "--devices=512"]) == 0
  out = capsys.readouterr().out
  for words in (
    "67,425,001,472",
    "fsdp=256",
    "model.layers = 95",
    "2,000,003,530,752 in 105,964 steps",
    "GiB per device",
  ):
    assert words in out


def test_dry_run_checks_the_target_mesh():
  with pytest.raises(ConfigError, match=r"train\.microbatch=512 does not divide .*=1024"):
    train.main(["train", "--config=configs/67b.py", "--dry_run", "--devices=2048"])


def test_virtual_devices_get_threads_enough_for_their_collectives():
  for given, wanted in (
    ({}, None),
    ({"XLA_FLAGS": "--a --xla_force_host_platform_device_count=4"}, "16"),
    ({"JAX_NUM_CPU_DEVICES": "8"}, "32"),
    ({"JAX_NUM_CPU_DEVICES": "8", "NPROC": "5"}, "5"),
  ):
    enough_threads(given)
    assert given.get("NPROC") == wanted


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


@pytest.mark.parametrize("content", ["[]", "null", "3", '{"model.layers": 3}', '{"model": 3}'])
def test_a_config_that_is_no_mapping_of_sections(tmp_path, content):
  path = tmp_path / "config.json"
  path.write_text(content)
  with pytest.raises(ConfigError) as error:
    load_config(str(path), {"model.layers": "2"})
  assert "config.json" in str(error.value) and "\n" not in str(error.value)


def test_devices_are_for_dry_runs_only():
  with pytest.raises(ConfigError, match="--devices=4 is for --dry_run"):
    train.main(["train", "--config=configs/tiny.py", "--devices=4"])


def test_json_config_is_data(tmp_path):
  path = tmp_path / "config.json"
  path.write_text('{"train": {"steps": 7}}')
  assert load_config(str(path), {"train.global_batch": 8}).train.steps == 7
