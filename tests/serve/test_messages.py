import math
import random

import pytest

from deepseek_jax.errors import ConfigError
from deepseek_jax.generate.request import Output, Request, Sampling, TokenLogprobs
from deepseek_jax.serve import messages
from deepseek_jax.serve.messages import LineReader, MessageError

OUTPUTS = [
  Output(3, (1, 2), (TokenLogprobs(-0.1, ((1, -0.1),)), TokenLogprobs(-2.5, ())), None, (None, TokenLogprobs(-1.0, ())), 7),
  Output(4, (), (), "stop"),
]  # fmt: skip


def read(lines):
  reader = LineReader()
  return [message for line in lines for message in reader.feed(line)]


def test_outputs_come_back():
  [message] = read(messages.encode_outputs(OUTPUTS))
  assert [messages.decode_output(fields) for fields in message["outputs"]] == OUTPUTS
  assert not list(messages.encode_outputs([]))


def test_infinities_come_back():
  outputs = [Output(0, (1,), (TokenLogprobs(-math.inf, ((2, -math.inf),)),))]
  [message] = read(messages.encode_outputs(outputs))
  assert [messages.decode_output(fields) for fields in message["outputs"]] == outputs


def test_a_long_step_is_several_lines(monkeypatch):
  monkeypatch.setattr(messages, "OUTPUTS_LINE_BYTES", 300)
  lines = list(messages.encode_outputs(OUTPUTS * 5))
  assert len(lines) > 2
  assert [messages.decode_output(f) for message in read(lines) for f in message["outputs"]] == OUTPUTS * 5


def test_requests_come_back():
  request = Request(5, (1, 2), Sampling(3, temperature=0.5, seed=2**32 - 1, logprobs=2))
  [message] = read([messages.encode_request(request)])
  assert messages.decode_request(message) == request


def test_requests_that_are_none():
  good = read([messages.encode_request(Request(5, (1,), Sampling(3)))])[0]
  with pytest.raises(ConfigError):
    messages.decode_request(good | {"sampling": good["sampling"] | {"top_p": 2.0}})
  for bad in ({"sampling": {"unknown": 1}}, {"sampling": None}, {"prompt": None}):
    with pytest.raises(MessageError):
      messages.decode_request(good | bad)


@pytest.mark.parametrize("seed", range(20))
def test_lines_are_found_however_they_are_cut(seed):
  generator = random.Random(seed)
  sent = [{"type": "x", "text": "é\n" * generator.randrange(50)} for _ in range(10)]
  data = b"".join(map(messages.encode, sent))
  reader, got = LineReader(), []
  while data:
    size = generator.choice((1, 7, 100))
    got += reader.feed(data[:size])
    data = data[size:]
  assert got == sent


@pytest.mark.parametrize("line", [b"{\n", b"[]\n", b"{}\n", b'{"type": 1}\n', b"\n", b"\xff\n"])
def test_what_is_no_message(line):
  with pytest.raises(MessageError):
    LineReader().feed(line)


def test_lines_are_bounded(monkeypatch):
  reader = LineReader(max_bytes=100)
  assert not reader.feed(b"x" * 100)
  with pytest.raises(MessageError, match="longer than 100"):
    reader.feed(b"x")
  with pytest.raises(MessageError, match="longer than 100"):
    LineReader(max_bytes=100).feed(b'{"type": "' + b"x" * 200 + b'"}\n')
  monkeypatch.setattr(messages, "MAX_LINE_BYTES", 100)
  with pytest.raises(MessageError):
    messages.encode({"type": "x", "text": "x" * 100})
