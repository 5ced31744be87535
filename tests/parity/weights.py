"""Hugging Face folders of noise, from seed and tensor name alone: no torch, and none of the package's own tables.

Names are written out here a second time, as transformers' modules have them, so that a wrong name in the package shows.
"""

import json
import zlib

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

BLOCK, FP8_MAX = 128, 448.0
INDEX = "model.safetensors.index.json"


def attention_shapes(c):
  embed, heads = c["hidden_size"], c["num_attention_heads"]
  if "kv_lora_rank" not in c:
    width = c.get("head_dim") or embed // heads
    kv = c["num_key_value_heads"] * width
    return {
      "q_proj": (heads * width, embed),
      "k_proj": (kv, embed),
      "v_proj": (kv, embed),
      "o_proj": (embed, heads * width),
    }
  nope, rope, v, latent = (c[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank"))
  rank, query = c["q_lora_rank"], heads * (nope + rope)
  queries = (
    {"q_a_proj": (rank, embed), "q_a_layernorm": (rank,), "q_b_proj": (query, rank)}
    if rank
    else {"q_proj": (query, embed)}
  )
  return queries | {
    "kv_a_proj_with_mqa": (latent + rope, embed),
    "kv_a_layernorm": (latent,),
    "kv_b_proj": (heads * (nope + v), latent),
    "o_proj": (embed, heads * v),
  }


def swiglu_shapes(embed, mlp):
  return {"gate_proj": (mlp, embed), "up_proj": (mlp, embed), "down_proj": (embed, mlp)}


def layer_shapes(c, moe):
  """{name: shape} of a decoder layer as transformers 5 has it: the experts' matrices are fused into two tensors."""
  embed, shapes = c["hidden_size"], {}
  shapes["input_layernorm.weight"] = shapes["post_attention_layernorm.weight"] = (embed,)
  shapes |= {f"self_attn.{name}.weight": shape for name, shape in attention_shapes(c).items()}
  if not moe:
    return shapes | {
      f"mlp.{name}.weight": shape for name, shape in swiglu_shapes(embed, c["intermediate_size"]).items()
    }
  experts, mlp, shared = c["n_routed_experts"], c["moe_intermediate_size"], c["n_shared_experts"] or 0
  shapes |= {
    "mlp.gate.weight": (experts, embed),
    "mlp.experts.gate_up_proj": (experts, 2 * mlp, embed),
    "mlp.experts.down_proj": (experts, embed, mlp),
  }
  if c.get("topk_method") == "noaux_tc":
    shapes["mlp.gate.e_score_correction_bias"] = (experts,)
  if shared:
    shapes |= {f"mlp.shared_experts.{name}.weight": s for name, s in swiglu_shapes(embed, shared * mlp).items()}
  return shapes


def module_shapes(c):
  """{name: shape} of the parameters and buffers of transformers' modules; `mtp.` begins those of its MtpModel."""
  layers, first = c["num_hidden_layers"], c.get("first_k_dense_replace", c["num_hidden_layers"])
  shapes = {"model.embed_tokens.weight": (c["vocab_size"], c["hidden_size"]), "model.norm.weight": (c["hidden_size"],)}
  if not c["tie_word_embeddings"]:
    shapes["lm_head.weight"] = (c["vocab_size"], c["hidden_size"])
  for layer in range(layers):
    shapes |= {f"model.layers.{layer}.{name}": s for name, s in layer_shapes(c, layer >= first).items()}
  for depth in range(c.get("num_nextn_predict_layers", 0)):
    name, embed = f"mtp.layers.{depth}.", c["hidden_size"]
    shapes |= {name + norm + ".weight": (embed,) for norm in ("enorm", "hnorm", "post_norm")}
    shapes |= {name + "eh_proj.weight": (embed, 2 * embed)}
    shapes |= {name + "mtp_block." + part: s for part, s in layer_shapes(c, True).items()}
  return shapes


def noise(name, shape, case):
  """float32 [shape] of a size that keeps activations near 1; no norm is 1 and no bias is 0."""
  rng = np.random.default_rng([case.seed, zlib.crc32(name.encode())])
  values = rng.standard_normal(shape)
  if name.endswith("bias"):
    return (0.15 * values + case.bias).astype(np.float32)
  if name.endswith("norm.weight"):
    return rng.uniform(0.5, 1.5, shape).astype(np.float32)
  if "embed_tokens" in name:
    return values.astype(np.float32)
  gain = 2.0 if name.endswith("gate.weight") else 1.2
  return (gain * values / np.sqrt(shape[-1])).astype(np.float32)


def published(modules, layers):
  """{name: array} as checkpoints have it, from transformers' modules: experts apart, MTP after the `layers` others."""
  tensors = {}
  for name, array in modules.items():
    if name.startswith("mtp."):
      depth, rest = name.removeprefix("mtp.layers.").split(".", 1)
      rest = rest.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
      name = f"model.layers.{layers + int(depth)}.{rest}"
    if name.endswith("experts.gate_up_proj"):
      for expert, (gate, up) in enumerate(np.split(matrix, 2) for matrix in array):
        parts = (
          name.replace("gate_up_proj", f"{expert}.gate_proj.weight"),
          name.replace("gate_up_proj", f"{expert}.up_proj.weight"),
        )
        tensors |= dict(zip(parts, (gate, up), strict=True))
    elif name.endswith("experts.down_proj"):
      tensors |= {name.replace("down_proj", f"{e}.down_proj.weight"): matrix for e, matrix in enumerate(array)}
    else:
      tensors[name] = array
  return tensors


def make_modules(case):
  """{name of transformers' module: float32 array}; those of an FP8 case have values that FP8 holds."""
  modules = {name: noise(name, shape, case) for name, shape in module_shapes(case.config).items()}
  if "quantization_config" in case.config:
    for name, array in modules.items():
      if array.ndim == 3:
        parts = 2 if name.endswith("gate_up_proj") else 1
        matrices = [np.concatenate([round_trip(half) for half in np.split(m, parts)]) for m in array]
        modules[name] = np.stack(matrices)
      elif in_fp8(name):
        modules[name] = round_trip(array)
  return modules


def make_tensors(case):
  """{name: float32 array} of the checkpoint, with the copies of embedding and head that MTP layers have."""
  layers = case.config["num_hidden_layers"]
  tensors = published(make_modules(case), layers)
  for depth in range(case.config.get("num_nextn_predict_layers", 0)):
    name = f"model.layers.{layers + depth}."
    tensors[name + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    tensors[name + "shared_head.head.weight"] = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
  return tensors


def in_fp8(name):
  return name.endswith(("proj.weight", "proj_with_mqa.weight")) and "eh_proj" not in name


def spread(scale, shape):
  return np.repeat(np.repeat(scale, BLOCK, 0), BLOCK, 1)[: shape[0], : shape[1]]


def quantized(array):
  """(e4m3, scale of each 128 x 128 block) as DeepSeek-V3 is published: amax / 448."""
  rows, columns = (range(0, size, BLOCK) for size in array.shape)
  scale = np.array([[np.abs(array[i : i + BLOCK, j : j + BLOCK]).max() for j in columns] for i in rows], np.float32)
  scale /= np.float32(FP8_MAX)
  return (array / spread(scale, array.shape)).astype(ml_dtypes.float8_e4m3fn), scale


def dequantized(array, scale):
  return array.astype(np.float32) * spread(scale, array.shape)


def round_trip(array):
  return dequantized(*quantized(array))


def write_folder(folder, case):
  """config.json and safetensors, sharded when `case` says so. Returns {name: float32 array} of what is in them."""
  tensors = make_tensors(case)
  files = tensors
  if "quantization_config" in case.config:
    files = {name: a for name, a in tensors.items() if not in_fp8(name)}
    for name in filter(in_fp8, tensors):
      files[name], files[name + "_scale_inv"] = quantized(tensors[name])
  (folder / "config.json").write_text(json.dumps(case.config, indent=1))
  shards, size = [{}], 0
  for name, array in files.items():
    if case.shard and size and size + array.nbytes > case.shard:
      shards, size = [*shards, {}], 0
    shards[-1][name], size = np.ascontiguousarray(array), size + array.nbytes
  if len(shards) == 1:
    save_file(shards[0], folder / "model.safetensors", {"format": "pt"})
    return tensors
  weight_map = {}
  for i, shard in enumerate(shards, 1):
    file = f"model-{i:05}-of-{len(shards):05}.safetensors"
    save_file(shard, folder / file, {"format": "pt"})
    weight_map |= dict.fromkeys(shard, file)
  total = sum(array.nbytes for array in files.values())
  (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
  return tensors
