"""Log-likelihoods of tokens: a batch of sequences in one pass, padded to one of few lengths."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from deepseek_jax.checkpoint.load import LoadedWeights
from deepseek_jax.distributed import gather_to_host
from deepseek_jax.errors import DataError
from deepseek_jax.generate.decoding import padded_length
from deepseek_jax.model.transformer import Transformer, graphdef
from deepseek_jax.model_config import ModelConfig
from deepseek_jax.sharding import UNSHARDED_SEQUENCE, axis_rules, num_batch_shards, spec, spmd
from deepseek_jax.typing import Params

CHUNK = 512  # positions whose logits exist at once


class Request(NamedTuple):
  """Token ids: `continuation` is scored, given `context`, which has at least one."""

  context: Sequence[int]
  continuation: Sequence[int]


class TokenScores(NamedTuple):
  """Of the tokens of one continuation: float64 [n], ln p given all before; bool [n], whether it is the likeliest."""

  log_probs: np.ndarray
  is_argmax: np.ndarray


def padded_batch(count: int, batch: int, shards: int) -> int:
  """Sequences of a pass for `count` requests: `batch`, or the next power of two where there are fewer requests.

  It is rounded up to a multiple of `shards`, the number of shards of the batch.
  """
  size = min(batch, 1 << (count - 1).bit_length())
  return -(-size // shards) * shards


def token_scores(model: Transformer, hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(ln p, whether the target is the likeliest token), each [batch, seq], of `targets`, CHUNK positions at a time.

  hidden: [batch, seq, embed]. targets: int [batch, seq]; what stands at negative ones means nothing.
  """
  batch, seq, embed = hidden.shape
  chunk = min(CHUNK, seq)
  hidden = jnp.pad(hidden, ((0, 0), (0, -seq % chunk), (0, 0))).reshape(batch, -1, chunk, embed)
  targets = jnp.pad(targets, ((0, 0), (0, -seq % chunk))).reshape(batch, -1, chunk)

  def score(arguments):
    hidden, targets = arguments
    logits = model.logits(hidden)
    log_probs = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(log_probs, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
    return chosen, jnp.argmax(logits, -1) == targets

  scores = jax.lax.map(score, (hidden.swapaxes(0, 1), targets.swapaxes(0, 1)))
  return tuple(score.swapaxes(0, 1).reshape(batch, -1)[:, :seq] for score in scores)


@functools.partial(jax.jit, static_argnames="graphdef")
def score_batch(
  graphdef: nnx.GraphDef, params: Params, buffers: Params, ids: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """`token_scores` of the sequences `ids` int [batch, seq], on global arrays: each device scores its part of the batch."""

  def local(params, buffers, ids, targets):
    model = nnx.merge(graphdef, params, buffers)
    return token_scores(model, model(ids)[0], targets)

  param_specs, buffer_specs = (jax.tree.map(lambda x: jax.typeof(x).sharding.spec, tree) for tree in (params, buffers))
  by_batch = spec("batch", None)
  with axis_rules(UNSHARDED_SEQUENCE):
    program = spmd(local, (param_specs, buffer_specs, by_batch, by_batch), (by_batch, by_batch), differentiable=False)
    return program(params, buffers, ids, targets)


class Scorer:
  """Scores continuations by a model.

  Args:
    weights: its arrays.
    model: its config.
    seq: positions that it takes. Of what is longer the end is scored, as lm-evaluation-harness does.
    batch: sequences in a pass.
  """

  def __init__(self, weights: LoadedWeights, model: ModelConfig, seq: int, batch: int):
    self.weights, self.seq, self.batch = weights, seq, batch
    with jax.set_mesh(weights.mesh):
      self.graphdef = graphdef(model.for_sampling())

  def score(self, requests: Sequence[Request], update: Callable[[int], None] = lambda done: None) -> list[TokenScores]:
    """TokenScores of each of `requests`. update: is called with the number of requests that are done.

    Requests of one padded length share a pass; a request's scores do not depend on the others. Raises DataError for a
    continuation that is longer than the model takes, or empty.
    """
    for request in requests:
      if not 0 < len(request.continuation) <= self.seq:
        raise DataError(
          f"a continuation has {len(request.continuation):,} tokens, and the model scores 1 to {self.seq:,}: shorten it, or "
          "raise --seq"
        )
    results: dict[int, TokenScores] = {}
    by_length: dict[int, list[int]] = {}
    for index, request in enumerate(requests):
      length = min(len(request.context) + len(request.continuation) - 1, self.seq)
      by_length.setdefault(padded_length(length, self.seq), []).append(index)
    for length, indices in sorted(by_length.items(), reverse=True):  # what needs most memory comes first
      batch = padded_batch(len(indices), self.batch, num_batch_shards(self.weights.mesh))
      for start in range(0, len(indices), batch):
        chosen = indices[start : start + batch]
        scores = self._score_batch([requests[i] for i in chosen], batch, length)
        results |= zip(chosen, scores, strict=True)
        update(len(results))
    return [results[i] for i in range(len(requests))]

  def _score_batch(self, requests: Sequence[Request], batch: int, length: int) -> list[TokenScores]:
    """TokenScores of at most `batch` requests that fit into `length` positions."""
    ids, targets, ends = np.zeros((batch, length), np.int32), np.full((batch, length), -1, np.int32), []
    for row, request in enumerate(requests):
      tokens = [*request.context, *request.continuation][-(self.seq + 1) :]
      ends.append(len(tokens) - 1)
      ids[row, : ends[-1]] = tokens[:-1]
      targets[row, : ends[-1]] = tokens[1:]
    weights = self.weights
    with jax.set_mesh(weights.mesh):
      arrays = jax.device_put((ids, targets), NamedSharding(weights.mesh, spec("batch", None)))
      log_probs, is_argmax = map(gather_to_host, score_batch(self.graphdef, weights.params, weights.buffers, *arrays))
    scored = [slice(end - len(request.continuation), end) for end, request in zip(ends, requests, strict=True)]
    return [
      TokenScores(log_probs[row, part].astype(np.float64), is_argmax[row, part]) for row, part in enumerate(scored)
    ]
