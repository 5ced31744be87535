"""Which config fields have an effect on a run: on what it learns, on how fast, or on the numbers that it reports.

EFFECTS is the table: a row for every field, with the condition on which it has one. A comparison shows no other fields.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from deepseek_jax.config import Config
from deepseek_jax.errors import DataError
from deepseek_jax.model_config import ATTENTION_KINDS
from deepseek_jax.renamed_fields import with_current_names
from deepseek_jax.schema import config_leaves, flatten_config

Fields = Mapping[str, Any]  # {dotted path: value}
Condition = Callable[[Fields], bool]


def _always(c: Fields) -> bool:
  return True


def _never(c: Fields) -> bool:
  return False


def _moe(c: Fields) -> bool:
  return bool(c["model.moe.num_routed_experts"])


def _dense_layers(c: Fields) -> bool:
  return not _moe(c) or bool(c["model.first_dense_layers"])


def _group_limited(c: Fields) -> bool:
  return _moe(c) and c["model.moe.topk_groups"] < c["model.moe.num_expert_groups"]


def _group_losses(c: Fields) -> bool:
  return _moe(c) and bool(c["balance.device_loss"] or c["balance.communication_loss"])


def _capacity(c: Fields) -> bool:
  return _moe(c) and c["model.moe.dispatch"] == "capacity"


def _expert_groups(c: Fields) -> bool:
  return _group_limited(c) or _group_losses(c) or _capacity(c)


def _expert_buffers(c: Fields) -> bool:
  return _moe(c) and c["mesh.expert"] != 1


def _router_bias(c: Fields) -> bool:
  return _moe(c) and bool(c["model.moe.router_bias"])


def _moving_bias(c: Fields) -> bool:
  return _router_bias(c) and bool(c["balance.bias_update_rate"])


def _mtp(c: Fields) -> bool:
  return bool(c["model.num_mtp_layers"])


def _fp8(c: Fields) -> bool:
  return c["model.precision"] == "fp8"


def _mla(c: Fields) -> bool:
  return c["model.attention.kind"] == "mla"


def _yarn(c: Fields) -> bool:
  return c["model.attention.yarn.factor"] != 1


def _muon(c: Fields) -> bool:
  return c["optimizer.kind"] == "muon"


def _warmup_in_steps(c: Fields) -> bool:
  return not c["schedule.warmup_tokens"]


def _decay(c: Fields) -> bool:
  return c["schedule.kind"] != "constant"


def _decay_in_steps(c: Fields) -> bool:
  return _decay(c) and not c["schedule.tokens"]


def _milestones(c: Fields) -> bool:
  return c["schedule.kind"] not in ("constant", "warmup_cosine")


def _several_sources(c: Fields) -> bool:
  return len(c["data.sources"]) > 1


def _own_sources(c: Fields) -> bool:
  return any(source != "python-stdlib" for source in c["data.sources"])


def _sharded_weights(c: Fields) -> bool:
  return c["mesh.fsdp"] != 1 or c["mesh.expert"] != 1


def _sharded_latents(c: Fields) -> bool:
  return _mla(c) and c["mesh.tensor"] != 1


def _context_parallel(c: Fields) -> bool:
  return c["mesh.context"] != 1


def _pipeline(c: Fields) -> bool:
  return c["mesh.stage"] != 1


def _batch_ramp(c: Fields) -> bool:
  return bool(c["train.batch_ramp_from"])


def _of_attention_kind(name: str) -> Condition:
  return lambda c: (
    c["model.attention.kind"] not in ATTENTION_KINDS or name in ATTENTION_KINDS[c["model.attention.kind"]].shape_fields
  )


# Condition, section, fields of it. The seed is no difference: runs that differ in it alone are a group.
_ROWS: tuple[tuple[Condition, str, str], ...] = (
  (_never, "", "name seed"),
  (_always, "", "init_from stages first_stage"),
  (_always, "model", "vocab embed layers num_mtp_layers norm_eps init_std tied_embeddings dropout"),
  (_always, "model", "param_dtype compute_dtype precision remat"),
  (_dense_layers, "model", "mlp"),
  (_moe, "model", "first_dense_layers"),
  (_fp8, "model.fp8", "forward dgrad wgrad pow2_scales block implementation"),
  (_always, "model.attention", "kind window rope_theta dropout implementation"),
  (_mla, "model.attention", "latent_norm_eps"),
  (_context_parallel, "model.attention", "kv_comm"),
  (_always, "model.attention.yarn", "factor"),
  (_yarn, "model.attention.yarn", "original_seq beta_fast beta_slow mscale mscale_all_dim"),
  (_moe, "model.moe", "num_routed_experts num_shared_experts num_experts_per_token mlp router score router_bias"),
  (_moe, "model.moe", "norm_topk_prob route_scale dispatch implementation"),
  (_expert_groups, "model.moe", "num_expert_groups topk_groups"),
  (_group_limited, "model.moe", "group_score"),
  (_expert_buffers, "model.moe", "buffer_factor"),
  (_capacity, "model.moe", "capacity_factor no_drop_fraction"),
  (_always, "data", "sources tokenizer seq heldout_fraction mask_documents order"),
  (_several_sources, "data", "weights"),
  (_own_sources, "data", "text_field skip_null"),
  (_never, "data", "cache verify"),
  (_always, "optimizer", "kind trainable clip beta1 beta2 eps weight_decay moments_dtype offload"),
  (_muon, "optimizer", "momentum update_rms"),
  (_always, "schedule", "kind peak warmup_tokens start_step start_tokens"),
  (_warmup_in_steps, "schedule", "warmup_steps"),
  (_decay, "schedule", "tokens factors"),
  (_decay_in_steps, "schedule", "steps"),
  (_milestones, "schedule", "milestones"),
  (_always, "mesh", "data fsdp expert tensor stage context"),
  (_sharded_weights, "parallel", "zero"),
  (_sharded_latents, "parallel", "mla_latent"),
  (_pipeline, "parallel", "virtual_stages stage_layers"),
  (_always, "train", "steps global_batch microbatch batch_ramp_from loss_chunk label_smoothing z_loss max_skipped"),
  (_never, "train", "sdc_every sdc_rotate"),
  (_batch_ramp, "train", "batch_ramp_tokens"),
  (_moe, "balance", "expert_loss device_loss communication_loss router_z_loss"),
  (_group_losses, "balance", "device_groups"),
  (_router_bias, "balance", "bias_update_rate"),
  (_moving_bias, "balance", "bias_rule bias_update_tokens"),
  (_mtp, "mtp", "weights tokens"),
  (_never, "checkpoint", "every minutes keep keep_every cloud_notices"),
  (_never, "eval", "every"),
  (_always, "eval", "sequences final_sequences"),
  (_never, "log", "every tensorboard layer_rms"),
  (
    _never,
    "watchdog",
    "step_seconds start_seconds data_seconds compile_seconds restore_seconds eval_seconds checkpoint_seconds",
  ),
  (_never, "sample", "prompt max_tokens temperature top_k top_p repetition_penalty"),
)
EFFECTS: dict[str, Condition] = {
  f"{section}.{name}".lstrip("."): condition for condition, section, names in _ROWS for name in names.split()
} | {
  f"model.attention.{name}": _of_attention_kind(name)
  for name in sorted({name for kind in ATTENTION_KINDS.values() for name in kind.shape_fields})
}


def effective_fields(saved: Mapping[str, Any]) -> dict[str, Any]:
  """{path: value} of the fields of a run that have an effect, with lists as tuples.

  Fields that an older version did not have are at their defaults, which are what it did. Those that this version does
  not have are kept.

  Args:
    saved: config.json, nested dicts.

  Raises DataError for values that no config has.
  """
  fields = _defaults() | {path: _hashable(value) for path, value in config_leaves(with_current_names(dict(saved)))}
  try:
    return {path: value for path, value in fields.items() if EFFECTS.get(path, _always)(fields)}
  except TypeError as error:
    raise DataError(f"config.json: expected the config of a run, got values of other types ({error})") from None


@functools.cache
def _defaults() -> dict[str, Any]:
  return flatten_config(Config())


def _hashable(value: Any) -> Any:
  if isinstance(value, list):
    return tuple(_hashable(item) for item in value)
  return str(value) if isinstance(value, dict) else value
