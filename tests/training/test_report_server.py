import http.client
import json
import socket
import threading

import pytest

from deepseek_jax.errors import ConfigError
from deepseek_jax.training import report_server
from deepseek_jax.training.report_server import REFRESH_SECONDS, ReportServer


@pytest.fixture
def server(tmp_path, monkeypatch):
  monkeypatch.setattr(report_server, "REST", 0)
  (tmp_path / "config.json").write_text('{"name": "early"}')
  (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": 2.5}\n')
  with ReportServer(tmp_path, "127.0.0.1", 0) as server:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()


def ask(server, path="/", method="GET"):
  connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
  connection.request(method, path)
  response = connection.getresponse()
  return response.status, response.read().decode(), response.headers


def test_the_page_is_served_and_refreshes_itself(server):
  status, page, headers = ask(server)
  assert status == 200 and "2.5 at step 3" in page and headers["Content-Type"] == "text/html; charset=utf-8"
  assert f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}">' in page and "default-src 'none'" in page
  assert server.url == f"http://127.0.0.1:{server.server_port}/"


@pytest.mark.parametrize(("host", "status"), [("localhost:{}", 200), ("127.0.0.1:{}", 200), ("evil.example:{}", 403)])
def test_on_this_machine_alone_it_is_no_page_of_another_site(server, host, status):
  connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
  connection.request("GET", "/", headers={"Host": host.format(server.server_port)})
  assert connection.getresponse().status == status


def test_it_is_made_anew_when_the_files_have_changed_and_not_before(server, tmp_path, monkeypatch):
  made = []
  make = report_server.make_page
  monkeypatch.setattr(report_server, "make_page", lambda *arguments: made.append(0) or make(*arguments))
  assert ask(server)[1] == ask(server)[1] and len(made) == 1
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write(json.dumps({"step": 4, "loss": 1.25}) + "\n")
  assert "1.25 at step 4" in ask(server)[1] and len(made) == 2


def test_a_page_that_is_slow_to_make_stays_for_a_while(server, tmp_path, monkeypatch):
  monkeypatch.setattr(report_server, "REST", 1e6)
  assert "2.5 at step 3" in ask(server)[1]
  (tmp_path / "metrics.jsonl").write_text('{"step": 5, "loss": 2.5}\n')
  assert "2.5 at step 3" in ask(server)[1]


def test_files_that_cannot_be_read_are_a_page_that_says_so_until_they_can(server, tmp_path):
  (tmp_path / "metrics.jsonl").write_text("{<script>}\n")
  status, page, _ = ask(server)
  assert status == 500 and "line 1: expected a JSON object" in page and "<script>" not in page and "refresh" in page
  (tmp_path / "metrics.jsonl").write_text('{"step": 5, "loss": 2.5}\n')
  assert ask(server)[0] == 200


@pytest.mark.parametrize(
  "path", ["/config.json", "/../config.json", "/report.html", "//x", "/?x", "/%2e%2e/config.json"]
)
def test_nothing_else_is_served(server, path):
  status, page, _ = ask(server, path)
  assert status == 404 and "early" not in page


@pytest.mark.parametrize("method", ["POST", "HEAD", "PUT", "DELETE"])
def test_nothing_but_get_is_answered(server, method):
  assert ask(server, method=method)[0] == 501


def test_a_busy_port_and_a_foreign_address_are_one_error(tmp_path):
  with socket.create_server(("127.0.0.1", 0)) as busy:
    port = busy.getsockname()[1]
    with pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1 port {port}: .*--port"):
      ReportServer(tmp_path, "127.0.0.1", port)
  with pytest.raises(ConfigError, match="cannot listen on no such host port 1"):
    ReportServer(tmp_path, "no such host", 1)
