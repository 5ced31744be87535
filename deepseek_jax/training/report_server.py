"""Serves the report of a run, made anew when its files have changed: for a browser beside a run that goes on."""

import http
import http.server
import ipaddress
import os
import socket
import threading
import time
from typing import Any

from deepseek_jax.errors import ConfigError, UserError
from deepseek_jax.training.metrics import EVENTS, EXPERT_LOADS, METRICS
from deepseek_jax.training.page import document, escape
from deepseek_jax.training.report import make_page
from deepseek_jax.training.run_records import CONFIG

REFRESH_SECONDS = 5
REST = 4  # times as long as a page took to make, it stays: the report of a long run takes seconds of a core


class ReportServer(http.server.ThreadingHTTPServer):
  """An HTTP server that knows one page, at /: nothing of the file system can be asked for.

  Args:
    workdir: the local folder of the run.
    port: 0 takes a free one.

  Raises ConfigError for an address that cannot be listened on.
  """

  daemon_threads = True
  allow_reuse_address = os.name == "posix"  # elsewhere it would share a busy port

  def __init__(self, workdir: str | os.PathLike[str], host: str, port: int):
    self._workdir, self._host, self._lock = os.fspath(workdir), host, threading.Lock()
    self._made_of: Any = None  # what the files were when the page was made
    self._page, self._keep_until = b"", 0.0  # in time.monotonic()
    try:
      super().__init__((host, port), _Handler)
    except OSError as error:
      raise ConfigError(
        f"cannot listen on {host} port {port}: {error.strerror or error}; choose another one by --port"
      ) from None

  def server_bind(self) -> None:
    """Binds without the look-up of the host's name that HTTPServer makes, which may wait for a name server."""
    self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    self.socket.bind(self.server_address)
    self.server_name, self.server_port = self.socket.getsockname()[:2]
    self.server_address = self.socket.getsockname()

  @property
  def url(self) -> str:
    """The address of the page."""
    return f"http://{self.server_name}:{self.server_port}/"

  def is_for_us(self, host: str) -> bool:
    """Whether the header Host names this machine, where only this machine can ask.

    A page of another site, whose name its owner has pointed to 127.0.0.1, names that site.
    """
    address = ipaddress.ip_address(str(self.server_address[0]))
    return not address.is_loopback or host.rpartition(":")[0] in ("localhost", self._host, str(address))

  def page(self) -> tuple[bytes, http.HTTPStatus]:
    """The page of the files as they are, and its status. An error of theirs is a page that says so, and refreshes too."""
    with self._lock:  # several browsers wait for one page
      if time.monotonic() < self._keep_until:
        return self._page, http.HTTPStatus.OK
      started = time.monotonic()
      made_of = [_version(os.path.join(self._workdir, name)) for name in (CONFIG, METRICS, EVENTS, EXPERT_LOADS)]
      if made_of == self._made_of:
        return self._page, http.HTTPStatus.OK
      try:
        self._page = make_page(self._workdir, REFRESH_SECONDS)
      except UserError as error:
        section = f"<section><h2>The run cannot be read</h2><p>{escape(error)}</p></section>"
        page = document("report", [section], refresh_seconds=REFRESH_SECONDS)
        return page.encode(errors="replace"), http.HTTPStatus.INTERNAL_SERVER_ERROR
      self._made_of, ended = made_of, time.monotonic()
      self._keep_until = ended + REST * (ended - started)
      return self._page, http.HTTPStatus.OK


class _Handler(http.server.BaseHTTPRequestHandler):
  server: ReportServer
  server_version, sys_version = "report", ""

  def do_GET(self) -> None:
    if not self.server.is_for_us(self.headers.get("Host", "")):
      self.send_error(http.HTTPStatus.FORBIDDEN, "The report is at the address that was printed")
      return
    if self.path != "/":
      self.send_error(http.HTTPStatus.NOT_FOUND, "The report is at /")
      return
    page, status = self.server.page()
    self.send_response(status)
    self.send_header("Content-Type", "text/html; charset=utf-8")
    self.send_header("Content-Length", str(len(page)))
    self.send_header("Cache-Control", "no-store")
    self.send_header("X-Content-Type-Options", "nosniff")
    self.end_headers()
    self.wfile.write(page)

  def log_message(self, format: str, *arguments: Any) -> None:
    """Says nothing: a line for each refresh would hide what matters."""


def _version(path: str) -> tuple[int, int] | None:
  """(size, time of modification) of a file; None without one."""
  try:
    status = os.stat(path)
  except OSError:
    return None
  return status.st_size, status.st_mtime_ns
