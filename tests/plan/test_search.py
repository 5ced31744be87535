"""The search for a mesh: which plans it finds, and in which order it ranks them."""

from dataclasses import replace

import pytest

from deepseek_jax.errors import ConfigError
from deepseek_jax.flags import load_config
from deepseek_jax.plan import search as search_module
from deepseek_jax.plan.plan import make_plan
from deepseek_jax.plan.search import Candidate, apply_candidate, initial_candidates, rank_key, search
from deepseek_jax.plan.topology import parse_topology
from deepseek_jax.training.step import abstract_step


def test_search_finds_the_best_of_all_and_ranks_what_does_not_fit_last(monkeypatch):
  monkeypatch.setattr(search_module, "REMAT", ("full", "dots"))
  config = load_config(
    "configs/7b.py", {"train.global_batch": "2", "train.microbatch": "0", "mesh.context": "1", "model.layers": "2"}
  )
  topology, lines = parse_topology("v5p:2x1x1"), []
  plans = search(config, topology, abstract_step, progress=lines.append, max_plans=9)
  assert len(plans) == len(lines) == 9 and plans == sorted(plans, key=rank_key)
  base = Candidate(1, 1, 1, 1, sequences_per_device=1, remat="full", buffer_factor=0.0)
  meshes = [base, *(replace(base, **{axis: 2}) for axis in ("tensor", "stage", "context"))]  # of two devices
  candidates = (
    replace(mesh, sequences_per_device=n, remat=remat) for mesh in meshes for n in (1, 2) for remat in ("full", "dots")
  )
  valid = [c for c in (apply_candidate(c, config, topology) for c in candidates) if c]
  assert len(valid) > 12  # a whole batch of two sequences on a pipeline and a row on both devices are among them
  best = min((make_plan(c, topology, abstract_step) for c in valid), key=rank_key)
  assert plans[0].fits and plans[0].config == best.config


def test_a_dense_config_whose_own_mesh_does_not_fit_has_a_candidate_to_start_from():
  config, topology = load_config("configs/7b.py", {"mesh.data": "8", "mesh.fsdp": "1"}), parse_topology("v5p:2x2x1")
  candidates = initial_candidates(config, topology)
  assert candidates and all(apply_candidate(candidate, config, topology) for candidate in candidates)


def test_search_compiles_until_three_fit(monkeypatch):
  """What XLA refuses is left out, what does not fit after all comes last, and compiled plans come first."""
  config = load_config("configs/7b.py", {"train.global_batch": "8", "train.microbatch": "8", "model.layers": "2"})
  plan = make_plan(config, parse_topology("v5p:2x2x1"), abstract_step)
  plans = [
    replace(plan, calibrated=replace(plan.calibrated, seconds=seconds)) for seconds in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
  ]
  results = iter([
    ConfigError("libtpu ended"), replace(plan, memory={"params": 2**40}, source="compiled"),
    *(replace(plan, source="compiled", calibrated=replace(plan.calibrated, seconds=seconds)) for seconds in (9.0, 7.0, 8.0)),
  ])  # fmt: skip

  def compile_next(*arguments, compile):
    result = next(results)
    if isinstance(result, ConfigError):
      raise result
    return result

  monkeypatch.setattr(search_module, "make_plan", compile_next)
  lines = []
  ranked = search_module.compile_best(plans, parse_topology("v5p:2x2x1"), abstract_step, lines.append)
  order = [(p.fits, p.source, p.calibrated.seconds) for p in ranked]
  assert order[:3] == [(True, "compiled", 7.0), (True, "compiled", 8.0), (True, "compiled", 9.0)]
  assert order[3] == (True, "analytic", 6.0) and order[4][:2] == (False, "compiled") and len(ranked) == 5
  assert "left out: libtpu ended" in lines


def test_search_is_an_error_if_nothing_fits():
  with pytest.raises(
    ConfigError, match=r"the best takes [\d.,]+ GiB of 15\.8 GiB per device; take about [\d.]+ times as many devices"
  ):
    search(load_config("configs/67b.py"), parse_topology("v5e:2x2"), abstract_step)
