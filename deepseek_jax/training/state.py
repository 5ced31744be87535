"""The training state: plain nested dicts, born sharded."""

import dataclasses
import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from deepseek_jax.config import Config
from deepseek_jax.distributed import to_host
from deepseek_jax.model.transformer import init_params
from deepseek_jax.sharding import with_concrete_shardings
from deepseek_jax.training.optimizer import make_optimizer, place_opt_state

GATHERED_BYTES = 2**30  # of an array that each device and process may hold whole
# Far apart: of seeds that differ in low bits one would see neighbours exchanged as another does.
SEEDS = (0x9E3779B9, 0x3C6EF372, 0xDAA66D2B, 0x78DDE6E4)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that an update reads and writes. `skipped` counts updates that were skipped: total, in a row."""

  step: jax.Array
  params: dict
  buffers: dict
  opt_state: optax.OptState
  skipped: dict


def init_state(config: Config, key) -> TrainState:
  """State before the first update. Run it under `jax.jit`, so that every array is born sharded."""
  return first_state(config, *init_params(config.model, key))


def first_state(config: Config, params, buffers) -> TrainState:
  """State before the first update of these weights, its moments sharded as they are. Run it under `jax.jit`."""
  zero, opt_state = jnp.zeros((), jnp.int32), make_optimizer(config.optimizer).init(params)
  return TrainState(
    step=zero,
    params=params,
    buffers=buffers,
    opt_state=place_opt_state(jax.memory.Space.Host, opt_state) if config.optimizer.offload else opt_state,
    skipped={"total": zero, "in_a_row": zero},
  )


def abstract_state(config: Config, mesh) -> TrainState:
  """Shapes, dtypes and shardings of the state; nothing is allocated. Needs `mesh` set."""
  state = with_concrete_shardings(jax.eval_shape(lambda: init_state(config, jax.random.key(0))), mesh)
  if config.optimizer.offload:  # which eval_shape does not tell
    state = dataclasses.replace(state, opt_state=place_opt_state(jax.memory.Space.Host, state.opt_state))
  return state


def state_sha256(state) -> str:
  """Hash over the path, dtype, shape and content of every array, the same on every mesh that holds the same values."""
  digest = hashlib.sha256()
  for path, array in jax.tree.leaves_with_path(state):
    digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
    digest.update(_content(array).reshape(-1).view(np.uint8).data)
  return digest.hexdigest()


def _content(array) -> np.ndarray:
  """What is hashed of an array: its bytes, or of more than GATHERED_BYTES, which stay where they are, four sums."""
  if array.nbytes <= GATHERED_BYTES:
    return np.ascontiguousarray(to_host(array))
  return np.array([to_host(_sum(array, np.uint32(seed))) for seed in SEEDS])


@jax.jit
def _sum(array, seed):
  """The sum, modulo 2**32, of a hash of each element's bits and place: exact in any order, and so on any mesh.

  `seed`, uint32, makes another hash. It tells apart what chance or a mistake makes differ, not what an adversary does.
  """
  array = jax.device_put(array, jax.memory.Space.Device)  # from the host, where an offloaded moment is
  unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
  bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)  # of 8 bytes: two words, on a last axis
  sharding = jax.typeof(bits).sharding
  places = [jax.lax.broadcasted_iota(jnp.uint32, bits.shape, i, out_sharding=sharding) for i in range(bits.ndim)]
  return jnp.sum(functools.reduce(lambda mixed, word: _mix(mixed ^ word), [*places, bits], seed), dtype=jnp.uint32)


def _mix(word):
  """MurmurHash3's finalizer, in which every bit of a uint32 changes half of the others."""
  word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
  word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
  return word ^ (word >> 16)
