"""What changes over a run: plain functions of steps and tokens, computed on the host and handed to each step."""

import bisect
import math

from deepseek_jax.config import Config, ScheduleConfig


def constant(config, progress, start):
  return 1.0


def warmup_cosine(config, progress, start):
  """Cosine from the end of warm-up (`start`) to factors[0] at the end of the schedule."""
  return cosine(progress, start, 1.0, config.factors[0])


def multi_step(config, progress, start):
  """factors[i] from milestones[i] on (DeepSeek LLM section 2.3: 0.316 from 80%, 0.1 from 90% of the tokens)."""
  return (1.0, *config.factors)[bisect.bisect_right(config.milestones, progress)]


def wsd(config, progress, start):
  """Constant, cosine between milestones[0] and [1] to factors[0], constant, then factors[i] from milestones[i + 1] on.

  DeepSeek-V3 section 4.2: constant to 10T tokens, cosine over 4.3T, constant for 333B, lower for 167B.
  """
  drop = bisect.bisect_right(config.milestones, progress) - 2
  return config.factors[drop] if drop >= 0 else cosine(progress, *config.milestones[:2], config.factors[0])


def cosine(progress, start, end, final):
  """1 until `start`, half a cosine down to `final` at `end`."""
  share = min(max((progress - start) / max(end - start, 1e-12), 0.0), 1.0)
  return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * share))


SCHEDULE = {"constant": constant, "warmup_cosine": warmup_cosine, "multi_step": multi_step, "wsd": wsd}


def learning_rate(config: ScheduleConfig, step, tokens, batch_tokens):
  """Rate of the update that follows `step` updates on `tokens` tokens, with a batch of `batch_tokens`."""
  if config.warmup_tokens:
    warmup = min(1.0, (tokens + batch_tokens) / config.warmup_tokens)
  else:
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
  if config.tokens:
    progress, start = tokens / config.tokens, config.warmup_tokens / config.tokens
  else:
    progress, start = step / config.steps, config.warmup_steps / config.steps
  return config.peak * warmup * SCHEDULE[config.kind](config, progress, start)


def schedules(config: Config, step, tokens, batch_tokens):
  """learning_rate, mtp_weight and bias_update_rate of that update, as Python floats."""
  balance = config.balance
  return {
    "learning_rate": learning_rate(config.schedule, step, tokens, batch_tokens),
    "mtp_weight": config.mtp.weights[bisect.bisect_right(config.mtp.tokens, tokens)],
    "bias_update_rate": 0.0
    if balance.bias_update_tokens and tokens >= balance.bias_update_tokens
    else balance.bias_update_rate,
  }
