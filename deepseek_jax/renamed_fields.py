"""Config fields that once had another name. A line here keeps old checkpoints readable; typed anew, an old name is an error."""

RENAMED_FIELDS = {
  "balance.bias_speed": "balance.bias_update_rate",
  "balance.bias_tokens": "balance.bias_update_tokens",
  "model.attention.context_keys": "model.attention.kv_comm",
  "model.fp8.pow2": "model.fp8.pow2_scales",
  "model.moe.capacity_exempt": "model.moe.no_drop_fraction",
  "parallel.circuits": "parallel.virtual_stages",
  "parallel.latent": "parallel.mla_latent",
}


def with_current_names(saved: dict) -> dict:
  """`saved`, the nested config that a run of any version wrote, with today's names of its fields; the argument stays."""
  return _renamed(saved, "")


def _renamed(section: dict, prefix: str) -> dict:
  renamed = {}
  for name, value in section.items():
    path = prefix + name
    # A field is renamed within its section, so that only its last part changes.
    name = RENAMED_FIELDS.get(path, path).removeprefix(prefix)
    renamed[name] = _renamed(value, f"{path}.") if isinstance(value, dict) else value
  return renamed
