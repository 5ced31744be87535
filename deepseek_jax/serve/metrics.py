"""What /metrics gives: latencies and counts of this process, and what the engine counts, which outlives it."""

import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from deepseek_jax.generate.request import EngineStats

PREFIX = "deepseek_jax_"
FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
# field of EngineStats -> (is a counter, text)
ENGINE = {
  "steps": (True, "steps of the engine"),
  "compilations": (True, "XLA programs compiled"),
  "running": (False, "requests that run"),
  "waiting": (False, "requests that wait for a slot"),
  "max_batch": (False, "requests that can run at a time"),
  "decode_steps": (True, "steps that decoded"),
  "decoded_slots": (True, "requests that took part in decoding steps, added up"),
  "pages": (False, "pages of the key-value cache"),
  "free_pages": (False, "pages without content"),
  "cached_pages": (False, "unused pages with a prefix that a request may hit"),
  "prompt_tokens": (True, "tokens of prompts"),
  "cached_prompt_tokens": (True, "tokens of prompts that the prefix cache had"),
  "generated_tokens": (True, "tokens generated"),
  "prefilled_tokens": (True, "tokens of prompts that were computed"),
  "preemptions": (True, "requests that lost their pages and were computed again"),
  "drafted_tokens": (True, "tokens drafted by speculation"),
  "accepted_tokens": (True, "drafted tokens that were accepted"),
  "finished": (True, "requests that the engine finished"),
  "cancelled": (True, "requests that were cancelled"),
}


class Metrics:
  """Metrics of the server in a registry of their own."""

  def __init__(self) -> None:
    self._registry = CollectorRegistry()
    self._engine = _EngineCollector()
    self._registry.register(self._engine)
    histogram = lambda name, text, buckets: Histogram(PREFIX + name, text, buckets=buckets, registry=self._registry)
    self.first_token = histogram(
      "time_to_first_token_seconds", "From a request to its first token", FIRST_TOKEN_BUCKETS
    )
    self.token = histogram("inter_token_latency_seconds", "From a token to the next one", TOKEN_BUCKETS)
    self.request = histogram("request_latency_seconds", "From a request to the end of its answer", REQUEST_BUCKETS)
    self.choices = Counter(PREFIX + "choices", "Answers by finish reason", ["finish_reason"], registry=self._registry)
    self.responses = Counter(PREFIX + "responses", "Responses by route and HTTP status", ["route", "status"], registry=self._registry)  # fmt: skip

  def to_text(self, stats: EngineStats) -> bytes:
    """In Prometheus' text format, with the engine's statistics as they are given."""
    self._engine.stats = stats
    return generate_latest(self._registry)


class ChoiceTimer:
  """Times the tokens of an answer. started: time.monotonic() of its request."""

  def __init__(self, metrics: Metrics, started: float):
    self._metrics, self._started = metrics, started
    self._last: float | None = None  # token

  def add_tokens(self, count: int) -> None:
    """`count` tokens came now; several of a step share the time since the one before."""
    if not count:
      return
    now = time.monotonic()
    if self._last is None:
      self._metrics.first_token.observe(now - self._started)
      self._last, count = now, count - 1
    for _ in range(count):
      self._metrics.token.observe((now - self._last) / count)
    self._last = now

  def finish(self, reason: str) -> None:
    """The answer ended: stop, length, or cancelled or error."""
    self._metrics.request.observe(time.monotonic() - self._started)
    self._metrics.choices.labels(reason).inc()


class _EngineCollector:
  """The engine's statistics as metrics, and the occupancy of its slots, which follows from them."""

  def __init__(self) -> None:
    self.stats = EngineStats()

  def collect(self) -> Iterable[Metric]:
    """Metrics of `stats`."""
    for field, (is_counter, text) in ENGINE.items():
      kind = CounterMetricFamily if is_counter else GaugeMetricFamily
      yield kind(f"{PREFIX}engine_{field}", text[0].upper() + text[1:], value=getattr(self.stats, field))
    slots = self.stats.decode_steps * self.stats.max_batch
    yield GaugeMetricFamily(
      PREFIX + "engine_occupancy",
      "Share of slots in use, averaged over the decoding steps",
      value=self.stats.decoded_slots / slots if slots else 0.0,
    )
