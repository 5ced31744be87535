import dataclasses

import pytest

from deepseek_jax.compare import effects
from deepseek_jax.config import Config
from deepseek_jax.errors import DataError
from deepseek_jax.flags import load_config
from deepseek_jax.schema import leaf_paths

# What each condition is about: a run without it, and with it.
ON = {
  "moe": {"model.moe.num_routed_experts": 8, "model.moe.num_experts_per_token": 2, "model.moe.mlp": 16},
  "mla": {
    f"model.attention.{name}": value
    for name, value in {
      "kind": "mla", "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    }.items()
  },
  "milestones": {"schedule.kind": "multi_step", "schedule.milestones": "0.5", "schedule.factors": "0.1"},
  "cosine": {"schedule.kind": "warmup_cosine", "schedule.factors": "0.1"},
}  # fmt: skip
ON["groups"] = ON["moe"] | {"model.moe.num_expert_groups": 4, "model.moe.topk_groups": 2}
ON["capacity"] = ON["groups"] | {"model.moe.dispatch": "capacity"}
ON["bias"] = ON["moe"] | {"model.moe.router_bias": True, "balance.bias_update_rate": 0.001}


def has_effect(path, overrides):
  return path in effects.effective_fields(dataclasses.asdict(load_config("", overrides)))


def test_every_field_has_one_place_in_the_table():
  """A new field needs a row: always, never, or the condition on which it has an effect."""
  listed = [f"{section}.{name}".lstrip(".") for _, section, names in effects._ROWS for name in names.split()]
  doubled = {path for path in listed if listed.count(path) > 1}
  assert not doubled, f"two rows of effects.py have {', '.join(doubled)}"
  missing = [path for path in leaf_paths(Config) if path not in effects.EFFECTS]
  assert not missing, f"compare/effects.py does not say when {', '.join(missing)} has an effect"
  gone = [path for path in effects.EFFECTS if path not in leaf_paths(Config)]
  assert not gone, f"compare/effects.py has a row for {', '.join(gone)}, which no config has"


@pytest.mark.parametrize(
  ("path", "without", "with_it"),
  [
    ("model.moe.score", {}, ON["moe"]),
    ("model.moe.group_score", ON["moe"], ON["groups"]),
    ("model.moe.num_expert_groups", ON["moe"], ON["capacity"] | {"model.moe.topk_groups": 4}),
    ("model.moe.capacity_factor", ON["groups"], ON["capacity"]),
    ("model.moe.buffer_factor", ON["moe"], ON["moe"] | {"mesh.expert": 2}),
    ("model.mlp", ON["moe"], ON["moe"] | {"model.first_dense_layers": 1}),
    ("model.attention.kv_heads", ON["mla"], {}),
    ("model.attention.v_head_dim", {}, ON["mla"]),
    ("model.attention.latent_norm_eps", {}, ON["mla"]),
    ("model.attention.kv_comm", {}, {"mesh.context": 2}),
    ("model.attention.yarn.mscale", {}, {"model.attention.yarn.factor": 2}),
    ("model.fp8.block", {}, {"model.precision": "fp8"}),
    ("data.weights", {"data.sources": "a.txt"}, {"data.sources": "a.txt,b.txt"}),
    ("data.text_field", {}, {"data.sources": "a.jsonl"}),
    ("optimizer.momentum", {}, {"optimizer.kind": "muon"}),
    ("schedule.warmup_steps", {"schedule.warmup_tokens": 9}, {}),
    ("schedule.steps", {}, ON["cosine"]),
    ("schedule.steps", ON["cosine"] | {"schedule.tokens": 9}, ON["cosine"]),
    ("schedule.milestones", ON["cosine"], ON["milestones"]),
    ("parallel.zero", {}, {"mesh.fsdp": 2}),
    ("parallel.mla_latent", ON["mla"], ON["mla"] | {"mesh.tensor": 2}),
    ("parallel.stage_layers", {}, {"mesh.stage": 2}),
    ("train.batch_ramp_tokens", {}, {"train.batch_ramp_from": 16, "train.batch_ramp_tokens": 9}),
    ("balance.expert_loss", {}, ON["moe"]),
    ("balance.device_groups", ON["groups"], ON["groups"] | {"balance.device_loss": 0.1}),
    ("balance.bias_rule", ON["bias"] | {"balance.bias_update_rate": 0}, ON["bias"]),
    ("mtp.weights", {}, {"model.num_mtp_layers": 1}),
  ],
)
def test_a_field_counts_where_it_has_an_effect(path, without, with_it):
  assert not has_effect(path, without)
  assert has_effect(path, with_it)


def test_what_only_names_or_shows_never_counts():
  a = load_config("tiny", {"name": "a", "log.every": 3, "sample.top_k": 5, "checkpoint.keep": 7, "seed": 3})
  b = load_config("tiny", {"name": "b", "data.cache": "elsewhere", "eval.every": 9})
  assert effects.effective_fields(dataclasses.asdict(a)) == effects.effective_fields(dataclasses.asdict(b))


def test_configs_of_other_versions_are_read():
  saved = dataclasses.asdict(load_config("tiny"))
  fields = effects.effective_fields(saved)
  del saved["balance"]["bias_update_rate"], saved["train"]["z_loss"]
  saved["balance"]["bias_speed"] = 0.001  # its name in an older version
  saved["retired"] = {"field": [1, [2]]}
  assert effects.effective_fields(saved) == fields | {"retired.field": (1, (2,))}


def test_values_that_no_config_has_are_an_error():
  with pytest.raises(DataError, match=r"config\.json: expected the config of a run, got values of other types"):
    effects.effective_fields({"data": {"sources": 3}})
