"""Small Hugging Face folders with a tokenizer, as DeepSeek publishes them."""

import json

from tests.parity.cases import V3, Case
from tests.parity.weights import write_folder

VOCAB, SEQ = 290, 48
TEXT = "the model sees the words of a text, one by one; the text is short, and the words are few. " * 4
# All that V3 has but YaRN, in miniature; logits that differ.
CONFIG = V3 | {
  "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "q_lora_rank": 16,
  "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "moe_intermediate_size": 16,
  "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0,
  "rope_scaling": None, "max_position_embeddings": SEQ,
}  # fmt: skip


def write_hugging_face(folder, add_bos=True, tokenizer=True, **config):
  """Makes `folder` with config.json, weights and a byte-level BPE of VOCAB ids; returns it. `config`: other keys."""
  folder.mkdir()
  write_folder(folder, Case(CONFIG | config))
  if tokenizer:
    write_tokenizer(folder, add_bos)
  return folder


def write_tokenizer(folder, add_bos):
  """tokenizer.json and tokenizer_config.json: ids 0 and 1 are bos and eos; transformers puts bos first with `add_bos`."""
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers, processors, trainers

  made = tokenizers.Tokenizer(models.BPE())
  made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(
    vocab_size=VOCAB, special_tokens=["<bos>", "<eos>"], initial_alphabet=alphabet, show_progress=False
  )
  made.train_from_iterator([TEXT], trainer)
  if add_bos:
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
  made.save(str(folder / "tokenizer.json"))
  described = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>"}
  (folder / "tokenizer_config.json").write_text(json.dumps(described | {"add_bos_token": add_bos}))
