"""Servers of the fake engine in processes of their own, for tests that go through the door."""

import contextlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import httpx

ROOT = pathlib.Path(__file__).parents[2]


class Server:
  """A running `python -m deepseek_jax.serve` with `flags`, or else `python -m tests.serve.fake_engine` with `settings`."""

  def __init__(self, settings=None, flags=()):
    program = ["deepseek_jax.serve", "--port=0", *flags] if flags else ["tests.serve.fake_engine", json.dumps(settings)]
    self.stderr = tempfile.TemporaryFile("w+")
    self.process = subprocess.Popen(
      [sys.executable, "-m", *program],
      cwd=ROOT,
      env=os.environ | {"PYTHONPATH": str(ROOT)},
      stdout=subprocess.PIPE,
      stderr=self.stderr,
      text=True,
    )
    line = self.process.stdout.readline()
    assert "http://" in line, self.errors()
    self.url = re.search(r"http://[^/\s]+", line)[0]
    self.http = httpx.Client(base_url=self.url, timeout=20)

  def errors(self):
    """What it wrote to stderr so far."""
    self.stderr.seek(0)
    return self.stderr.read()

  @property
  def port(self):
    return int(self.url.rpartition(":")[2])

  def post(self, path="/v1/completions", **body):
    return self.http.post(path, json=body)

  def metric(self, name):
    """The value of a metric; name may have labels."""
    lines = self.http.get("/metrics").text.splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"deepseek_jax_{name} ")), 0.0)

  def engine_is_idle(self):
    return self.metric("engine_running") == self.metric("engine_waiting") == 0

  def child(self):
    """The process id of the HTTP process; None while there is none."""
    children = pathlib.Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
    return int(children[0]) if children else None

  def stop(self):
    """Ends it as a supervisor does. Returns (exit code, stderr)."""
    self.http.close()
    if self.process.poll() is None:
      self.process.terminate()
    try:
      self.process.communicate(timeout=15)
    except subprocess.TimeoutExpired:
      self.process.kill()
      raise
    return self.process.returncode, self.errors()


@contextlib.contextmanager
def serving(*flags, **settings):
  server = Server(settings, flags)
  try:
    yield server
  finally:
    server.stop()


def wait_until(condition, seconds=20.0):
  """Waits until `condition()`; returns the seconds that it took."""
  started = time.monotonic()
  while not condition():
    assert time.monotonic() - started < seconds, "it did not come true"
    time.sleep(0.01)
  return time.monotonic() - started


def events(text):
  """The JSON objects of a stream's events, which end with [DONE]."""
  data = re.findall(r"^data: (.*)$", text, re.M)
  assert data[-1] == "[DONE]", text[-300:]
  return [json.loads(event) for event in data[:-1]]
