"""The training state: plain nested dicts, born sharded."""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from deepseek_jax.config import Config
from deepseek_jax.distributed import to_host
from deepseek_jax.model.transformer import new_params
from deepseek_jax.sharding import concrete
from deepseek_jax.training.optimizer import make_optimizer, moments_in

GATHERED_BYTES = 2**30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that an update reads and writes. `skipped` counts updates that were skipped: total, in a row."""

  step: jax.Array
  params: dict
  buffers: dict
  opt_state: optax.OptState
  skipped: dict


def new_state(config: Config, key) -> TrainState:
  """State before the first update. Run it under `jax.jit`, so that every array is born sharded."""
  return first_state(config, *new_params(config.model, key))


def first_state(config: Config, params, buffers) -> TrainState:
  """State before the first update of these weights, its moments sharded as they are. Run it under `jax.jit`."""
  zero, opt_state = jnp.zeros((), jnp.int32), make_optimizer(config.optimizer).init(params)
  return TrainState(
    step=zero,
    params=params,
    buffers=buffers,
    opt_state=moments_in(jax.memory.Space.Host, opt_state) if config.optimizer.offload else opt_state,
    skipped={"total": zero, "in_a_row": zero},
  )


def abstract_state(config: Config, mesh) -> TrainState:
  """Shapes, dtypes and shardings of the state; nothing is allocated. Needs `mesh` set."""
  state = concrete(jax.eval_shape(lambda: new_state(config, jax.random.key(0))), mesh)
  if config.optimizer.offload:  # which eval_shape does not tell
    state = dataclasses.replace(state, opt_state=moments_in(jax.memory.Space.Host, state.opt_state))
  return state


def state_sha256(state) -> str | None:
  """Hash over the path, dtype, shape and bytes of every array, the same on every mesh that holds the same values.

  None where processes share an array of more than GATHERED_BYTES: each device would have to hold it whole.
  """
  arrays = [a for a in jax.tree.leaves(state) if isinstance(a, jax.Array) and not a.is_fully_addressable]
  if any(a.nbytes > GATHERED_BYTES for a in arrays):
    return None
  digest = hashlib.sha256()
  for path, array in jax.tree.leaves_with_path(state):
    array = np.ascontiguousarray(to_host(array))
    digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
    digest.update(array.reshape(-1).view(np.uint8).data)
  return digest.hexdigest()
