"""Objects in buckets, and what comes of connections that break: on gs:// and s3:// alike where nothing else is said."""

import pathlib
import time

import pytest

from deepseek_jax.errors import StorageError
from deepseek_jax.storage import ObjectStore, RunFolder, is_safe_name, local_copy, map_parallel

BOTH = pytest.mark.parametrize("scheme", ["gs", "s3"])


@BOTH
def test_objects_are_written_read_listed_and_deleted(buckets, scheme):
  store = ObjectStore(f"{scheme}://bucket-a/run/")
  store.write("a b/c", b"1")
  store.write("a/d", b"2")
  assert buckets.objects["bucket-a"].keys() == {"run/a b/c", "run/a/d"}
  assert store.list_names() == ["a b/c", "a/d"]
  assert store.list_names("a/") == ["a/d"]
  assert store.exists("a/d") and not store.exists("a") and not store.exists("a/")
  assert (store.read("a b/c"), store.read("none")) == (b"1", None)
  store.delete_prefix("a/")
  assert store.list_names() == ["a b/c"]


@BOTH
def test_the_library_logs_nothing_when_it_connects(buckets, scheme, capfd):
  """Of gs:// it would log that it uses the token of the tests."""
  ObjectStore(f"{scheme}://bucket-a/run").write("a", b"1")
  buckets.fail(403, "run/a")
  with pytest.raises(StorageError):
    ObjectStore(f"{scheme}://bucket-a/run").read("a")
  assert capfd.readouterr() == ("", "")


@BOTH
def test_an_object_that_has_not_changed_is_not_read_again(buckets, scheme):
  store = ObjectStore(f"{scheme}://bucket-a/run")
  store.write("a", b"1")
  content, generation = store.read_if_changed("a", None)
  assert content == b"1"
  assert store.read_if_changed("a", generation) == (None, generation)
  store.write("a", b"2")
  assert store.read_if_changed("a", generation)[0] == b"2"
  assert store.read_if_changed("none", generation) == (None, None)


@BOTH
def test_a_new_object_replaces_no_other(buckets, scheme):
  store = ObjectStore(f"{scheme}://bucket-a/run")
  store.write_if_absent("a", b"1")
  store.write_if_absent("a", b"1")  # as after an answer that was lost
  with pytest.raises(StorageError, match="written by another process"):
    store.write_if_absent("a", b"2")
  assert store.read("a") == b"1"


@BOTH
@pytest.mark.parametrize("how", ["cut", 503, 429])
def test_what_passes_is_tried_again(buckets, scheme, how):
  store = ObjectStore(f"{scheme}://bucket-a/run")
  buckets.fail(how, "(PUT|POST) run/a", times=2)
  store.write("a", b"1" * 100_000)
  buckets.fail(how, "GET run/a", times=2)
  assert store.read("a") == b"1" * 100_000
  buckets.fail(how, "GET $", times=2)
  assert store.list_names() == ["a"]


@BOTH
@pytest.mark.parametrize(
  ("how", "message"),
  [("cut", "cannot be (read|written).*reply.*network"), (503, "network"), (403, "credentials"), (401, "credentials")],
)
def test_what_stays_is_one_error(buckets, scheme, how, message):
  store = ObjectStore(f"{scheme}://bucket-a/run")
  store.write("a", b"1")
  buckets.fail(how, "run/a")
  for access in (lambda: store.read("a"), lambda: store.write("a", b"2")):
    with pytest.raises(StorageError, match=message) as caught:
      access()
    assert f"{scheme}://bucket-a/run/a" in str(caught.value)
    assert "\n" not in str(caught.value)
  buckets.heal()
  assert store.read("a") == b"1"


@BOTH
def test_a_connection_that_hangs_is_given_up(buckets, scheme):
  buckets.fail("hang", "GET run/a")
  started = time.monotonic()
  with pytest.raises(StorageError, match="Operation too slow.*network"):
    ObjectStore(f"{scheme}://bucket-a/run").read("a")
  assert time.monotonic() - started < 20


def test_an_outage_is_waited_out_once_and_not_for_each_object(buckets):
  store, started = ObjectStore("gs://bucket-a/run"), time.monotonic()
  buckets.fail("hang", "GET run/")
  with pytest.raises(StorageError, match="too slow"):
    map_parallel(store.read, [str(i) for i in range(40)])
  assert time.monotonic() - started < 5.5  # twice would be 6


def test_the_bounds_of_a_run_end_within_two_minutes():
  from deepseek_jax import storage

  attempts = 1 + storage.RETRIES["max_retries"]
  delays = sum(min(2**i, 8) + 1 for i in range(attempts - 1))
  assert (storage.RETRIES["initial_delay"], storage.RETRIES["max_delay"]) == ("1s", "8s")
  assert attempts * (int(storage._CURL["LOW_SPEED_TIME_SECONDS"]) + 6) + delays < 110


@BOTH
def test_a_bucket_that_does_not_exist(buckets, scheme):
  with pytest.raises(StorageError, match="NOT_FOUND.*check the name of the bucket"):
    ObjectStore(f"{scheme}://bucket-b/run").write("a", b"")


@pytest.mark.parametrize(
  "url", ["gs://", "gs://b", "ftp://bucket/run", "gs://bucket-a/../run", "s3://bucket-a//run", "s3:/x"]
)
def test_what_is_no_url_of_a_bucket(url):
  with pytest.raises(StorageError, match="expected gs://BUCKET/PATH or s3://BUCKET/PATH"):
    ObjectStore(url)


def test_safe_names():
  assert all(map(is_safe_name, ["a", "a/b.txt", "..a/b"]))
  assert not any(map(is_safe_name, ["", "/a", "a//b", "../a", "a/../b", "a/.", "a/", "a\0"]))


@BOTH
def test_a_run_folder_brings_what_it_appends_to_and_publishes_what_changed(buckets, scheme):
  url = f"{scheme}://bucket-a/run"
  ObjectStore(url).write("metrics.jsonl", b"1\n")
  files = RunFolder(url)
  files.download(("metrics.jsonl", "events.jsonl"))
  folder = pathlib.Path(files.path)
  with open(folder / "metrics.jsonl", "ab") as file:
    file.write(b"2\n")
  (folder / "tensorboard").mkdir()
  (folder / "tensorboard" / "events").write_bytes(b"x")
  files.upload()
  assert ObjectStore(url).read("metrics.jsonl") == b"1\n2\n"
  assert ObjectStore(url).read("tensorboard/events") == b"x"
  buckets.log.clear()
  files.upload()
  assert not buckets.log
  assert not [name for name in ObjectStore(url).list_names() if name.startswith(".")]
  del files
  assert not folder.exists()


@BOTH
def test_a_run_folder_does_not_upload_what_it_only_read(buckets, scheme):
  """A report is made beside a run that goes on and writes metrics meanwhile."""
  url = f"{scheme}://bucket-a/run"
  ObjectStore(url).write("metrics.jsonl", b"1\n")
  files = RunFolder(url)
  files.download(("metrics.jsonl",))
  ObjectStore(url).write("metrics.jsonl", b"1\n2\n")
  pathlib.Path(files.path, "report.html").write_bytes(b"x")
  files.upload()
  assert (ObjectStore(url).read("metrics.jsonl"), ObjectStore(url).read("report.html")) == (b"1\n2\n", b"x")


def test_a_run_folder_of_a_path_is_that_path(tmp_path):
  files = RunFolder(tmp_path)
  files.download(("metrics.jsonl",))
  files.upload()
  assert files.path == str(tmp_path)
  assert not list(tmp_path.iterdir())


@BOTH
def test_a_run_folder_that_cannot_be_written_is_an_error_at_once(buckets, scheme):
  buckets.fail(403, "(PUT|POST)")
  with pytest.raises(StorageError, match="PERMISSION_DENIED.*credentials"):
    RunFolder(f"{scheme}://bucket-a/run").download(())


@BOTH
def test_a_local_copy_has_the_named_files_and_writes_nothing(buckets, scheme, tmp_path):
  store = ObjectStore(f"{scheme}://bucket-a/run")
  store.write("a", b"1")
  store.write("b", b"2")
  before = dict(buckets.objects["bucket-a"])
  with local_copy(f"{scheme}://bucket-a/run", ("a", "none")) as copy:
    assert [path.name for path in pathlib.Path(copy).iterdir()] == ["a"]
    assert pathlib.Path(copy, "a").read_bytes() == b"1"
  assert not pathlib.Path(copy).exists() and buckets.objects["bucket-a"] == before
  with local_copy(str(tmp_path), ("a",)) as copy:
    assert copy == str(tmp_path)
