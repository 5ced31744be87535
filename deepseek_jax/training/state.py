"""The training state: nested dicts of sharded arrays."""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from deepseek_jax.distributed import gather_to_host
from deepseek_jax.model.transformer import init_params
from deepseek_jax.optimizers.optimizer import make_optimizer, place_opt_state
from deepseek_jax.optimizers.trainable import split_trainable
from deepseek_jax.sharding import with_concrete_shardings
from deepseek_jax.training.checksum import sum_of_hashes
from deepseek_jax.training.step_config import StepConfig
from deepseek_jax.typing import Params, PyTree

MAX_GATHERED_BYTES = 2**30  # of an array that is all-gathered to every device and process for its hash
# Far apart: with seeds that differ in low bits only, exchanged neighbors could cancel in all sums alike.
HASH_SEEDS = (0x9E3779B9, 0x3C6EF372, 0xDAA66D2B, 0x78DDE6E4)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that an update reads and writes."""

  step: jax.Array  # [] int32
  params: Params
  buffers: Params
  opt_state: optax.OptState
  skipped: dict[str, jax.Array]  # counts [] int32 of skipped updates: "total", "in_a_row"


def init_state(config: StepConfig, key: jax.Array | None) -> TrainState:
  """State before the first update, of `init_params`. Run it under `jax.jit`, so that every array is created sharded."""
  return state_from_params(config, *init_params(config.model, key))


def state_from_params(config: StepConfig, params: Params, buffers: Params) -> TrainState:
  """State before the first update of the given parameters. Run it under `jax.jit`: moments are sharded as `params`."""
  trainable, _ = split_trainable(params, config.optimizer.trainable)
  zero, opt_state = jnp.zeros((), jnp.int32), make_optimizer(config.optimizer, config.model).init(trainable)
  return TrainState(
    step=zero,
    params=params,
    buffers=buffers,
    opt_state=place_opt_state(jax.memory.Space.Host, opt_state) if config.optimizer.offload else opt_state,
    skipped={"total": zero, "in_a_row": zero},
  )


def abstract_state(config: StepConfig, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> TrainState:
  """The state as ShapeDtypeStructs with shardings; nothing is allocated. `mesh` is the mesh that is set."""
  state = with_concrete_shardings(jax.eval_shape(lambda: init_state(config, key=None)), mesh)
  if config.optimizer.offload:  # eval_shape loses the memory kind
    state = dataclasses.replace(state, opt_state=place_opt_state(jax.memory.Space.Host, state.opt_state))
  return state


def state_sha256(state: PyTree) -> str:
  """Hash of path, dtype, shape and content of every array; the same on every mesh. All processes have to call this."""
  digest = hashlib.sha256()
  for path, array in jax.tree.leaves_with_path(state):
    digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
    digest.update(_hash_input(array).reshape(-1).view(np.uint8).data)
  return digest.hexdigest()


def _hash_input(array: jax.Array | np.ndarray) -> np.ndarray:
  """What is hashed of an array: its elements, or of more than MAX_GATHERED_BYTES four sums that need no all-gather."""
  if array.nbytes <= MAX_GATHERED_BYTES:
    return np.ascontiguousarray(gather_to_host(array))
  return np.array([gather_to_host(_sum_of_hashes(array, np.uint32(seed))) for seed in HASH_SEEDS])


@jax.jit
def _sum_of_hashes(array, seed):
  # From the host, where an offloaded moment is.
  return sum_of_hashes(jax.device_put(array, jax.memory.Space.Device), seed)
