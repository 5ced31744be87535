"""A metadata server of Google Cloud on 127.0.0.1 for tests."""

import http.server
import threading


class MetadataServer(http.server.ThreadingHTTPServer):
  """`values`: {key of the instance: value}, to be changed by tests; a key that it lacks is answered with 404.

  `asked`: keys of the requests. `host`: HOST:PORT. `fault`: "hang" never answers, "flavor" answers as another server.
  """

  daemon_threads = True

  def __init__(self):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.values = {"preempted": "FALSE", "maintenance-event": "NONE"}
    self.asked, self.fault, self.closing = [], None, threading.Event()
    self.host = f"127.0.0.1:{self.server_port}"
    threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

  def __exit__(self, *_):
    self.closing.set()
    self.shutdown()
    self.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
  def log_message(self, *_):
    pass

  def do_GET(self):
    server, key = self.server, self.path.removeprefix("/computeMetadata/v1/instance/")
    server.asked.append(key)
    if server.fault == "hang":
      server.closing.wait()
      return
    known = key in server.values and self.headers.get("Metadata-Flavor") == "Google"
    body = f"{server.values[key]}\n".encode() if known else b""
    self.send_response(200 if known else 404)
    if server.fault != "flavor":
      self.send_header("Metadata-Flavor", "Google")
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body)
