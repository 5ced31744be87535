"""The held-out split of a run, by source, as the run itself evaluates it at its end."""

import dataclasses
import functools

import jax
from jax.sharding import NamedSharding

from deepseek_jax.checkpoint.load import LoadedWeights, SavedModel
from deepseek_jax.console import current_console
from deepseek_jax.data.pipeline import open_data
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.evaluate.heldout import evenly_spaced, window_losses
from deepseek_jax.evaluate.results import TextResult
from deepseek_jax.kernels.implementations import NO_REPLACEMENTS
from deepseek_jax.model.transformer import graphdef
from deepseek_jax.sharding import num_batch_shards, spec
from deepseek_jax.training.batch import load_windows
from deepseek_jax.training.step import jit_eval_step
from deepseek_jax.training.step_config import StepConfig


def evaluate_run_heldout(
  saved: SavedModel,
  weights: LoadedWeights,
  tokenizer: Tokenizer,
  tokenizer_name: str | None,
  batch: int,
  sequences: int | None,
) -> dict[str, TextResult]:
  """{source: TextResult} of windows of the held-out split, evenly spaced over all sources; one without such is left out.

  Args:
    saved: of a workdir.
    weights: of `saved`.
    tokenizer, tokenizer_name: of `saved`, and where it is; None: its own data.tokenizer.
    batch: windows in a pass, rounded up to a multiple of the shards of the batch.
    sequences: windows; None: those of the run's final evaluation (eval.final_sequences); 0: all.

  The text is packed into the cache where it is not there. A note says where it is not what the run trained on. Raises
  DataError for text that is not where it was.
  """
  config = saved.config
  data_config = config.data if tokenizer_name is None else dataclasses.replace(config.data, tokenizer=tokenizer_name)
  data = open_data(data_config, config.model.vocab, config.seed)
  if data.fingerprint != saved.data_fingerprint:
    current_console().print(
      "note     the text of data.sources is not what the checkpoint saw: neither is its held-out split", err=True
    )
  limit = config.eval.final_sequences if sequences is None else sequences or len(data.heldout)
  window_ids = evenly_spaced(len(data.heldout), limit)
  with jax.set_mesh(weights.mesh):
    shards = num_batch_shards(weights.mesh)
    eval_step = functools.partial(
      jit_eval_step(StepConfig.of(config, tokenizer.bos), graphdef(config.model), NO_REPLACEMENTS),
      weights.params,
      weights.buffers,
    )
    load = functools.partial(
      load_windows, data.heldout, width=config.data.seq + 1, sharding=NamedSharding(weights.mesh, spec("batch", None))
    )
    with current_console().count_progress("evaluate: held-out windows", len(window_ids)) as update:
      losses, _ = window_losses(eval_step, load, window_ids, -(-batch // shards) * shards, update)
  target_bytes, results = data.heldout.target_bytes(window_ids), {}
  for name, windows in data.heldout_windows:
    chosen = (window_ids >= windows.start) & (window_ids < windows.stop)
    if count := int(chosen.sum()):
      results[name] = TextResult(
        float(losses[chosen].sum()), count * config.data.seq, int(target_bytes[chosen].sum()), count
      )
  return results
