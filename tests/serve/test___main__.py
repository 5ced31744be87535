import pytest

from deepseek_jax.errors import CheckpointError, ConfigError, DataError
from deepseek_jax.serve import __main__ as program
from deepseek_jax.serve.listen import listen
from deepseek_jax.serve.messages import Settings
from tests.saved_models import VOCAB, write_hugging_face
from tests.serve.fake_engine import DEFAULTS, FakeEngine


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ([], "--workdir=DIR"),
    (["--workdir=a", "--from=b"], "give one model"),
    (["--from=b", "--step=3"], "--step=3"),
    (["--workdir=a", "--port=70000"], "--port"),
    (["--workdir=a", "--max_batch=0"], "max_batch"),
    (["--workdir=a", "--max_length=1"], "at least 2"),
    (["--workdir=a", "--host=no.such.host.invalid"], "cannot listen"),
    (["--workdir=a", "--scheduler=fast"], "continuous"),
    (["--workdir=a", "--max_batches=2"], "did you mean --max_batch"),
  ],
)
def test_bad_flags(flags, message):
  with pytest.raises(ConfigError, match=message):
    program.main(["serve", *flags])


def test_help(capsys):
  with pytest.raises(SystemExit) as stopped:
    program.main(["serve", "--help"])
  assert stopped.value.code == 0
  assert "--max_queue=64" in capsys.readouterr().out


def test_a_busy_port_is_found_before_the_weights_are_read():
  with listen("127.0.0.1", 0) as listener, pytest.raises(ConfigError, match="cannot listen"):
    program.main(["serve", "--workdir=no/such/folder", f"--port={listener.getsockname()[1]}"])


def test_what_the_flags_come_to(tmp_path, monkeypatch, capsys):
  """Settings and engine of a Hugging Face folder, up to where the engine would be loaded and the loop begin."""
  folder = write_hugging_face(tmp_path / "model", add_bos=False)
  seen = {}

  def make_engine(saved, tokenizer, flags):
    seen["flags"] = flags
    return FakeEngine(flags.max_batch, 48)

  def run(engine, settings, listener, announcement):
    seen.update(settings=settings, announcement=announcement)
    listener.close()
    return 0

  monkeypatch.setattr(program, "make_engine", make_engine)
  monkeypatch.setattr(program, "run", run)
  monkeypatch.setenv(program.API_KEY_VARIABLE, "secret")
  assert program.main(["serve", f"--from={folder}", "--port=0", "--host=0.0.0.0", "--max_batch=3", "--speculate"]) == 0
  settings = seen["settings"]
  assert (settings.model, settings.vocab, settings.max_length, settings.max_batch) == ("model", VOCAB, 48, 3)
  assert (settings.add_bos, settings.api_key, settings.local_hosts) == (False, "secret", None)
  assert settings.template_tokens == {"bos_token": "<bos>", "eos_token": "<eos>"}
  assert seen["flags"].speculate and seen["flags"].scheduler == "continuous"
  err = capsys.readouterr().err
  assert "DeepSeek LLM's format" in err and "without a key" not in err
  monkeypatch.delenv(program.API_KEY_VARIABLE)
  program.main(["serve", f"--from={folder}", "--port=0", "--host=0.0.0.0"])
  assert "without a key" in capsys.readouterr().err and seen["settings"].local_hosts is None
  program.main(["serve", f"--from={folder}", "--port=0"])
  assert "127.0.0.1" in seen["settings"].local_hosts and "--max_length" not in capsys.readouterr().err
  program.main(["serve", f"--from={folder}", "--port=0", "--max_length=49"])
  assert "--max_length=49 is longer than the 48 tokens" in capsys.readouterr().err
  with pytest.raises(ConfigError, match="give it as --from"):
    program.main(["serve", f"--workdir={folder}", "--port=0"])
  (tmp_path / "run" / "checkpoints").mkdir(parents=True)
  with pytest.raises(ConfigError, match="give it as --workdir"):
    program.main(["serve", f"--from={tmp_path / 'run'}", "--port=0"])
  with pytest.raises(CheckpointError):
    program.main(["serve", f"--from={tmp_path / 'nothing'}", "--port=0"])
  with pytest.raises(DataError):
    program.main(["serve", f"--from={folder}", "--port=0", "--tokenizer=no/such/tokenizer.json"])


def test_the_announcement_has_a_command_to_try():
  text = program.announcement(Settings(**DEFAULTS | {"api_key": "secret"}), "http://127.0.0.1:8000")
  assert "http://127.0.0.1:8000/v1" in text and "curl " in text and "Bearer KEY" in text and "secret" not in text
