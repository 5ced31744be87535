import os
import threading

import pytest

from deepseek_jax.native_logs import hide_native_logs

NOISE = [
  b"I1128 23:43:26.227004    9360 google_auth_provider.cc:136] Using GOOGLE_AUTH_TOKEN_FOR_TESTING\n",
  b"E1128 23:44:19.836651    9584 common-io:5] static: Failed to open file. path:'/home/user/.aws/config'\n",
  b"W1128 23:44:19.892653   19586 aws_api.cc:6148] (id=0x55d1b6c08cf0) IMDS client failed\n",
]
KEPT = [b"error: of ours\n", b"F1128 23:44:19.8 1 a.cc:1] fatal\n", b"I am a line\n", b"without an end"]


def test_lines_of_libraries_are_dropped_and_others_kept(capfd):
  with hide_native_logs():
    for line in [*NOISE, *KEPT]:
      os.write(2, line)
  os.write(2, b"\nafter\n")
  assert capfd.readouterr().err.encode() == b"".join([*KEPT, b"\nafter\n"])


def test_an_exception_leaves_stderr_as_it_was(capfd):
  with pytest.raises(ValueError, match="here"), hide_native_logs():
    os.write(2, b"before\n")
    raise ValueError("here")
  os.write(2, NOISE[0])
  assert capfd.readouterr().err.encode() == b"before\n" + NOISE[0]


def test_two_threads_at_once(capfd):
  entered, leave = threading.Event(), threading.Event()

  def wait():
    with hide_native_logs():
      entered.set()
      leave.wait(10)

  thread = threading.Thread(target=wait)
  thread.start()
  entered.wait(10)
  with hide_native_logs():
    os.write(2, NOISE[0] + KEPT[0])
  leave.set()
  thread.join()
  assert capfd.readouterr().err.encode() == KEPT[0]
