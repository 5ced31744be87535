"""Training of small models on a mesh against that on one device: what tests of layouts share."""

import dataclasses
import functools

import jax
import numpy as np
from jax.sharding import NamedSharding

from deepseek_jax.config_sections import BalanceConfig, LogConfig, MeshConfig, ParallelConfig
from deepseek_jax.mesh import make_mesh
from deepseek_jax.sharding import spec
from deepseek_jax.training.layer_aux import observations
from deepseek_jax.training.router_bias import BIAS_RULES
from deepseek_jax.training.schedule import StepInputs
from deepseek_jax.training.state import init_state
from deepseek_jax.training.step_config import StepConfig
from tests import configs
from tests.configs import make_config, with_model
from tests.steps import make_state, make_step_with_grads

SEQ, BATCH, MICROBATCHES = 16, 16, 2
MODELS = dataclasses.replace(configs.DENSE, layers=4), dataclasses.replace(configs.V3, layers=5)
DENSE, V3 = (
  dataclasses.replace(
    make_config(model, SEQ, BATCH, BATCH // MICROBATCHES, loss_chunk=5), log=LogConfig(layer_rms=True)
  )
  for model in MODELS
)
# The parts of V3, of which a program is compiled in a fraction of the time.
CONFIGS = {
  "dense": DENSE, "v3": V3, "moe": with_model(V3, num_mtp_layers=0), "mtp": with_model(DENSE, num_mtp_layers=1),
  # A sliding window, within documents.
  "window": with_model(
    dataclasses.replace(DENSE, data=dataclasses.replace(DENSE.data, mask_documents=True)),
    attention=dataclasses.replace(configs.GQA, window=5),
  ),
  # Experts by token ids. No loss balances them. The dense dispatch compiles in half the time.
  "hash": with_model(
    dataclasses.replace(DENSE, balance=BalanceConfig(router_z_loss=0.001)),
    layers=2, moe=dataclasses.replace(configs.HASH_MOE, num_shared_experts=0, dispatch="dense"),
  ),
}  # fmt: skip


def tokens(step):
  ids = np.random.default_rng(step).integers(0, 64, (BATCH, SEQ + 1)).astype(np.int32)
  return ids.reshape(MICROBATCHES, -1, SEQ + 1)


def train(config, steps, born=False):
  """([gradients of each step], [metrics of each step], last state) of `steps` updates on the mesh of `config`.

  The first state is `born` on the mesh, by a program as large as the step's, or noise.
  """
  sizes = dataclasses.astuple(config.mesh)
  mesh = make_mesh(config.mesh, jax.devices()[: int(np.prod(sizes))])
  dtype = config.model.param_dtype
  rates = StepInputs(learning_rate=1e-2, mtp_weight=0.3, bias_update_rate=1e-2).as_arrays(dtype)
  found, reported = [], []
  with jax.set_mesh(mesh):
    # Blocks here and on every step: with fewer cores than virtual devices, programs in flight starve a collective.
    if born:
      init = jax.jit(init_state, static_argnums=0)
      state = jax.block_until_ready(init(StepConfig.of(config, bos=0), jax.random.key(config.seed)))
    else:
      state = make_state(config, mesh)
    step = jax.jit(make_step_with_grads(config), static_argnums=2)
    for i in range(steps):
      batch = jax.device_put(tokens(i), NamedSharding(mesh, spec(None, "batch", None)))
      state, metrics, grads = jax.block_until_ready(step(state, batch, MICROBATCHES, rates))
      found.append(jax.device_get(grads))
      reported.append(jax.device_get(metrics))
    return found, reported, jax.device_get(state)


@functools.cache
def one_device(config, steps, born=False):
  with jax.enable_x64(config.model.param_dtype == "float64"):
    return train(config, steps, born)


def changed(config, mesh, offload=False, kind="gather", **parallel):
  """`config` on a mesh, with fields of its section parallel, what waits in host memory, and how keys travel."""
  attention = dataclasses.replace(config.model.attention, kv_comm=kind)
  model = dataclasses.replace(config.model, attention=attention, remat="offload" if offload else config.model.remat)
  return dataclasses.replace(
    config, model=model, mesh=MeshConfig(**{"data": 1, **mesh}), parallel=ParallelConfig(**parallel),
    optimizer=dataclasses.replace(config.optimizer, offload=offload),
  )  # fmt: skip


def assert_observations_equal(metrics, expected, tolerance):
  """Integers are equal: the same experts were chosen, to the last choice. Others are up to `tolerance` of the largest."""

  def compare(a, b):
    assert (a.dtype.kind, a.shape) == (b.dtype.kind, b.shape)
    assert np.abs(a - b).max() <= (tolerance * np.abs(b).max() if b.dtype.kind == "f" else 0)

  ours, theirs = ({name: m[name] for name in observations() if name in m} for m in (metrics, expected))
  jax.tree.map(compare, ours, theirs)


def assert_equal(config, mesh, parallel, born=False, steps=3, tolerance=1e-10):
  """Training of `config` on the mesh is that on one device, up to `tolerance` relative to the largest of each array."""
  expected = one_device(config, steps, born)
  config = changed(config, mesh, **parallel)
  with jax.enable_x64(config.model.param_dtype == "float64"):
    ours = train(config, steps, born)
  for a, b in zip(ours[1], expected[1], strict=True):
    for metric in {"loss", "total_loss", "grad_norm", "mtp_loss"} & set(b):
      np.testing.assert_allclose(a[metric], b[metric], rtol=tolerance)
    assert_observations_equal(a, b, tolerance)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance), a["gradients"], b["gradients"])
    assert a.get("overflow", 0) == 0
  paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(expected[0])]
  worst = {
    path: np.abs(a - b).max() / np.abs(b).max()
    for path, a, b in zip(paths, jax.tree.leaves(ours[0]), jax.tree.leaves(expected[0]), strict=True)
  }
  assert not {path: error for path, error in worst.items() if not error < tolerance}
  bias_tolerance = 0 if BIAS_RULES[config.balance.bias_rule].is_exact else tolerance
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, bias_tolerance), ours[2].buffers, expected[2].buffers)
  for a, b in zip(jax.tree.leaves(ours[2].params), jax.tree.leaves(expected[2].params), strict=True):
    assert np.abs(a - b).max() / np.abs(b).max() < tolerance


def name(case):
  """The id of a test of (model, mesh, what `changed` takes beside it)."""
  model, mesh, parallel = case
  return "-".join([model, *(f"{key}={value}" for key, value in (mesh | parallel).items())])
