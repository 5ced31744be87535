"""A server of buckets on 127.0.0.1 for tests: as much of the JSON API of GCS and of S3 as TensorStore speaks.

Objects have generations that grow, as OCDBT needs, and writes keep to preconditions. `fail` makes chosen requests fail.
"""

import collections
import hashlib
import http.server
import itertools
import json
import re
import threading
import time
import urllib.parse
import xml.sax.saxutils

Object = collections.namedtuple("Object", "content generation etag")


class Buckets(http.server.ThreadingHTTPServer):
  """`objects`: {bucket: {key: Object}}, to be read and changed by tests. `log`: (method, key) of what was asked.

  `listed`: keys that lists have named. `sent`: {key: how often its content was sent}.
  """

  daemon_threads = True

  def __init__(self, port=0):
    super().__init__(("127.0.0.1", port), _Handler)
    self.objects, self.log, self.lock = collections.defaultdict(dict), [], threading.RLock()
    self.listed, self.sent = set(), collections.Counter()
    self._faults, self._generations = [], itertools.count(1_700_000_000_000_000)
    threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

  @property
  def url(self):
    return f"http://127.0.0.1:{self.server_port}"

  def put(self, bucket, key, content):
    """Stores an object, as a new generation. Returns it."""
    with self.lock:
      etag = f'"{hashlib.md5(content).hexdigest()}"'
      self.objects[bucket][key] = Object(content, next(self._generations), etag)
      return self.objects[bucket][key]

  def fail(self, how, pattern, times=1 << 30):
    """The next `times` requests whose "METHOD key" has `pattern`: "cut" their connection, or answer a status (503)."""
    self._faults.append([how, re.compile(pattern), times])

  def heal(self):
    self._faults.clear()

  def fault(self, line):
    with self.lock:
      for fault in self._faults:
        if fault[2] and fault[1].search(line):
          fault[2] -= 1
          return fault[0]
    return None

  def handle_error(self, request, client_address):
    """A cut connection is what a test wanted: no traceback."""


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  disable_nagle_algorithm = True

  def log_message(self, *_):
    pass

  def handle_one_request(self):
    try:
      super().handle_one_request()
    except ConnectionError:
      self.close_connection = True

  def _serve(self):
    url = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
    path = url.path
    gcs = re.fullmatch(r"(?:/upload)?/storage/v1/b/([^/]+)/o(?:/(.*))?", path)
    if gcs:
      bucket, key = gcs[1], urllib.parse.unquote(gcs[2] or query.get("name", ""))
    else:
      bucket, _, key = urllib.parse.unquote(path[1:]).partition("/")
    self.server.log.append((self.command, key))
    fault = self.server.fault(f"{self.command} {key}")
    length = int(self.headers.get("Content-Length") or 0)
    if fault == "cut":
      self.rfile.read(length // 2)
      self.close_connection = True
      return
    if fault == "hang":
      time.sleep(3600)
    body = self.rfile.read(length)
    if fault:
      return self._answer(fault, b"{}")
    with self.server.lock:
      objects = self.server.objects.get(bucket)
      if objects is None:
        return self._answer(404, b"<Error><Code>NoSuchBucket</Code><Message>no such bucket</Message></Error>")
      (self._gcs if gcs else self._s3)(bucket, objects, key, query, body)

  do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

  def _answer(self, status, body=b"", **headers):
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name.replace("_", "-"), str(value))
    if status not in (204, 304):
      self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    if self.command != "HEAD" and status not in (204, 304):
      self.wfile.write(body)

  def _media(self, key, found, **headers):
    self.server.sent[key] += 1
    content, status = found.content, 200
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
    if asked:
      start = int(asked[1]) if asked[1] else max(0, len(content) - int(asked[2]))
      end = int(asked[2]) + 1 if asked[1] and asked[2] else len(content)
      if start >= len(content):
        return self._answer(416, b"", Content_Range=f"bytes */{len(content)}")
      headers["Content_Range"] = f"bytes {start}-{min(end, len(content)) - 1}/{len(content)}"
      content, status = content[start:end], 206
    return self._answer(status, content, **headers)

  def _gcs(self, bucket, objects, key, query, body):
    found = objects.get(key)
    generation = found.generation if found else 0
    if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != generation:
      return self._answer(412, b"{}")
    if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == generation:
      return self._answer(304)
    if self.command == "POST":
      new = self.server.put(bucket, key, body)
      return self._answer(
        200, json.dumps({"name": key, "generation": str(new.generation), "size": str(len(body))}).encode()
      )
    if not key:
      names = [
        k for k in sorted(objects) if k.startswith(query.get("prefix", "")) and k >= query.get("startOffset", "")
      ]
      names = [k for k in names if not query.get("endOffset") or k < query["endOffset"]]
      self.server.listed.update(names)
      return self._answer(200, json.dumps(
        {"items": [{"name": k, "generation": str(objects[k].generation), "size": str(len(objects[k].content))} for k in names]}
      ).encode())  # fmt: skip
    if not found:
      return self._answer(404, b"{}")
    if self.command == "DELETE":
      del objects[key]
      return self._answer(204)
    return self._media(key, found, x_goog_generation=found.generation)

  def _s3(self, bucket, objects, key, query, body):
    found = objects.get(key)
    etag = found.etag if found else None
    if found and self.headers.get("If-None-Match") == etag:
      return self._answer(304)
    if found and self.headers.get("If-Match", etag) != etag:  # without an object S3 says 404
      return self._answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
    if self.command == "PUT":
      return self._answer(200, b"", ETag=self.server.put(bucket, key, body).etag)
    if not key:
      names = [k for k in sorted(objects) if k.startswith(query.get("prefix", "")) and k > query.get("start-after", "")]
      self.server.listed.update(names)
      items = "".join(
        f"<Contents><Key>{xml.sax.saxutils.escape(k)}</Key><Size>{len(objects[k].content)}</Size></Contents>"
        for k in names
      )
      return self._answer(200, f"<ListBucketResult><IsTruncated>false</IsTruncated>{items}</ListBucketResult>".encode())
    if self.command == "DELETE":
      objects.pop(key, None)
      return self._answer(204)
    if not found:
      return self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
    return self._media(key, found, ETag=etag)
