"""What signals and other notices do to a run, by the moment at which they come."""

import signal
import threading
import time

import pytest

from deepseek_jax.errors import Stopped
from deepseek_jax.training import signals
from deepseek_jax.training.signals import Notice, StopRequest, stop_requests

SIGNALS = [signal.SIGINT, signal.SIGUSR1, signal.SIGTERM]


@pytest.mark.parametrize("number", SIGNALS)
def test_before_the_first_step_a_signal_raises(number):
  with stop_requests() as request, pytest.raises(Stopped) as stopped:
    request.stop_at_once_from_now()
    signal.raise_signal(number)
  assert stopped.value.notice == number.name
  assert stopped.value.exit_code == (130 if number == signal.SIGINT else 143)


def test_a_signal_that_comes_before_anybody_handles_it_raises_where_it_is_handled():
  with stop_requests() as request:
    signal.raise_signal(signal.SIGTERM)
    for _ in range(2):
      with pytest.raises(Stopped, match="stopped by SIGTERM"):
        request.stop_at_once_from_now()
    assert not request.at_once


@pytest.mark.parametrize("number", SIGNALS)
def test_in_the_loop_the_first_is_noted_and_others_change_nothing(number):
  with stop_requests() as request:
    signal.raise_signal(number)
    for other in SIGNALS:
      if other != signal.SIGINT or number != signal.SIGINT:
        signal.raise_signal(other)
    request.announce(Notice.PREEMPTED)
  assert request.received is request.stop is Notice[number.name]


def test_only_the_first_raises_at_once_and_only_a_second_ctrl_c_in_any_case():
  with stop_requests() as request:
    request.stop_at_once_from_now()
    with pytest.raises(Stopped):
      signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
  assert request.stop is Notice.SIGTERM


def test_stop_at_once_lasts_for_its_block():
  with stop_requests() as request:
    with request.stop_at_once(True), pytest.raises(Stopped):
      signal.raise_signal(signal.SIGUSR1)
    signal.raise_signal(signal.SIGUSR1)


def test_a_notice_of_another_thread_raises_in_the_main_thread_or_is_noted():
  with stop_requests() as request, pytest.raises(Stopped) as stopped:
    request.stop_at_once_from_now()
    threading.Timer(0.05, request.announce, [Notice.MAINTENANCE]).start()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
      time.sleep(0.01)
  assert (stopped.value.notice, stopped.value.exit_code) == ("MAINTENANCE", 143)
  with stop_requests() as request:
    thread = threading.Thread(target=request.announce, args=[Notice.PREEMPTED])
    thread.start()
    thread.join()
  assert request.stop is Notice.PREEMPTED


def test_the_handlers_of_before_are_back_after_the_block_and_a_late_notice_is_harmless():
  before = [signal.getsignal(number) for number in SIGNALS]
  with stop_requests() as request:
    assert [signal.getsignal(number) for number in SIGNALS] != before
  assert [signal.getsignal(number) for number in SIGNALS] == before
  request.announce(Notice.PREEMPTED)  # SIGUSR1 itself would end this process


def test_a_thread_other_than_the_main_one_has_no_handlers_but_gets_notices():
  result = []

  def body():
    with stop_requests() as request:
      request.announce(Notice.PREEMPTED)
      result.append(request.stop)

  thread = threading.Thread(target=body)
  thread.start()
  thread.join()
  assert result == [Notice.PREEMPTED]


def test_of_the_notices_of_several_processes_the_most_urgent_is_decoded_with_its_process(monkeypatch):
  monkeypatch.setattr(signals, "process_count", lambda: 1000)
  codes = []
  for index, notice in ((3, Notice.SIGUSR1), (999, Notice.SIGTERM), (5, None), (4, Notice.SIGTERM)):
    monkeypatch.setattr(signals, "process_index", lambda index=index: index)
    request = StopRequest()
    if notice:
      request.receive(notice)
    assert request.stop is None  # until all know
    codes.append(request.encode())
  request.decode(0)
  assert request.stop is None
  request.decode(max(codes))
  assert (request.stop, request.stop_process) == (Notice.SIGTERM, 999)
  request.decode(codes[0])
  assert (request.stop, request.stop_process) == (Notice.SIGTERM, 999)
  assert max(Notice) * signals._MAX_PROCESSES + signals._MAX_PROCESSES <= 2**31
