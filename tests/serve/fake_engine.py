"""An engine without a model, and a program that serves it:  python -m tests.serve.fake_engine [SETTINGS AS JSON]

The answer to a prompt is the prompt reversed, again and again, one token a step. Ids may be bytes or a tokenizer's.
"""

import collections
import json
import socket
import time

from deepseek_jax.errors import ConfigError
from deepseek_jax.flags import run_program
from deepseek_jax.generate.request import EngineStats, Output, TokenLogprobs
from deepseek_jax.serve import engine_process, http_child
from deepseek_jax.serve.chat_template import DEEPSEEK_LLM
from deepseek_jax.serve.listen import listen, url
from deepseek_jax.serve.messages import Settings

EOS = 256
DEFAULTS = {
  "model": "fake", "tokenizer": "byte", "vocab": 257, "add_bos": True, "max_length": 400, "max_batch": 4, "max_queue": 4,
  "chat_template": DEEPSEEK_LLM, "template_tokens": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
  "api_key": None, "local_hosts": None, "created": 1,
}  # fmt: skip


class FakeEngine:
  """Slots, a queue and a clock. It ends a document after a 'Q' of the prompt, unless eos is ignored.

  Its prefix cache has all of every prompt but the last token.
  """

  def __init__(self, slots=4, max_length=400, vocab=257, step_seconds=0.002):
    self.max_length, self._slots, self._vocab, self._step_seconds = max_length, slots, vocab, step_seconds
    self._running, self._waiting = {}, collections.deque()
    self.counts = collections.Counter()

  @property
  def has_work(self):
    return bool(self._running or self._waiting)

  def add(self, request):
    if not request.prompt or not all(0 <= id < self._vocab for id in request.prompt):
      raise ConfigError("a prompt must have ids of the vocabulary")
    if len(request.prompt) + request.sampling.max_tokens > self.max_length:
      raise ConfigError("prompt and answer do not fit")
    assert request.id not in self._running
    self._waiting.append(request)

  def cancel(self, id):
    before = len(self._running) + len(self._waiting)
    self._running.pop(id, None)
    self._waiting = collections.deque(request for request in self._waiting if request.id != id)
    self.counts["cancelled"] += before - len(self._running) - len(self._waiting)

  def step(self):
    time.sleep(self._step_seconds)
    self.counts["steps"] += 1
    while self._waiting and len(self._running) < self._slots:
      request = self._waiting.popleft()
      self._running[request.id] = (request, answer(request))
      self.counts["prompt_tokens"] += len(request.prompt)
    self.counts["decode_steps"] += bool(self._running)
    self.counts["decoded_slots"] += len(self._running)
    return [self._next(*running) for running in list(self._running.values())]

  def _next(self, request, rest):
    sampling, first = request.sampling, len(rest) == len(answer(request))
    token = rest.pop(0)
    ends = token == EOS and not sampling.ignore_eos
    tokens = () if ends else (token,)
    finish_reason = "stop" if ends else None if rest else "length"
    if finish_reason:
      del self._running[request.id]
      self.counts["finished"] += 1
    self.counts["generated_tokens"] += len(tokens)
    prompt_logprobs = None
    if first and sampling.prompt_logprobs is not None:
      prompt_logprobs = (None, *(logprobs(id, sampling.prompt_logprobs) for id in request.prompt[1:]))
    entries = () if sampling.logprobs is None else tuple(logprobs(id, sampling.logprobs) for id in tokens)
    cached_tokens = len(request.prompt) - 1 if first else 0
    return Output(request.id, tokens, entries, finish_reason, prompt_logprobs, cached_tokens)

  def stats(self):
    return EngineStats(running=len(self._running), waiting=len(self._waiting), max_batch=self._slots, **self.counts)


def answer(request):
  """All ids that follow a prompt: of sampling by its seed, where the temperature is not 0."""
  prompt = [EOS if id == ord("Q") else id for id in request.prompt if id != EOS]
  backwards = prompt[::-1] or [ord("?")]
  if request.sampling.temperature:
    backwards = [ord("a") + request.sampling.seed % 26, *backwards]
  times = -(-request.sampling.max_tokens // len(backwards))
  return (backwards * times)[: request.sampling.max_tokens]


def logprobs(id, count):
  """The token itself is the second likeliest."""
  top = tuple((other, -0.5 - i) for i, other in enumerate(dict.fromkeys([(id + 1) % 256, id, *range(97, 120)])))
  return TokenLogprobs(-1.5, top[:count])


def main(argv):
  changes = json.loads(argv[1]) if len(argv) > 1 else {}
  step_seconds = changes.pop("step_seconds", 0.002)
  engine_process.GRACE_SECONDS = changes.pop("grace_seconds", engine_process.GRACE_SECONDS)
  if program := changes.pop("http_program", None):
    http_child.HTTP_PROGRAM = (program,)
  send_buffer = changes.pop("send_buffer", None)
  settings = Settings(**DEFAULTS | changes)
  listener = listen("127.0.0.1", 0)
  if send_buffer:  # of the connections too
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
  engine = FakeEngine(settings.max_batch, settings.max_length, settings.vocab, step_seconds)
  return engine_process.run(engine, settings, listener, f"listening {url(listener)}")


if __name__ == "__main__":
  run_program(main)
