"""Times transformers' DeepSeek-V3 at the sizes of benchmarks/v3_24m.py:  python benchmarks/torch_v3_24m.py

Needs torch and transformers (an environment of its own: `make parity` builds one). Fused AdamW, clipping at 1, 4 x 256
tokens.
"""

import argparse
import statistics
import time

import torch
import transformers


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--steps", type=int, default=8)
  parser.add_argument("--bfloat16", action="store_true", help="autocast to bfloat16")
  arguments = parser.parse_args()
  torch.manual_seed(0)
  config = transformers.DeepseekV3Config(
    vocab_size=32_768, hidden_size=256, intermediate_size=1024, moe_intermediate_size=256, num_hidden_layers=4,
    num_attention_heads=8, num_key_value_heads=8, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2,
    first_k_dense_replace=1, q_lora_rank=96, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
    n_group=1, topk_group=1, max_position_embeddings=256, num_nextn_predict_layers=0, use_cache=False,
  )  # fmt: skip
  model = transformers.DeepseekV3ForCausalLM(config).train()
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
  tokens = torch.randint(0, config.vocab_size, (4, 257))
  wall, cpu = [], []
  for _ in range(arguments.steps + 1):
    wall_start, cpu_start = time.perf_counter(), time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bfloat16):
      logits = model(tokens[:, :-1]).logits
      loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    wall.append(time.perf_counter() - wall_start)
    cpu.append(time.process_time() - cpu_start)
  wall, cpu = wall[1:], cpu[1:]
  precision = "bfloat16 autocast" if arguments.bfloat16 else "float32"
  print(f"torch {torch.__version__}, transformers {transformers.__version__}, {precision}")
  print(
    f"wall time per step {statistics.median(wall):.4f} s median of {len(wall)} ({min(wall):.4f} to {max(wall):.4f})"
  )
  print(f"CPU time per step  {statistics.median(cpu):.4f} s")


if __name__ == "__main__":
  main()
