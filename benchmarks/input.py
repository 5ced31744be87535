"""How fast windows come from a warm cache, per core: order, read and batch, as a run does it.

  python -m benchmarks.input [--seq=4096] [--batch=64] [--steps=200] [--cache=DIR]

Uses python-stdlib as bytes, packed first if need be. Nothing is put on a device: `place` only reads the rows.
"""

import argparse
import time

from deepseek_jax.config import DataConfig, TrainConfig
from deepseek_jax.data import pipeline


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--seq", type=int, default=4096, help="tokens a window predicts")
  parser.add_argument("--batch", type=int, default=64, help="windows per step")
  parser.add_argument("--steps", type=int, default=200, help="steps that are timed")
  parser.add_argument("--cache", default="", help="folder of packed data; default: the user's cache folder")
  args = parser.parse_args()

  data = pipeline.open_data(DataConfig(seq=args.seq, cache=args.cache), vocab=257, seed=0)
  train = TrainConfig(global_batch=args.batch)
  for steps in (len(data.train) // args.batch + 1, args.steps):  # the first pass warms the page cache
    wall, cpu = time.perf_counter(), time.process_time()
    for rows, _ in pipeline.batches(data, train, 0, steps, data.train.tokens):
      assert rows.shape == (args.batch, args.seq + 1)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
  tokens = args.steps * args.batch * args.seq
  print(
    f"windows of {args.seq} tokens, batches of {args.batch}: {tokens / cpu / 1e6:.1f} million tokens per core-second"
  )
  print(f"{args.steps} steps, {tokens / 1e6:.1f} million tokens: {wall:.2f} s wall, {cpu:.2f} s CPU")


if __name__ == "__main__":
  main()
