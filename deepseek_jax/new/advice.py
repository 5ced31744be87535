"""The numbers of a new config: size, batch and learning rate by scaling laws, layout by the plan, lengths in proportion."""

import dataclasses
import math

from deepseek_jax.config import Config
from deepseek_jax.config_sections import DataConfig, MTPConfig
from deepseek_jax.errors import ConfigError
from deepseek_jax.flags import load_config
from deepseek_jax.new.hardware import Hardware, timed_flops
from deepseek_jax.new.layout import Layout, find_layout, fits_somehow
from deepseek_jax.new.questions import Answers
from deepseek_jax.new.size import Size, find_size
from deepseek_jax.scaling.cost import FIRST_MFU
from deepseek_jax.scaling.counting import count_params
from deepseek_jax.scaling.laws import DEEPSEEK_ALLOCATION, TrainingRun, hyperparam_law, optimal_allocation
from deepseek_jax.scaling.sweep_plan import MIN_STEPS
from deepseek_jax.training.schedule_check import check_warmup

FEWEST_STEPS = 10
LEAST_CHECKED_FLOPS = (
  1e12  # the smallest budget at which the law's learning rate was compared (docs/results/scaling.md)
)
VOCAB_MULTIPLE = 128  # of a tokenizer.json's vocabulary, so that devices divide it
# The padded vocabularies of DeepSeek's models, and of the shipped configs for bytes.
VOCABS = {"byte": 272, "deepseek-llm": 102_400, "deepseek-v3": 129_280}
CHECKPOINT_SECONDS = 1800
# V3 section 4.2, as fractions of its 14.8T tokens: constant to 10T, cosine to 14.3T, then 333B, then 167B; factors are 2.2e-5
# and 7.3e-6 of its peak of 2.2e-4.
V3_MILESTONES, V3_FACTORS = (0.676, 0.966, 0.989), (0.1, 0.033)


@dataclasses.dataclass(frozen=True)
class Advice:
  """A config, and what it was made of.

  Attributes:
    config: its mesh is not resolved, so that it takes more devices or fewer.
    flops: the compute of the run, M x tokens.
    law_batch: tokens of a batch by the law, before rounding.
    reduced: the model is the largest that fits, and not the law's.
  """

  config: Config
  answers: Answers
  size: Size
  layout: Layout
  flops: float
  law_batch: float
  reduced: bool

  @property
  def steps(self) -> int:
    """Updates."""
    return self.config.train.steps

  @property
  def tokens(self) -> int:
    """Tokens of the run."""
    return self.steps * self.config.train.global_batch * self.config.data.seq

  @property
  def hours(self) -> float:
    """Hours of the run, by its plan."""
    return self.steps * self.layout.seconds / 3600


def vocab_size(answers: Answers) -> int:
  """Rows of the embedding for the tokenizer."""
  name, ids = answers.tokenizer.name, answers.tokenizer.ids
  return VOCABS.get(name) or -(-ids // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def advise(answers: Answers) -> Advice:
  """The config that fits the answers. Raises ConfigError where none does."""
  hardware, length = answers.topology, answers.length
  topology = hardware.topology
  rate = 0.0 if topology else timed_flops(hardware)
  if length.tokens:
    return _advice(answers, DEEPSEEK_ALLOCATION.for_tokens(length.tokens).scale, length.tokens, rate)
  first_rate = FIRST_MFU * hardware.num_devices * topology.chip.peak_flops if topology else FIRST_MFU * rate
  seconds = 3600 * length.hours
  allocation = optimal_allocation(first_rate * seconds)
  advice = _advice(answers, allocation.scale, allocation.tokens, rate, max_plans=1)
  reached = advice.flops / (
    advice.hours * 3600
  )  # of the size that the first rate leads to; that of the next is like it
  scale = optimal_allocation(reached * seconds).scale
  advice = _advice(answers, scale, reached * seconds / scale, rate)
  # The size was planned anew: as many steps of it as the hours take.
  return _advice_of_size(answers, advice, seconds / advice.layout.seconds)


def _advice_of_size(answers: Answers, advice: Advice, steps: float) -> Advice:
  """`advice` with another number of steps."""
  batch = advice.config.train.global_batch
  tokens = steps * batch * answers.seq
  lengths = _with_lengths(advice.config, _whole_steps(answers, tokens, batch), advice.layout.seconds)
  flops = advice.size.scale * tokens
  peak = peak_rate(advice.size, tokens)
  config = dataclasses.replace(lengths, schedule=dataclasses.replace(lengths.schedule, peak=peak))
  return dataclasses.replace(advice, config=config, flops=flops)


def _advice(answers: Answers, wanted: float, tokens: float, rate: float, max_plans: int | None = None) -> Advice:
  """For a wanted scale in FLOPs per token. rate, max_plans: as in `find_layout`."""
  hardware = answers.topology
  size = find_size(answers.model, answers.seq, vocab_size(answers), wanted, hardware)
  layout = find_layout(draft(answers, size, tokens), hardware, rate, max_plans) if size else None
  reduced = layout is None
  if not layout:
    size, layout = largest_that_fits(answers, wanted, tokens, rate)
  assert size  # a layout is one of a size
  config = _with_lengths(portable_mesh(layout.config, hardware), layout.config.train.steps, layout.seconds)
  check_warmup(config)
  batch = hyperparam_law("deepseek").batch_tokens(training_run(size, tokens))
  flops = size.scale * config.train.steps * config.train.global_batch * answers.seq
  return Advice(config, answers, size, layout, flops, batch, reduced)


def largest_that_fits(answers: Answers, wanted: float, tokens: float, rate: float) -> tuple[Size, Layout]:
  """The largest model below a scale that does not fit, to 10%. Raises ConfigError where none fits."""
  low, high = 0.0, math.log(wanted)
  found: Size | None = None
  vocab, hardware = vocab_size(answers), answers.topology
  smallest = find_size(answers.model, answers.seq, vocab, 1.0, hardware)
  if smallest and fits_somehow(draft(answers, smallest, tokens), hardware):
    low, found = math.log(smallest.scale), smallest
  while found and high - low > 0.1:
    middle = (low + high) / 2
    size = find_size(answers.model, answers.seq, vocab, math.exp(middle), hardware)
    if size and fits_somehow(draft(answers, size, tokens), hardware):
      low, found = middle, size
    else:
      high = middle
  layout = find_layout(draft(answers, found, tokens), hardware, rate) if found else None
  if not found or not layout:
    raise ConfigError(
      f"no model fits {hardware.description} with sequences of {answers.seq:,} tokens: ask for a shorter --seq, or name "
      "more devices with --topology"
    )
  return found, layout


def training_run(size: Size, tokens: float) -> TrainingRun:
  """What laws of hyper-parameters depend on."""
  return TrainingRun(size.scale * tokens, count_params(size.model).active_nonembedding, tokens)


def peak_rate(size: Size, tokens: float) -> float:
  """The peak learning rate by DeepSeek's law, but not above that of the smallest compute at which it was compared."""
  run = training_run(size, tokens)
  run = dataclasses.replace(run, flops=max(run.flops, LEAST_CHECKED_FLOPS))
  return float(f"{hyperparam_law('deepseek').lr(run):.3g}")


def round_batch(wanted: float, multiple: int, largest: float) -> int:
  """The number of sequences nearest to `wanted` that is `multiple` x 2^k or x 3 x 2^k, so that microbatches divide it.

  At most `largest`, where `multiple` is.
  """
  choices = [multiple * odd * 2**k for odd in (1, 3) for k in range(40)]
  allowed = [n for n in choices if n <= max(largest, multiple)]
  return min(allowed, key=lambda n: abs(math.log(n / wanted)))


def draft(answers: Answers, size: Size, tokens: float) -> Config:
  """The config on one device: data, model, batch, learning rate and steps. Raises ConfigError for too few tokens."""
  is_moe = answers.model == "moe"
  base = load_config("v3" if is_moe else "7b")
  law_batch = hyperparam_law("deepseek").batch_tokens(training_run(size, tokens))
  largest = tokens / (answers.seq * MIN_STEPS)
  batch = round_batch(law_batch / answers.seq, answers.topology.num_devices, largest)
  steps = _whole_steps(answers, tokens, batch)
  defaults = Config()
  schedule = dataclasses.replace(base.schedule, peak=peak_rate(size, tokens), tokens=0, steps=steps, warmup_steps=0)
  if is_moe:
    schedule = dataclasses.replace(schedule, milestones=V3_MILESTONES, factors=V3_FACTORS)
  return dataclasses.replace(
    defaults, name=answers.name, model=size.model,
    data=DataConfig(
      sources=answers.data or defaults.data.sources, tokenizer=answers.tokenizer.name, seq=answers.seq
    ),
    schedule=schedule,
    balance=dataclasses.replace(base.balance, bias_update_tokens=0),
    mtp=dataclasses.replace(base.mtp, tokens=(1,)) if is_moe else MTPConfig(),
    train=dataclasses.replace(defaults.train, steps=steps, global_batch=batch),
  )  # fmt: skip


def _whole_steps(answers: Answers, tokens: float, batch: int) -> int:
  """Steps of `tokens`. Raises ConfigError for fewer than FEWEST_STEPS."""
  steps = round(tokens / (batch * answers.seq))
  if steps < FEWEST_STEPS:
    devices = answers.topology.num_devices
    least = FEWEST_STEPS * batch * answers.seq
    raise ConfigError(
      f"{tokens:.3g} tokens are {steps} steps of {batch:,} sequences of {answers.seq:,} tokens (one a device at least, of "
      f"{devices:,}), and {FEWEST_STEPS} are the fewest: ask for {least:.3g} tokens, a shorter --seq, or fewer devices"
    )
  return steps


def _with_lengths(config: Config, steps: int, seconds: float) -> Config:
  """`config` with that many steps, and with warm-up, checkpoints and evaluations in proportion. seconds: of a step."""
  batch, seq = config.train.global_batch, config.data.seq
  tokens, sequences = steps * batch * seq, steps * batch
  constant_until, cosine_until = V3_MILESTONES[:2]
  is_moe = bool(config.model.moe.num_routed_experts)
  every = nice_number(min(CHECKPOINT_SECONDS / seconds, steps / 4, 1e6))
  return dataclasses.replace(
    config,
    # 2,000 steps of warm-up are for runs of hundreds of thousands.
    schedule=dataclasses.replace(config.schedule, steps=steps, warmup_steps=min(2000, max(1, steps // 10))),
    train=dataclasses.replace(config.train, steps=steps),
    balance=dataclasses.replace(config.balance, bias_update_tokens=round(cosine_until * tokens) if is_moe else 0),
    mtp=dataclasses.replace(config.mtp, tokens=(round(constant_until * tokens),)) if is_moe else config.mtp,
    checkpoint=dataclasses.replace(config.checkpoint, every=every),
    eval=dataclasses.replace(
      config.eval, every=every, sequences=_power_of_two(sequences / 200, 16, 256),
      final_sequences=_power_of_two(sequences / 20, 64, 4096),
    ),
    log=dataclasses.replace(config.log, every=1 if steps < 2000 else 10),
  )  # fmt: skip


def _power_of_two(number: float, least: int, most: int) -> int:
  """The largest power of two up to `number`, within powers of two."""
  return min(most, max(least, 2 ** math.floor(math.log2(max(number, 1)))))


def nice_number(most: float) -> int:
  """The largest 1, 2 or 5 times a power of ten that is at most `most`, and 1 at least."""
  power = 10 ** max(0, math.floor(math.log10(max(most, 1))))
  return max(power * factor for factor in (1, 2, 5) if power * factor <= max(most, 1))


def portable_mesh(config: Config, hardware: Hardware) -> Config:
  """`config`, whose mesh is resolved, with one size that follows from the number of devices."""
  mesh = config.mesh
  if hardware.is_cpu or mesh.data > hardware.num_slices:
    mesh = dataclasses.replace(mesh, data=-1)
  else:
    mesh = dataclasses.replace(mesh, fsdp=-1)
  return dataclasses.replace(config, mesh=mesh)
