"""Plans through their door: python -m deepseek_jax.plan."""

import json
from dataclasses import replace

import pytest

from deepseek_jax.config import MeshConfig
from deepseek_jax.errors import ConfigError
from deepseek_jax.flags import load_config
from deepseek_jax.plan import search as search_module
from deepseek_jax.plan.__main__ import main
from deepseek_jax.plan.flops import abstract_params, training_flops
from deepseek_jax.plan.plan import make_plan
from deepseek_jax.plan.search import Candidate, apply_candidate, rank_key, search
from deepseek_jax.plan.topology import parse_topology
from deepseek_jax.sharding import elements_per_device
from deepseek_jax.training.step import abstract_step

KEYS = {
  "fits", "topology", "devices", "mesh", "hbm_bytes_per_device", "step_seconds", "tokens_per_second", "mfu", "bound",
  "model_flops", "compiled_flops", "collective_bytes", "source", "compile_seconds",
}  # fmt: skip


def planned(capsys, *arguments):
  assert main(["plan", "--analytic", *arguments]) == 0
  return capsys.readouterr().out


@pytest.mark.parametrize("topology", ["v5p:2x2x1", "h100:4", "v5e:2x2"])
def test_a_plan_as_json(capsys, topology):
  mesh = ("--config.mesh.fsdp=2", "--config.mesh.expert=2", "--config.mesh.data=1")
  plan = json.loads(planned(capsys, "--config=configs/tiny.py", f"--topology={topology}", "--json=-", *mesh))
  assert plan.keys() >= KEYS
  memory = plan["hbm_bytes_per_device"]
  assert set(memory) == {"params", "optimizer", "gradients", "activations", "collectives", "other", "total", "limit"}
  config = load_config("configs/tiny.py")
  # Exact: what a device holds of the parameters, and two moments.
  held = sum(elements_per_device(p) * 4 for p in _leaves(config, MeshConfig(data=1, fsdp=2, expert=2)))
  assert memory["params"] == held and memory["optimizer"] == 2 * held
  assert memory["total"] == sum(size for name, size in memory.items() if name not in ("total", "limit"))
  assert plan["fits"] and plan["devices"] == 4 and plan["mesh"]["expert"] == 2 and plan["source"] == "analytic"
  flops = training_flops(config.model, config.data.seq).causal * config.train.global_batch * config.data.seq
  assert plan["model_flops"] == pytest.approx(flops) and plan["compiled_flops"] > flops
  chip = parse_topology(topology).chip
  assert plan["mfu"] == pytest.approx(flops / plan["step_seconds"] / (4 * chip.peak_flops))
  assert plan["tokens_per_second"] == pytest.approx(config.train.global_batch * config.data.seq / plan["step_seconds"])
  kind = "all-to-all" if topology.startswith("v5e") else "ragged-all-to-all"
  assert plan["collective_bytes"][kind].keys() == {"expert"}
  assert plan["bound"] in ("compute", "hbm", "interconnect")
  assert plan["ideal"]["seconds"] < plan["step_seconds"]


def _leaves(config, mesh):
  import jax

  return jax.tree.leaves(abstract_params(config.model, mesh)[0])


def test_a_plan_for_people_and_in_a_file(capsys, tmp_path):
  path = tmp_path / "plan.json"
  text = planned(capsys, "--config=configs/7b.py", "--topology=v5e:4x4", f"--json={path}")
  assert "DOES NOT FIT" in text and "MFU" in text and "fsdp=8 x context=2" in text
  assert json.loads(path.read_text())["fits"] is False


@pytest.mark.parametrize(
  ("arguments", "word"),
  [
    (("--topology=v5p:2x2x1", "--config.mesh.fsdp=3"), "mesh"),
    (("--topology=v5p:2x2x1", "--config.mesh.tensor=4", "--config.model.attention.heads=6"), "heads"),
    (("--topology=2*v5p:2x2x1", "--config.mesh.data=1", "--config.mesh.fsdp=8"), "slices"),
    (("--topology=v5p:2x2",), "3 dimensions"),
    (("--topology=a100:1", "--config.model.attention.implementation=pallas"), "no Pallas kernel for A100"),
    ((), "--topology"),
    (("--topology=v5p:2x2x1", "--json=/nowhere/plan.json"), "cannot be written"),
  ],
  ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_cannot_work_is_one_error(arguments, word):
  with pytest.raises(ConfigError, match=word):
    main(["plan", "--config=configs/tiny.py", "--analytic", *arguments])


def test_several_slices_send_gradients_over_the_network(capsys):
  arguments = (
    "--config=configs/7b.py",
    "--config.train.microbatch=32",
    "--config.train.global_batch=64",
    "--config.mesh.context=1",
    "--json=-",
  )
  one = json.loads(planned(capsys, "--topology=v5p:4x4x2", *arguments))
  two = json.loads(
    planned(capsys, "--topology=2*v5p:4x2x2", "--config.mesh.data=2", "--config.mesh.fsdp=16", *arguments)
  )
  assert "data" in two["collective_bytes"]["all-reduce"] and "data" not in one["collective_bytes"]["all-reduce"]
  assert two["ideal"]["interconnect_seconds"] > one["ideal"]["interconnect_seconds"]


@pytest.mark.parametrize(
  ("topology", "block", "faster"), [("h200:8", 128, True), ("tpu7x:2x2x1", 128, False), ("v6e:2x4", 512, True)]
)
def test_products_in_eight_bits_have_the_chips_rate_for_them(capsys, topology, block, faster):
  how = ("--config=configs/v2_lite.py", f"--topology={topology}", "--json=-", "--config.model.layers=2")
  fp8 = ("--config.model.precision=fp8", f"--config.model.fp8.block={block}")
  wide, narrow = (json.loads(planned(capsys, *how, *more)) for more in ((), fp8))
  assert narrow["model_flops"] == wide["model_flops"]
  assert (narrow["ideal"]["compute_seconds"] < wide["ideal"]["compute_seconds"]) == faster


def test_gpus_have_fused_attention_where_it_is_asked_for(capsys):
  wide = ("--config.data.seq=1024", "--config.model.compute_dtype=bfloat16")
  how = ("--config=configs/tiny.py", "--topology=h100:1", "--json=-", *wide)
  auto, fused = (
    json.loads(planned(capsys, *how, f"--config.model.attention.implementation={name}")) for name in ("auto", "pallas")
  )
  assert fused["ideal"]["hbm_seconds"] < auto["ideal"]["hbm_seconds"]
  assert fused["hbm_bytes_per_device"]["activations"] < auto["hbm_bytes_per_device"]["activations"]


def test_near_what_maxtext_publishes_for_v3_on_512_chips():
  """AI-Hypercomputer/maxtext, deepseek_v3_dropless_v5p_1024: fsdp alone, 8 sequences of 8192 a chip, flash attention, block
  inputs offloaded, 33.2% MFU measured."""
  fields = {
    "mesh.fsdp": 512, "mesh.expert": 1, "mesh.context": 1, "data.seq": 8192, "train.global_batch": 4096, "train.microbatch": 4096,
    "train.batch_ramp_from": 0, "train.batch_ramp_tokens": 0, "model.remat": "offload", "model.moe.buffer_factor": 0,
  }  # fmt: skip
  config = load_config("configs/v3.py", {path: str(value) for path, value in fields.items()})
  plan = make_plan(config, parse_topology("v5p:8x8x8"), abstract_step)
  assert plan.mfu(plan.calibrated) == pytest.approx(0.332, rel=0.2)


def test_search_finds_the_best_of_all_and_ranks_what_does_not_fit_last(monkeypatch):
  monkeypatch.setattr(search_module, "REMAT", ("full", "dots"))
  config = load_config(
    "configs/7b.py", {"train.global_batch": "2", "train.microbatch": "0", "mesh.context": "1", "model.layers": "2"}
  )
  topology, told = parse_topology("v5p:2x1x1"), []
  plans = search(config, topology, abstract_step, progress=told.append, max_plans=9)
  assert len(plans) == len(told) == 9 and plans == sorted(plans, key=rank_key)
  base = Candidate(1, 1, 1, 1, sequences_per_device=1, remat="full", buffer_factor=0.0)
  meshes = [base, *(replace(base, **{axis: 2}) for axis in ("tensor", "stage", "context"))]  # of two devices
  candidates = (
    replace(mesh, sequences_per_device=n, remat=remat) for mesh in meshes for n in (1, 2) for remat in ("full", "dots")
  )
  every = [c for c in (apply_candidate(c, config, topology) for c in candidates) if c]
  assert len(every) > 12  # a whole batch of two sequences on a pipeline and a row on both devices are among them
  best = min((make_plan(c, topology, abstract_step) for c in every), key=rank_key)
  assert plans[0].fits and plans[0].config == best.config


def test_search_compiles_until_three_fit(monkeypatch):
  """What XLA refuses is left out, what does not fit after all comes last, and compiled plans come first."""
  config = load_config("configs/7b.py", {"train.global_batch": "8", "train.microbatch": "8", "model.layers": "2"})
  plan = make_plan(config, parse_topology("v5p:2x2x1"), abstract_step)
  plans = [
    replace(plan, calibrated=replace(plan.calibrated, seconds=seconds)) for seconds in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
  ]
  answers = iter([
    ConfigError("libtpu ended"), replace(plan, memory={"params": 2**40}, source="compiled"),
    *(replace(plan, source="compiled", calibrated=replace(plan.calibrated, seconds=seconds)) for seconds in (9.0, 7.0, 8.0)),
  ])  # fmt: skip

  def compile_next(*arguments, compile):
    answer = next(answers)
    if isinstance(answer, ConfigError):
      raise answer
    return answer

  monkeypatch.setattr(search_module, "make_plan", compile_next)
  told = []
  found = search_module.compile_best(plans, parse_topology("v5p:2x2x1"), abstract_step, told.append)
  order = [(p.fits, p.source, p.calibrated.seconds) for p in found]
  assert order[:3] == [(True, "compiled", 7.0), (True, "compiled", 8.0), (True, "compiled", 9.0)]
  assert order[3] == (True, "analytic", 6.0) and order[4][:2] == (False, "compiled") and len(found) == 5
  assert "left out: libtpu ended" in told


def test_search_says_where_nothing_fits():
  with pytest.raises(ConfigError, match="more devices"):
    search(load_config("configs/67b.py"), parse_topology("v5e:2x2"), abstract_step)
