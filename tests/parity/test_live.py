"""Against transformers itself, where it is installed (make parity): other models than the 17, all gradients."""

import dataclasses

import numpy as np
import pytest

import deepseek_jax
from tests.parity import ours
from tests.parity.cases import CASES, LLAMA, MOE_V1, V2, V3, yarn
from tests.parity.weights import make_modules, write_folder

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="make parity runs these in an environment with torch and transformers")
transformers = pytest.importorskip("transformers")

from tests.parity import reference  # noqa: E402 - it imports torch

OTHERS = {
  "llama, wide heads, odd vocabulary": LLAMA | {"head_dim": 24, "vocab_size": 131, "num_key_value_heads": 1},
  "llama with yarn": LLAMA | {"rope_scaling": yarn(16, 1.0), "rope_theta": 50_000.0, "max_position_embeddings": 640},
  "moe_v1, grouped queries": MOE_V1 | {"num_key_value_heads": 2, "num_experts_per_tok": 1},
  "v2, no dense layer": V2 | {"first_k_dense_replace": 0, "topk_group": 1, "num_experts_per_tok": 2},
  "v2 in other widths": V2 | {"hidden_size": 48, "q_lora_rank": 20, "kv_lora_rank": 12, "v_head_dim": 20, "rope_scaling": None},
  "v3, all dense": V3 | {"first_k_dense_replace": 3},
  "v3, other groups": V3 | {"n_group": 8, "topk_group": 5, "num_experts_per_tok": 5, "n_routed_experts": 32},
  "v3, tied": V3 | {"tie_word_embeddings": True, "routed_scaling_factor": 1.0},
}  # fmt: skip
LIVE = CASES | {name: dataclasses.replace(CASES["v3"], config=config, seed=3) for name, config in OTHERS.items()}


@pytest.fixture(scope="module", params=LIVE)
def made(request, tmp_path_factory):
  """(case, its folder, what transformers computes)."""
  case, folder = LIVE[request.param], tmp_path_factory.mktemp("live")
  write_folder(folder, case)
  return case, folder, reference.compute(folder, case, make_modules(case))


def error(mine, theirs):
  """The largest difference, over the largest magnitude of `theirs`."""
  return np.abs(mine - theirs).max() / max(np.abs(theirs).max(), np.finfo(np.float32).tiny)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_number(made, tmp_path, dtype):
  case, folder, theirs = made
  mine, limits = ours.compute(folder, case, dtype, tmp_path), ours.LIMITS[dtype]
  theirs = theirs | {"loss": theirs["loss"] + case.mtp_weight * theirs["mtp_loss"]}
  found = {what: error(mine[what], theirs[what]) for what in ("logits", "loss", "weights") if what in theirs}
  assert {what: error for what, error in found.items() if not error <= limits[what]} == {}
  if "indices" in theirs:
    np.testing.assert_array_equal(mine["indices"], theirs["indices"])
  assert mine["grads"].keys() == theirs["grads"].keys()
  found = {name: error(mine["grads"][name], grad) for name, grad in theirs["grads"].items()}
  assert {name: error for name, error in found.items() if not error <= limits["grads"]} == {}


@pytest.fixture
def has_class(made):
  if made[0].config["model_type"] == "deepseek":
    pytest.skip("transformers has no class for DeepSeekMoE 16B")


def test_transformers_loads_what_we_save(made, has_class, tmp_path):
  case, folder, theirs = made
  deepseek_jax.load_pretrained(folder).save_pretrained(tmp_path)
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
  with torch.no_grad():
    logits = model.eval()(torch.from_numpy(case.tokens), use_cache=False).logits.numpy()
  assert error(logits, theirs["logits"]) < 2e-5


def test_we_load_what_transformers_saves(made, has_class, tmp_path):
  case, folder, theirs = made
  model, _ = reference.make_modules(folder, case, make_modules(case))
  model.float().save_pretrained(tmp_path, max_shard_size="60KB")
  assert len(list(tmp_path.glob("*.safetensors"))) > 2
  assert error(deepseek_jax.load_pretrained(tmp_path).logits(case.tokens), theirs["logits"]) < 2e-5
