"""Context extension in small: tiny.py's 0.5M parameters at 128 bytes, then with YaRN at 512 and 2,048.

The form is that of DeepSeek-V3's extension from 4K to 32K and 128K (configs/v3_long.py): lengths grow by 16 in two stages. 5% of the
samples ask for what stood up to 2,048 bytes before. benchmarks/long_context.py runs it beside the same tokens without YaRN.
"V3" below is arXiv:2412.19437.
"""

from ml_collections import ConfigDict

BATCH, SEQ = 16, 128  # 2,048 tokens a step, as in tiny.py; every stage has as many
PRETRAINING, EXTENSION = 1200, 200  # steps, chosen so that all of them take about 20 minutes on two CPU cores
TOKENS = BATCH * SEQ  # of a step
PEAK, LAST = 2e-2, 2e-3  # learning rates, set by hand as in tiny.py; V3 extends at the one that pre-training ends with


def get_config():
  return ConfigDict(
    dict(
      name="tiny_long",
      # As in tiny.py: sizes chosen for the lowest loss after minutes on two CPU cores.
      model=dict(
        vocab=272,  # 256 bytes + the document separator, padded to a multiple of 16
        embed=128,
        layers=2,
        first_dense_layers=1,
        num_mtp_layers=1,
        mlp=384,
        init_std=0.02,  # GPT-2's; 0.006 is for DeepSeek's widths of 1280 and more
        compute_dtype="float32",  # what CPUs multiply fastest everywhere
        remat="none",  # all activations fit in memory
        attention=dict(  # V3's form: a head's widths are in V3's ratio of 2 (nope) to 1 (rope) to 2 (values)
          kind="mla", heads=2, q_lora_rank=64, kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
          rope_theta=300.0,  # sequences are short: measured better than 10,000 on tiny
        ),
        moe=dict(  # V3's router (section 2.1.2), with fewer experts and groups
          num_routed_experts=8, num_shared_experts=1, num_experts_per_token=2, mlp=64, score="sigmoid",
          num_expert_groups=4, topk_groups=2, group_score="top2_sum", router_bias=True, norm_topk_prob=True,
          route_scale=1.0,
        ),
      ),
      data=dict(
        sources=("python-stdlib", "key-value-retrieval"), weights=(0.95, 0.05),  # so few that the text is learned all the same
        seq=SEQ,
        heldout_fraction=0.05,  # 5% of a small corpus: 0.4 MB to compare models on
      ),
      optimizer=dict(kind="muon", eps=1e-20),  # V4's: ahead of AdamW from the first minutes on (docs/results/optimizers.md)
      schedule=dict(  # of the first stage
        kind="warmup_cosine", peak=PEAK, warmup_steps=30, steps=PRETRAINING, factors=(LAST / PEAK,)
      ),
      balance=dict(bias_update_rate=0.001, expert_loss=1e-4),  # V3, section 4.2
      mtp=dict(weights=(0.3, 0.1), tokens=(1_600_000,)),  # V3, section 4.2: lowered after two thirds of pre-training
      train=dict(steps=0, global_batch=BATCH),  # see above; the stages say when it ends
      stages=(
        dict(name="128", until_tokens=PRETRAINING * TOKENS),
        # V3, section 4.3: YaRN is on from the first extension. Its factor is that to the length of the stage, where V3 has 40 at
        # once; beta and mscale are V3's, the defaults. The optimizer goes on, as the report names no reset.
        dict(
          name="512",
          until_tokens=(PRETRAINING + EXTENSION) * TOKENS,
          data=dict(seq=512),
          train=dict(global_batch=4),
          model=dict(attention=dict(yarn=dict(factor=4, original_seq=SEQ))),
          schedule=dict(kind="constant", peak=LAST, warmup_steps=0, factors=()),
        ),
        dict(
          name="2048",
          until_tokens=(PRETRAINING + 2 * EXTENSION) * TOKENS,
          data=dict(seq=2048),
          train=dict(global_batch=1),
          model=dict(attention=dict(yarn=dict(factor=16, original_seq=SEQ))),
          schedule=dict(kind="constant", peak=LAST, warmup_steps=0, factors=()),
        ),
      ),
      checkpoint=dict(every=250),  # about a minute of work
      eval=dict(every=250, sequences=128),  # seconds, beside minutes of steps
      log=dict(every=1),  # a line costs nothing beside a step
    )
  )  # fmt: skip
