"""Throughput of the input pipeline from a warm cache, per CPU core: shuffle, read and batch, as in training.

  python -m benchmarks.input [--source=PATH] [--seq=4096] [--batch=64] [--steps=200] [--cache=DIR]

The text is read as bytes, and packed first if needed. Nothing is put on a device.
"""

import time

from absl import flags

from deepseek_jax.config_sections import DataConfig, TrainConfig
from deepseek_jax.data import pipeline
from deepseek_jax.flags import parse, run_program


def main(argv: list[str]) -> int:
  values = flags.FlagValues()
  flags.DEFINE_string("source", "python-stdlib", "text, as in data.sources", flag_values=values)
  flags.DEFINE_integer("seq", 4096, "tokens a window predicts", lower_bound=2, flag_values=values)
  flags.DEFINE_integer("batch", 64, "windows per step", lower_bound=1, flag_values=values)
  flags.DEFINE_integer("steps", 200, "steps to time", lower_bound=1, flag_values=values)
  flags.DEFINE_string("cache", "", "folder of packed data; default: the user's cache folder", flag_values=values)
  parse(argv, values, __doc__)

  seq, batch = values.seq, values.batch
  data = pipeline.open_data(DataConfig(sources=(values.source,), seq=seq, cache=values.cache), vocab=257, seed=0)
  train = TrainConfig(global_batch=batch)
  for steps in (len(data.train) // batch + 1, values.steps):  # the first pass warms the page cache
    wall_start, cpu_start = time.perf_counter(), time.process_time()
    for windows, _ in pipeline.iterate_batches(data, train, pipeline.Consumed(), steps, data.train.tokens):
      assert windows.shape == (batch, seq + 1)
    wall, cpu = time.perf_counter() - wall_start, time.process_time() - cpu_start
  tokens = values.steps * batch * seq
  print(f"windows of {seq} tokens, batches of {batch}: {tokens / cpu / 1e6:.1f} million tokens per core-second")
  print(f"{values.steps} steps, {tokens / 1e6:.1f} million tokens: {wall:.2f} s wall, {cpu:.2f} s CPU")
  return 0


if __name__ == "__main__":
  run_program(main)
