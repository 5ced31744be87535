"""What /metrics gives: latencies and counts of this process, and what the engine counts, which outlives it."""

import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from deepseek_jax.generate.request import EngineStats

PREFIX = "deepseek_jax_"
FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
# engine_FIELD of EngineStats -> text; counters end with _total
ENGINE = {
  "engine_steps_total": "Steps of the engine",
  "engine_compilations_total": "XLA programs compiled",
  "engine_running": "Requests that run",
  "engine_waiting": "Requests that wait for a slot",
  "engine_max_batch": "Requests that can run at a time",
  "engine_decode_steps_total": "Steps that decoded",
  "engine_decoded_slots_total": "Requests that took part in decoding steps, added up",
  "engine_pages": "Pages of the key-value cache",
  "engine_free_pages": "Pages without content",
  "engine_cached_pages": "Unused pages with a prefix that a request may hit",
  "engine_prompt_tokens_total": "Tokens of prompts",
  "engine_cached_prompt_tokens_total": "Tokens of prompts that the prefix cache had",
  "engine_generated_tokens_total": "Tokens generated",
  "engine_prefilled_tokens_total": "Tokens of prompts that were computed",
  "engine_preemptions_total": "Requests that lost their pages and were computed again",
  "engine_drafted_tokens_total": "Tokens drafted by speculation",
  "engine_accepted_tokens_total": "Drafted tokens that were accepted",
  "engine_finished_total": "Requests that the engine finished",
  "engine_cancelled_total": "Requests that were cancelled",
}


class Metrics:
  """Metrics of the server in a registry of their own."""

  def __init__(self) -> None:
    disable_created_metrics()  # times of creation, one more series for each label
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
    for name, text in ENGINE.items():
      counter = name.removesuffix("_total")
      kind = GaugeMetricFamily if counter == name else CounterMetricFamily
      yield kind(PREFIX + counter, text, value=getattr(self.stats, counter.removeprefix("engine_")))
    slots = self.stats.decode_steps * self.stats.max_batch
    yield GaugeMetricFamily(
      PREFIX + "engine_occupancy",
      "Share of slots in use, averaged over the decoding steps",
      value=self.stats.decoded_slots / slots if slots else 0.0,
    )
