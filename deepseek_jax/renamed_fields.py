"""Config fields that had another name in an older version.

Saved configs are read through this table. On the command line and in a config file an old name is an error.
"""

from typing import Any

RENAMED_FIELDS: dict[str, str] = {
  "balance.bias_speed": "balance.bias_update_rate",
  "balance.bias_tokens": "balance.bias_update_tokens",
  "model.attention.context_keys": "model.attention.kv_comm",
  "model.fp8.pow2": "model.fp8.pow2_scales",
  "model.moe.capacity_exempt": "model.moe.no_drop_fraction",
  "parallel.circuits": "parallel.virtual_stages",
  "parallel.latent": "parallel.mla_latent",
}


def with_current_names(saved: dict[str, Any]) -> dict[str, Any]:
  """A copy of `saved`, the nested config that a run of any version wrote, with the current names of its fields."""
  return _rename_section(saved, "")


def _rename_section(section: dict[str, Any], prefix: str) -> dict[str, Any]:
  renamed = {}
  for old_name, value in section.items():
    path = prefix + old_name
    # A renamed field stays in its section: only the last name of its path changes.
    name = RENAMED_FIELDS.get(path, path).removeprefix(prefix)
    renamed[name] = _rename_section(value, f"{path}.") if isinstance(value, dict) else value
  return renamed
