"""From text to batches: `tokenizer` and `sources` -> `packing` (once, cached) -> `packed` windows -> `pipeline`."""
