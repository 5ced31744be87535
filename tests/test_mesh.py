"""Mesh sizes, and logical axes on it."""

import jax
import numpy as np
import pytest

from deepseek_jax.config import Config
from deepseek_jax.config_sections import MeshConfig
from deepseek_jax.errors import ConfigError
from deepseek_jax.logical_axes import RULES
from deepseek_jax.mesh import AXES, make_mesh, mesh_sizes, resolve_mesh
from deepseek_jax.sharding import axis_rules, num_batch_shards, spec


@pytest.mark.parametrize(
  ("config", "devices", "sizes"),
  [
    (MeshConfig(), 1, (1, 1, 1, 1, 1, 1)),
    (MeshConfig(), 8, (8, 1, 1, 1, 1, 1)),
    (MeshConfig(data=2, fsdp=-1, tensor=2), 16, (2, 1, 4, 1, 1, 2)),
    (MeshConfig(data=1, tensor=4), 4, (1, 1, 1, 1, 1, 4)),
  ],
)
def test_sizes(config, devices, sizes):
  assert mesh_sizes(config, devices) == sizes


@pytest.mark.parametrize(
  ("config", "devices", "advice"),
  [
    (MeshConfig(data=3), 4, "set mesh.data=4$"),
    (MeshConfig(data=2), 4, "set mesh.data=4 or mesh.fsdp=2$"),
    (MeshConfig(tensor=8), 4, "set mesh.tensor=4$"),
    (MeshConfig(fsdp=3), 4, "set mesh.fsdp=4$"),
    (MeshConfig(data=1, fsdp=3, tensor=3), 4, "change the mesh fields so that their product is 4$"),
  ],
)
def test_sizes_that_do_not_fit(config, devices, advice):
  with pytest.raises(ConfigError, match=rf"data=.* x tensor=.* {devices} are here: {advice}"):
    mesh_sizes(config, devices)


def test_resolving_checks_the_model_against_the_free_axis():
  with pytest.raises(ConfigError, match=r"heads=4 .* mesh\.tensor=8"):
    resolve_mesh(Config(mesh=MeshConfig(data=1, tensor=-1), model=Config().model), 8)


class SliceDevice:
  """What the mesh asks of a device of a machine with several slices."""

  platform, device_kind, process_index = "cpu", "cpu", 0

  def __init__(self, index, slices, per_slice):
    self.id, self.slice_index = index, index // per_slice


def test_only_the_data_axis_crosses_slices():
  devices = [SliceDevice(i, 2, 4) for i in range(8)]
  mesh = make_mesh(MeshConfig(data=4, tensor=2), devices)
  crossing = np.vectorize(lambda device: device.slice_index)(mesh.devices).reshape(4, 2)
  assert crossing.tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
  with pytest.raises(ConfigError, match=r"mesh\.data=1 on 2 slices.* multiple of 2"):
    make_mesh(MeshConfig(data=1, fsdp=8), devices)


def test_axes_are_explicit_and_logical_names_resolve():
  mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=-1))
  assert mesh.axis_names == AXES and set(mesh.axis_types) == {jax.sharding.AxisType.Explicit}
  assert num_batch_shards(mesh) == 2
  assert spec("embed", "mlp") == jax.P(None, None)  # without a mesh nothing is shared
  with jax.set_mesh(mesh):
    assert spec("embed", None, "mlp") == jax.P("fsdp", None, "tensor")
    assert spec("batch", "stream", "heads") == jax.P("fsdp", "tensor", "tensor")
    with axis_rules({"stream": ()}):
      assert spec("batch", "stream") == jax.P("fsdp", None)
  assert {axis for value in RULES.values() for axis in value} == set(AXES)
