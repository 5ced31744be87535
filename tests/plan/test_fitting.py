import pytest

from deepseek_jax.flags import load_config
from deepseek_jax.mesh import resolve_mesh
from deepseek_jax.plan.fitting import smallest_fitting_change
from deepseek_jax.plan.memory import estimate_memory
from deepseek_jax.plan.topology import parse_topology

MESH = {"mesh.data": 1, "mesh.fsdp": 8, "mesh.context": 1}


def change_of(overrides, topology_text, scale=1.0):
  """(the change for the 7B model, its estimate on that topology, the topology)."""
  topology = parse_topology(topology_text)
  config = resolve_mesh(load_config("configs/7b.py", MESH | overrides), topology.num_devices)
  memory_bytes = int(scale * estimate_memory(config, topology.chip).total_bytes)
  return smallest_fitting_change(config, topology, memory_bytes), config, topology


@pytest.mark.parametrize(
  ("overrides", "topology", "fields", "devices"),
  [
    ({"train.microbatch": 768, "model.remat": "full"}, "v5p:2x2x2", {"train.microbatch"}, 8),
    ({"train.microbatch": 8, "model.remat": "none"}, "v4:2x2x2", {"model.remat"}, 8),
    ({"train.microbatch": 32, "model.remat": "none"}, "v4:2x2x2", {"train.microbatch", "model.remat"}, 8),
    (
      {"train.microbatch": 8, "model.remat": "full"},
      "v5e:2x4",
      {"mesh.fsdp", "train.microbatch", "optimizer.offload"},
      16,
    ),
  ],
)
def test_the_smallest_change_that_fits(overrides, topology, fields, devices):
  change, config, topology = change_of(overrides, topology)
  assert estimate_memory(config, topology.chip).total_bytes > topology.chip.hbm_capacity
  assert set(change.fields) == fields and change.devices == devices
  changed = load_config("configs/7b.py", MESH | overrides | change.fields)
  assert estimate_memory(changed, topology.chip).total_bytes == change.memory_bytes <= topology.chip.hbm_capacity


def test_estimates_are_scaled_by_what_xla_allocates():
  """Where the step takes twice the estimate, the change is such that twice its estimate fits."""
  overrides = {"train.microbatch": 768, "model.remat": "full"}
  once, twice = (change_of(overrides, "v5p:2x2x2", scale)[0] for scale in (1.0, 2.0))
  assert twice.fields["train.microbatch"] < once.fields["train.microbatch"]


def test_where_nothing_fits_nothing_is_said():
  assert change_of({"train.global_batch": 8, "train.microbatch": 8}, "v5e:2x4")[0] is None
