"""Loss by position: what a model gains from more context, and whether it still does beyond the length it was trained at."""

import dataclasses
from typing import Any

import numpy as np

from deepseek_jax.console import current_console
from deepseek_jax.data.pipeline import open_data
from deepseek_jax.evaluate.heldout import evenly_spaced
from deepseek_jax.evaluate.language_model import LanguageModel
from deepseek_jax.evaluate.scoring import Request

FIRST_BUCKET = 16  # positions


def position_edges(seq: int) -> list[int]:
  """Edges of buckets of `seq` positions: FIRST_BUCKET, then two an octave, and `seq` at the end."""
  edges, size = [0], FIRST_BUCKET
  while size < seq:
    edges += [size, size + size // 2]
    size *= 2
  return [edge for edge in edges if edge < seq] + [seq]


def evaluate_by_position(
  model: LanguageModel, tokenizer_name: str | None, sequences: int | None
) -> dict[str, dict[str, Any]]:
  """{"FIRST to LAST": {"loss": nats per token of all windows, source: of its windows, "tokens": how many}} by position.

  Position 0 is that of a window's first target. The windows are those of the held-out split, at the length of `model`, evenly
  spaced over all sources, as training packs them: several documents may be in one, and no document mask is applied.

  Args:
    model: of a run.
    tokenizer_name: where its tokenizer is; None: its own data.tokenizer.
    sequences: windows; None: as many as in the run's final evaluation; 0: all.

  Raises DataError where the text is gone, or too little is held out for one window.
  """
  config = model.saved.config
  data_config = dataclasses.replace(config.data, seq=model.seq, tokenizer=tokenizer_name or config.data.tokenizer)
  data = open_data(data_config, config.model.vocab, config.seed)
  limit = config.eval.final_sequences if sequences is None else sequences or len(data.heldout)
  window_ids = evenly_spaced(len(data.heldout), limit)
  losses = np.empty((len(window_ids), model.seq))
  step = 8 * model.batch  # windows that are in memory at once
  with current_console().count_progress("evaluate: loss by position", len(window_ids)) as update:
    for start in range(0, len(window_ids), step):
      tokens = data.heldout.tokens(window_ids[start : start + step]).astype(np.int64)
      scores = model.scorer.score([Request(row[:1].tolist(), row[1:].tolist()) for row in tokens])
      losses[start : start + len(tokens)] = [-score.log_probs for score in scores]
      update(start + len(tokens))
  by_source = {
    name: losses[(window_ids >= windows.start) & (window_ids < windows.stop)] for name, windows in data.heldout_windows
  }
  named = {name: rows for name, rows in by_source.items() if len(rows)} if len(by_source) > 1 else {}
  edges = position_edges(model.seq)
  return {
    f"{first} to {end - 1}": {
      "loss": float(losses[:, first:end].mean()),
      **{name: float(rows[:, first:end].mean()) for name, rows in named.items()},
      "tokens": losses[:, first:end].size,
    }
    for first, end in zip(edges[:-1], edges[1:], strict=True)
  }
