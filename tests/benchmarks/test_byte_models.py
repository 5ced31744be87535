"""Compressors and n-gram models of bytes beside a run's held-out loss."""

from tests.benchmarks.programs import benchmark


def test_byte_models(text, tmp_path):
  settings = (f"data.sources={text}", f"data.cache={tmp_path}", "data.seq=32", "data.heldout_fraction=0.3")
  out, _ = benchmark("byte_models", *(f"--config.{setting}" for setting in settings))
  counts, *models = out.splitlines()
  assert "held-out bytes after" in counts
  assert [line[:14].strip() for line in models] == ["gzip -9", "xz -9", "order-2 bytes", "order-3 bytes"]
  assert all(0 < float(line.split()[-4]) < 8 and line.endswith("bits per byte") for line in models)
