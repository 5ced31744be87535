"""Notices of Google Cloud's metadata server, here a fake one."""

import threading
import time

import pytest

from deepseek_jax.training import preemption
from deepseek_jax.training.preemption import is_on_google_cloud, watch_metadata
from deepseek_jax.training.signals import Notice
from tests.metadata_server import MetadataServer


@pytest.fixture
def server(monkeypatch):
  monkeypatch.setattr(preemption, "POLL_SECONDS", 0.01)
  with MetadataServer() as server:
    monkeypatch.setenv("GCE_METADATA_HOST", server.host)
    yield server


class Notices(list):
  """What was announced. `wait` returns the first."""

  def __init__(self):
    self._came = threading.Event()

  def announce(self, notice):
    self.append(notice)
    self._came.set()

  def wait(self):
    assert self._came.wait(20)
    return self[0]


def wait_for_reads(server, count):
  deadline, target = time.monotonic() + 20, len(server.asked) + 2 * count
  while len(server.asked) < target:
    assert time.monotonic() < deadline
    time.sleep(0.005)


@pytest.mark.parametrize(
  ("key", "value", "notice"),
  [
    ("preempted", "TRUE", Notice.PREEMPTED),
    ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE", Notice.MAINTENANCE),
  ],
)
def test_a_notice_that_comes_during_the_run_is_announced_once(server, key, value, notice):
  notices = Notices()
  with watch_metadata("auto", notices.announce):
    wait_for_reads(server, 2)
    assert not notices
    server.values[key] = value
    assert notices.wait() is notice
    time.sleep(0.05)
  assert notices == [notice]


def test_a_live_migration_is_no_notice_and_nothing_is_announced_after_the_block(server):
  notices = Notices()
  server.values["maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"
  with watch_metadata("auto", notices.announce):
    wait_for_reads(server, 3)
  server.values["preempted"] = "TRUE"
  time.sleep(0.05)
  assert not notices


def test_maintenance_announced_before_the_run_is_a_warning_and_the_next_one_a_notice(server, capsys):
  notices = Notices()
  server.values["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
  with watch_metadata("auto", notices.announce):
    wait_for_reads(server, 3)
    assert not notices
    server.values["maintenance-event"] = "NONE"
    wait_for_reads(server, 2)
    server.values["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    assert notices.wait() is Notice.MAINTENANCE
  assert capsys.readouterr().err.count("announced maintenance of this machine's host before the run started") == 1


def test_a_machine_that_is_preempted_already_is_announced_at_once(server):
  notices = Notices()
  server.values["preempted"] = "TRUE"
  with watch_metadata("auto", notices.announce):
    assert notices.wait() is Notice.PREEMPTED


@pytest.mark.parametrize("fault", ["404", "flavor", "hang", "refused"])
def test_a_server_without_answers_is_one_warning_and_is_asked_on(server, monkeypatch, capsys, fault):
  monkeypatch.setattr(preemption, "TIMEOUT_SECONDS", 0.05)
  monkeypatch.setattr(preemption, "WARN_AFTER", 3)
  notices = Notices()
  if fault == "404":
    values, server.values = server.values, {}
  elif fault == "refused":
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:1")
  else:
    server.fault = fault
  with watch_metadata("on", notices.announce):
    time.sleep(0.5)
    if fault != "refused":
      if fault == "404":
        server.values = values
      server.fault = None
      server.values["preempted"] = "TRUE"
      assert notices.wait() is Notice.PREEMPTED
  err = capsys.readouterr().err
  assert err.count("gives no notices of preemption") == 1 and "checkpoint.cloud_notices=off" in err


def test_a_server_that_hangs_does_not_keep_the_block_from_ending(server):
  server.fault = "hang"
  with watch_metadata("on", Notices().announce):
    while not server.asked:
      time.sleep(0.005)
    started = time.monotonic()
  assert time.monotonic() - started < 1


def test_which_machines_are_asked(monkeypatch, tmp_path, server):
  started = []
  monkeypatch.setattr(preemption._Watcher, "start", lambda self: started.append(self))
  monkeypatch.delenv("GCE_METADATA_HOST")
  name = tmp_path / "product_name"
  monkeypatch.setattr(preemption, "_PRODUCT_NAME", name)
  for content, mode, expected in (
    (None, "auto", 0),
    ("Standard PC (Q35 + ICH9, 2009)\n", "auto", 0),
    ("Google Compute Engine\n", "auto", 1),
    ("Google Compute Engine\n", "off", 0),
    ("Standard PC\n", "on", 1),
  ):
    started.clear()
    if content:
      name.write_text(content)
    with watch_metadata(mode, Notices().announce):
      assert len(started) == expected, (content, mode)
    assert is_on_google_cloud() == (content or "").startswith("Google")
