"""From text to batches: `sources` and `tokenizer` -> `packing` (once, cached) -> `packed_dataset` -> `pipeline`."""
