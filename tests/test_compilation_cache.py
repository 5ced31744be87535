import os
import stat

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from deepseek_jax import compilation_cache
from deepseek_jax.compilation_cache import use_compilation_cache

pytestmark = pytest.mark.jax_version

OPTIONS = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"


@pytest.fixture
def user_folder(tmp_path, monkeypatch):
  """An empty cache folder of the user, and no cache yet; afterwards that of the tests again."""
  before = {name: getattr(jax.config, name) for name in OPTIONS}
  jax.config.update("jax_compilation_cache_dir", None)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  yield tmp_path
  for name, value in before.items():
    jax.config.update(name, value)
  jax_cache.reset_cache()


def test_programs_are_kept_in_a_folder_of_the_user_alone(user_folder, monkeypatch, capsys):
  monkeypatch.setattr(compilation_cache, "MIN_COMPILE_SECONDS", 0.0)
  use_compilation_cache()
  (folder,) = (user_folder / "deepseek_jax" / "compilations").iterdir()
  assert jax.config.jax_compilation_cache_dir == str(folder)
  for path in (folder, folder.parent):
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
  jax.jit(lambda a_name_for_this_test: 2 * a_name_for_this_test).lower(jnp.ones(3)).compile()
  before = set(folder.iterdir())
  assert len(before) > 1 and folder / "accepted" in before
  use_compilation_cache()  # again, as a second run of a process does
  assert set(folder.iterdir()) == before
  assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("variable", ["XLA_FLAGS", "LIBTPU_INIT_ARGS"])
def test_other_flags_have_another_folder(variable, monkeypatch):
  key = compilation_cache._key()
  monkeypatch.setenv(variable, "--other")
  assert compilation_cache._key() != key


def test_another_cpu_has_another_folder(monkeypatch):
  key = compilation_cache._key()
  monkeypatch.setattr(compilation_cache, "_cpu_features", lambda: "flags: sse2")
  assert compilation_cache._key() != key


def test_a_cache_that_is_set_stays(user_folder):
  jax.config.update("jax_compilation_cache_dir", str(user_folder / "mine"))
  use_compilation_cache()
  assert jax.config.jax_compilation_cache_dir == str(user_folder / "mine")
  assert not (user_folder / "deepseek_jax").exists()


def test_a_cpu_whose_programs_are_refused_has_no_cache(user_folder, monkeypatch, capfd):
  def complain(x):  # as XLA does, in C++
    os.write(2, b"E0000 cpu_aot_loader.cc:195] Target machine feature +prefer-no-gather is not supported\n" * 9)
    return x

  monkeypatch.setattr(compilation_cache.jnp, "sin", complain)
  use_compilation_cache()
  assert jax.config.jax_compilation_cache_dir is None
  first = capfd.readouterr().err
  assert first.count("\n") == 1 and "without a cache: XLA of jax" in first
  monkeypatch.undo()  # the next start has the answer
  monkeypatch.setenv("XDG_CACHE_HOME", str(user_folder))
  use_compilation_cache()
  assert jax.config.jax_compilation_cache_dir is None and capfd.readouterr().err == first


def test_a_folder_that_others_may_write_to_is_not_used(user_folder, capsys):
  folder = user_folder / "deepseek_jax" / "compilations"
  folder.mkdir(parents=True)
  folder.chmod(0o777)
  use_compilation_cache()
  assert jax.config.jax_compilation_cache_dir is None
  assert f"others may write to {folder}; remove it" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_one_line(user_folder, monkeypatch, capsys):
  (user_folder / "file").touch()
  monkeypatch.setenv("XDG_CACHE_HOME", str(user_folder / "file"))
  use_compilation_cache()
  assert jax.config.jax_compilation_cache_dir is None
  assert capsys.readouterr().err.count("\n") == 1


def test_old_programs_are_removed(user_folder, monkeypatch):
  use_compilation_cache()
  (folder,) = (user_folder / "deepseek_jax" / "compilations").iterdir()
  for age, name in enumerate(("new", "old", "older")):
    (folder / name).write_bytes(bytes(1000))
    os.utime(folder / name, (0, 10**9 - age))
  other_version = folder.parent / "other"
  other_version.mkdir()
  os.utime(other_version, (0, 10**9))
  size = sum(entry.stat().st_size for entry in folder.iterdir())
  monkeypatch.setattr(compilation_cache, "MAX_BYTES", size - 1500)
  jax.config.update("jax_compilation_cache_dir", None)
  use_compilation_cache()
  left = {entry.name for entry in folder.iterdir()}
  assert "new" in left and not left & {"old", "older"}
  assert not other_version.exists()
