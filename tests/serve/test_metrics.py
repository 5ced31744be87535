import dataclasses

from deepseek_jax.generate.request import EngineStats
from deepseek_jax.serve import metrics


def values(text):
  lines = [line for line in text.decode().splitlines() if not line.startswith("#")]
  return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_every_statistic_is_a_metric():
  fields = {field.name for field in dataclasses.fields(EngineStats)}
  assert {name.removeprefix("engine_").removesuffix("_total") for name in metrics.ENGINE} == fields
  stats = EngineStats(**{name: i for i, name in enumerate(sorted(fields), 1)})
  got = values(metrics.Metrics().to_text(stats))
  for name in metrics.ENGINE:
    assert got[f"deepseek_jax_{name}"] == getattr(stats, name.removeprefix("engine_").removesuffix("_total"))
  assert got["deepseek_jax_engine_occupancy"] == stats.decoded_slots / (stats.decode_steps * stats.max_batch)


def test_tokens_of_one_step_share_its_time(monkeypatch):
  made, now = metrics.Metrics(), iter([1.0, 3.0, 3.5])
  monkeypatch.setattr(metrics.time, "monotonic", lambda: next(now))
  timer = metrics.ChoiceTimer(made, 0.5)
  timer.add_tokens(1)
  timer.add_tokens(0)
  timer.add_tokens(2)
  timer.finish("stop")
  got = values(made.to_text(EngineStats()))
  assert got["deepseek_jax_time_to_first_token_seconds_sum"] == 0.5
  assert got["deepseek_jax_inter_token_latency_seconds_count"] == 2
  assert got["deepseek_jax_inter_token_latency_seconds_sum"] == 2.0
  assert got["deepseek_jax_request_latency_seconds_sum"] == 3.0
  assert got['deepseek_jax_choices_total{finish_reason="stop"}'] == 1
  assert not any("_created" in name for name in got)
