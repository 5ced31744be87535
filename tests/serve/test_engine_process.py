import os
import signal
import threading
import time

import httpx
import openai
import pytest

from deepseek_jax.console import SilentConsole, set_console
from deepseek_jax.errors import UserError
from deepseek_jax.serve import engine_process, http_child
from deepseek_jax.serve.listen import listen
from deepseek_jax.serve.messages import Settings
from tests.serve.fake_engine import DEFAULTS, FakeEngine
from tests.serve.servers import Server, events, serving, wait_until


def is_alive(pid):
  """Whether the process runs; one that nobody has waited for has ended."""
  try:
    with open(f"/proc/{pid}/stat") as file:
      return file.read().rpartition(")")[2].split()[0] != "Z"
  except FileNotFoundError:
    return False


def cpu_ticks(pid):
  """CPU time of a process, in hundredths of a second."""
  with open(f"/proc/{pid}/stat") as file:
    return sum(map(int, file.read().rpartition(")")[2].split()[11:13]))


def ask_in_thread(server, answers, **body):
  def ask():
    try:
      answers.append(httpx.post(f"{server.url}/v1/completions", json=body, timeout=30))
    except httpx.HTTPError as error:
      answers.append(error)

  thread = threading.Thread(target=ask)
  thread.start()
  return thread


def test_a_killed_http_process_frees_requests_and_is_started_again():
  with serving(step_seconds=0.01) as server:
    answers = []
    threads = [ask_in_thread(server, answers, prompt="abc", max_tokens=390, n=2) for _ in range(2)]
    wait_until(lambda: server.metric("engine_running") == 4)
    generated = server.metric("engine_generated_tokens_total")
    pid, killed = server.child(), time.monotonic()
    os.kill(pid, signal.SIGKILL)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:  # the same port
      # The connection waits in the queue of the listening socket; the answer shows that nothing else runs.
      assert client.completions.create(model="fake", prompt="ab", max_tokens=4, temperature=0).choices[0].text == "baba"
    assert time.monotonic() - killed < 15
    server.http = httpx.Client(base_url=server.url, timeout=20)
    assert server.metric("engine_cancelled_total") == 4 and server.engine_is_idle()
    assert server.metric("engine_generated_tokens_total") < generated + 4 * 100 + 4 + 4  # 1 s of 10 ms steps
    for thread in threads:
      thread.join()
    assert len(answers) == 2 and all(isinstance(answer, httpx.HTTPError) for answer in answers)
    os.kill(server.child(), signal.SIGKILL)  # again
    wait_until(lambda: server.child() not in (None, pid))
    assert httpx.get(f"{server.url}/health", timeout=20).status_code == 200


def test_an_idle_server_uses_no_time_and_leaves_on_sigterm():
  server = Server({})
  child = server.child()
  server.http.get("/health")
  before = cpu_ticks(server.process.pid)
  time.sleep(0.5)
  assert cpu_ticks(server.process.pid) - before <= 2
  code, err = server.stop()
  assert (code, err) == (0, "")
  assert not is_alive(child)


def test_open_requests_end_within_the_grace():
  server, answers = Server({"step_seconds": 0.01}), []
  thread = ask_in_thread(server, answers, prompt="abc", max_tokens=60, stream=True)
  wait_until(lambda: server.metric("engine_running") == 1)
  server.http.close()
  server.process.send_signal(signal.SIGINT)
  started = time.monotonic()
  assert server.process.wait(10) == 130
  assert time.monotonic() - started < engine_process.GRACE_SECONDS
  thread.join()
  assert events(answers[0].text)[-1]["choices"][0]["finish_reason"] == "length"
  assert "Traceback" not in server.stop()[1]


def test_requests_beyond_the_grace_are_told():
  server, answers = Server({"step_seconds": 0.05, "grace_seconds": 0.5}), []
  threads = [ask_in_thread(server, answers, prompt="abc", max_tokens=390, stream=stream) for stream in (True, False)]
  wait_until(lambda: server.metric("engine_running") == 2)
  server.http.close()
  server.process.terminate()
  assert server.process.wait(0.5 + engine_process.EXIT_SECONDS + 1) == 0
  for thread in threads:
    thread.join()
  whole, streamed = sorted(answers, key=lambda answer: answer.status_code == 200)
  assert whole.status_code == 503 and "shutting down" in whole.json()["error"]["message"]
  assert "shutting down" in streamed.text and "[DONE]" not in streamed.text


def test_no_orphan_of_a_killed_engine_process():
  server, answers = Server({"step_seconds": 0.01}), []
  thread = ask_in_thread(server, answers, prompt="abc", max_tokens=390)
  wait_until(lambda: server.metric("engine_running") == 1)
  child = server.child()
  server.process.kill()
  wait_until(lambda: not is_alive(child))
  thread.join()
  assert answers[0].status_code == 503
  server.stop()


def make_process(engine, **changes):
  return engine_process.EngineProcess(engine, Settings(**DEFAULTS | changes), listen("127.0.0.1", 0), "listening")


def test_a_child_that_never_starts_is_an_error(capfd):
  with set_console(SilentConsole()), pytest.raises(UserError, match="before it was ready"):
    make_process(FakeEngine(), tokenizer="no/such/file").run()
  assert "no/such/file" in capfd.readouterr().err


def test_a_child_that_hangs_is_ended_and_one_that_starts_is_not(monkeypatch):
  monkeypatch.setattr(http_child, "STUCK_SECONDS", 0.3)
  listener = listen("127.0.0.1", 0)
  child = http_child.HttpChild(Settings(**DEFAULTS), listener)
  while not child.receive():  # longer than 0.3 s
    child.check_alive()
    time.sleep(0.01)
  child.check_alive()
  os.kill(child.pid, signal.SIGSTOP)
  with pytest.raises(ConnectionAbortedError, match="said nothing"):
    wait_until(lambda: child.receive() or child.check_alive())
  assert child.close() == "killed by SIGKILL"
  listener.close()


def test_a_child_that_does_not_read_is_ended(monkeypatch):
  monkeypatch.setattr(http_child, "MAX_PENDING_BYTES", 2**20)
  listener = listen("127.0.0.1", 0)
  child = http_child.HttpChild(Settings(**DEFAULTS), listener)
  os.kill(child.pid, signal.SIGSTOP)
  with pytest.raises(ConnectionAbortedError, match="unread"):
    for _ in range(100):
      child.send(b"x" * 2**16)
      time.sleep(0.005)
  assert child.close() == "killed by SIGKILL"
  listener.close()
