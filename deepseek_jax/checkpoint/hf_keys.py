"""Every key of config.json that transformers 5 or DeepSeek's own code reads for these models, and what becomes of it.

A key that changes what the model computes is honoured, or checked against the only value that is implemented (or that
the rest of the file implies); only keys without influence are passed over. What is in no row is named in a note.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

ALL = ("llama", "deepseek", "deepseek_v2", "deepseek_v3")
EXPERTS, MLA, V3 = ALL[1:], ALL[2:], ALL[3:]


def _is_number(value: Any) -> bool:
  return type(value) in (int, float) and math.isfinite(value)


# What a value has to be, as errors say it.
ANY, COUNT, SIZE = "anything", "an integer of at least 1", "an integer of at least 0"
POSITIVE, NOT_NEGATIVE, ABOVE_1 = "a finite number above 0", "a finite number of at least 0", "a finite number above 1"
BOOL, TEXT, OBJECT, IDS = "true or false", "a string", "an object", "an integer or a list of integers"
EXPECTED: dict[str, Callable[[Any], bool]] = {
  ANY: lambda value: True,
  COUNT: lambda value: type(value) is int and value >= 1,
  SIZE: lambda value: type(value) is int and value >= 0,
  POSITIVE: lambda value: _is_number(value) and value > 0,
  NOT_NEGATIVE: lambda value: _is_number(value) and value >= 0,
  ABOVE_1: lambda value: _is_number(value) and value > 1,
  BOOL: lambda value: type(value) is bool,
  TEXT: lambda value: type(value) is str,
  OBJECT: lambda value: type(value) is dict,
  IDS: lambda value: all(type(i) is int for i in (value if type(value) is list else [value])),
}


@dataclasses.dataclass(frozen=True)
class HFKey:
  """A row of HF_KEYS.

  Attributes:
    use: honoured (it becomes a field of ModelConfig), checked (another value is refused) or irrelevant (it changes
      nothing that a model here computes).
    expected: a key of EXPECTED.
    nullable: null is allowed, too, and means what leaving the key out does or is a value of its own.
    model_types: those whose code reads the key.
  """

  use: str
  expected: str
  nullable: bool = False
  model_types: tuple[str, ...] = ALL

  def accepts(self, value: Any) -> bool:
    """Whether `value` is of the type that the key has."""
    return (value is None and self.nullable) or EXPECTED[self.expected](value)

  def description(self) -> str:
    """What a value has to be, for errors."""
    return self.expected + (" or null" if self.nullable else "")


def _rows(
  use: str, expected: str, names: str, model_types: tuple[str, ...] = ALL, nullable: bool = False
) -> dict[str, HFKey]:
  return {name: HFKey(use, expected, nullable, model_types) for name in names.split()}


HF_KEYS: dict[str, HFKey] = {
  **_rows("honoured", COUNT, "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"),
  **_rows("honoured", COUNT, "max_position_embeddings"),  # YaRN's original length, where nothing else gives it
  **_rows("honoured", COUNT, "num_key_value_heads original_max_position_embeddings", nullable=True),
  **_rows("honoured", POSITIVE, "rms_norm_eps initializer_range"),
  **_rows("honoured", BOOL, "tie_word_embeddings"),  # unless lm_head.weight is there and differs
  **_rows("honoured", NOT_NEGATIVE, "attention_dropout", nullable=True),
  **_rows("honoured", ABOVE_1, "rope_theta", nullable=True),
  **_rows("honoured", OBJECT, "rope_scaling rope_parameters", nullable=True),  # ROPE_KEYS
  # Of latent attention transformers writes qk_rope_head_dim here, and never reads it: irrelevant there.
  **_rows("honoured", COUNT, "head_dim", nullable=True),
  **_rows("honoured", SIZE, "q_lora_rank", MLA, nullable=True),
  **_rows("honoured", COUNT, "kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim", MLA),
  **_rows("honoured", SIZE, "n_routed_experts n_shared_experts num_experts_per_tok", EXPERTS, nullable=True),
  **_rows("honoured", COUNT, "moe_intermediate_size", EXPERTS),
  **_rows("honoured", SIZE, "first_k_dense_replace", EXPERTS),
  **_rows("honoured", BOOL, "norm_topk_prob", EXPERTS, nullable=True),  # of V2 only false: checked
  **_rows("honoured", POSITIVE, "routed_scaling_factor", MLA),
  **_rows("honoured", COUNT, "n_group topk_group", MLA, nullable=True),
  **_rows("honoured", TEXT, "model_type"),
  **_rows("honoured", TEXT, "topk_method", EXPERTS, nullable=True),
  **_rows("checked", ANY, "hidden_act attention_bias mlp_bias moe_layer_freq rope_interleave"),  # SUPPORTED_VALUES
  **_rows("checked", TEXT, "scoring_func", EXPERTS, nullable=True),
  **_rows("checked", POSITIVE, "partial_rotary_factor", nullable=True),
  **_rows("checked", OBJECT, "quantization_config", nullable=True),
  **_rows("checked", COUNT, "qk_head_dim", MLA, nullable=True),  # qk_nope_head_dim + qk_rope_head_dim
  **_rows("checked", SIZE, "num_nextn_predict_layers", V3, nullable=True),  # what the files hold
  **_rows("checked", SIZE, "num_local_experts num_experts", EXPERTS, nullable=True),  # transformers: n_routed_experts
  # Of the base class in transformers. They are refused where they are anything but false, null or empty.
  **_rows("checked", ANY, "per_layer_config is_encoder_decoder add_cross_attention tie_encoder_decoder pruned_heads"),
  # They travel unchanged to an export; the tokenizer's own files say what begins and ends a document here.
  **_rows("irrelevant", IDS, "bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id", nullable=True),
  **_rows("irrelevant", ANY, "unk_token_id mask_token_id decoder_start_token_id tokenizer_class"),
  # Losses of training (balance.* here), and how a program runs.
  **_rows("irrelevant", ANY, "aux_loss_alpha seq_aux ep_size pretraining_tp use_cache torch_dtype dtype"),
  **_rows("irrelevant", ANY, "architectures auto_map transformers_version _name_or_path name_or_path _commit_hash"),
  **_rows("irrelevant", ANY, "attn_implementation _attn_implementation _attn_implementation_autoset"),
  **_rows("irrelevant", ANY, "_experts_implementation experts_implementation is_decoder gradient_checkpointing"),
  **_rows("irrelevant", ANY, "output_attentions output_hidden_states return_dict chunk_size_feed_forward torchscript"),
  **_rows("irrelevant", ANY, "use_bfloat16 tf_legacy_loss finetuning_task prefix task_specific_params problem_type"),
  **_rows("irrelevant", ANY, "id2label label2id num_labels cross_attention_hidden_size keys_to_ignore_at_inference"),
  # Sampling, which older releases of transformers wrote here, and now into generation_config.json.
  **_rows("irrelevant", ANY, "max_length min_length do_sample early_stopping num_beams num_beam_groups temperature"),
  **_rows("irrelevant", ANY, "diversity_penalty top_k top_p typical_p repetition_penalty length_penalty"),
  **_rows("irrelevant", ANY, "no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences"),
  **_rows("irrelevant", ANY, "output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id"),
  **_rows("irrelevant", ANY, "remove_invalid_values exponential_decay_length_penalty suppress_tokens max_new_tokens"),
  **_rows("irrelevant", ANY, "begin_suppress_tokens"),
}
# Of rope_scaling (as published) and rope_parameters (transformers 5).
ROPE_KEYS: dict[str, HFKey] = {
  **_rows("honoured", TEXT, "rope_type type", nullable=True),
  **_rows("honoured", ABOVE_1, "rope_theta", nullable=True),
  **_rows("honoured", POSITIVE, "factor beta_fast beta_slow", nullable=True),
  **_rows("honoured", COUNT, "original_max_position_embeddings", nullable=True),
  **_rows("honoured", NOT_NEGATIVE, "mscale mscale_all_dim", nullable=True),
  **_rows("checked", POSITIVE, "attention_factor partial_rotary_factor", nullable=True),
  **_rows("checked", BOOL, "truncate", nullable=True),
}
# Of quantization_config. Which tensors are FP8 is told by their dtypes, and activations are not quantized here.
QUANTIZATION_KEYS: dict[str, HFKey] = {
  **_rows("checked", ANY, "quant_method weight_block_size fmt"),
  **_rows("irrelevant", ANY, "activation_scheme scale_fmt modules_to_not_convert ignored_layers dequantize"),
}
OBJECTS = {"rope_scaling": ROPE_KEYS, "rope_parameters": ROPE_KEYS, "quantization_config": QUANTIZATION_KEYS}


def _leaves(raw: Mapping[str, Any], kind: str) -> Iterator[tuple[str, Any, HFKey | None]]:
  """(path of the key, value, row) of every key, with those in the objects that have keys of their own."""
  for name, value in raw.items():
    row = HF_KEYS.get(name)
    yield name, value, row if row is not None and kind in row.model_types else None
    if name in OBJECTS and isinstance(value, dict):
      yield from ((f"{name}.{key}", inner, OBJECTS[name].get(key)) for key, inner in value.items())


def type_errors(raw: Mapping[str, Any], kind: str) -> list[str]:
  """One line for each key of config.json whose value is of another type, naming key and value. `kind`: model_type."""
  return [
    f"{name}={value!r:.60} (expected {row.description()})"
    for name, value, row in _leaves(raw, kind)
    if row is not None and not row.accepts(value)
  ]


def unknown_keys(raw: Mapping[str, Any], kind: str) -> list[str]:
  """The keys of config.json that no code reads for models of this `kind` (a model_type), as far as is known here."""
  return [name for name, value, row in _leaves(raw, kind) if row is None and value is not None]
