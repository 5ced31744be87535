"""Why each value of a new config is what it is: comments of the file."""

from deepseek_jax.new.advice import CHECKPOINT_SECONDS, LEAST_CHECKED_FLOPS, VOCABS, Advice
from deepseek_jax.new.layout import MAX_PLANS
from deepseek_jax.new.size import LEAST_WIDTH
from deepseek_jax.scaling.sweep_plan import MIN_STEPS

PLACEHOLDER = "a placeholder, the interpreter's own library: name files, folders or globs here"


def reasons(advice: Advice) -> dict[str, str]:
  """{field, or section for all its fields that have none of their own: reason in one line}."""
  return {**_model(advice), **_training(advice), **_schedule(advice), **_layout(advice)}


def _model(advice: Advice) -> dict[str, str]:
  size, answers, model = advice.size, advice.answers, advice.size.model
  ids = answers.tokenizer.ids
  rows = "the separator included, " if answers.tokenizer.name == "byte" else ""
  padded = "padded as in DeepSeek's models" if answers.tokenizer.name in VOCABS and not rows else "padded"
  near = f"{size.scale:.3g} FLOPs per token of the {size.wanted:.3g} that the law asks for"
  if advice.reduced:
    near = f"{size.scale:.3g} FLOPs per token, the most that fits: the law asks for {size.wanted:.3g}"
  elif size.scale > 2 * size.wanted:
    near = f"{size.scale:.3g} FLOPs per token, the smallest shape: the law asks for {size.wanted:.3g}"
  return {
    **size.reasons,
    "model": f"{near}; depth and width in the ratio of DeepSeek's models",
    "model.vocab": f"{ids:,} ids, {rows}{padded}",
    "model.mlp": "8/3 of the width (DeepSeek LLM section 2.2), rounded",
    "model.init_std": f"GPT-2's; 0.006 is for DeepSeek's widths of {LEAST_WIDTH} and more",
    "model.first_dense_layers": "V3 section 4.2: the first layers are dense",
    "model.num_mtp_layers": "V3 section 2.2: each position also predicts the token after the next",
    "model.compute_dtype": (
      "what CPUs multiply fastest everywhere" if answers.topology.is_cpu else "this GPU has no units for bfloat16"
    ),
    "model.moe.mlp": f"experts of this width; {model.moe.num_experts_per_token} of them and the shared ones are used",
  }


def _training(advice: Advice) -> dict[str, str]:
  config, answers = advice.config, advice.answers
  batch, seq, devices = config.train.global_batch, answers.seq, answers.topology.num_devices
  law = f"0.2920 C^0.3271 = {advice.law_batch:.3g} tokens = {advice.law_batch / seq:.3g} sequences"
  if batch == devices > advice.law_batch / seq:
    rounded = f"at least one on each of {devices:,} devices"
  elif batch < 0.7 * advice.law_batch / seq:
    rounded = f"fewer, for {MIN_STEPS} steps, or as many as the tokens give"
  else:
    rounded = "rounded so that devices and microbatches divide it"
  return {
    "data.sources": "as asked" if answers.data else PLACEHOLDER,
    "data.tokenizer": "as asked",
    "data.seq": "as asked",
    "train.global_batch": f"{law}; {rounded}",
    "train.steps": f"{advice.tokens:.4g} tokens in batches of {batch * seq:,}",
    "checkpoint": f"{_minutes(advice, config.checkpoint.every)} of work (aim: {CHECKPOINT_SECONDS // 60} minutes at most)",
    "eval": "at each checkpoint; few sequences beside those that are trained on",
    "log": "a line costs nothing beside a step",
    "balance": "V3 section 4.2; biases are frozen when the cosine ends, after the same fraction of the tokens",
    "mtp": "V3 section 4.2: lowered when the cosine begins",
  }


def _schedule(advice: Advice) -> dict[str, str]:
  is_moe = bool(advice.size.model.moe.num_routed_experts)
  floor = f" at C = {LEAST_CHECKED_FLOPS:.0e}, below which the law was not compared"
  shape = "V3 section 4.2: constant, a cosine, then two constants" if is_moe else "DeepSeek LLM section 2.3"
  return {
    "schedule": shape,
    "schedule.peak": f"0.3118 C^-0.1250{floor if advice.flops < LEAST_CHECKED_FLOPS else ''} (DeepSeek LLM, eq. 1)",
    "schedule.warmup_steps": "2,000 in DeepSeek's recipes; a tenth of a short run",
    "schedule.steps": "the length of the run",
  }


def _layout(advice: Advice) -> dict[str, str]:
  hardware, mesh = advice.answers.topology, advice.layout.config.mesh
  if hardware.topology:
    found = f"the fastest of {MAX_PLANS} analytic plans for {hardware.topology.text}"
    where = f"{found}, where fsdp is {mesh.fsdp}" if advice.config.mesh.fsdp == -1 else found
    return {
      "mesh": where,
      "train.microbatch": found,
      "model.remat": found,
      "model.moe.buffer_factor": "room for the worst case takes memory; a step that overflows this is skipped",
    }
  return {
    "mesh": "parameters and moments sharded over all devices",
    "train.microbatch": "the largest part of the batch that fits by the estimate",
    "model.remat": "all activations fit in memory",
  }


def _minutes(advice: Advice, steps: int) -> str:
  minutes = steps * advice.layout.seconds / 60
  return f"about {minutes:.0f} minutes" if minutes >= 2 else f"about {60 * minutes:.2g} seconds"
