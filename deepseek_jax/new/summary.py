"""What a new config amounts to, for the head of its file and for the terminal."""

import shlex

from deepseek_jax.console import format_bytes
from deepseek_jax.new.advice import Advice
from deepseek_jax.new.hardware import step_fraction
from deepseek_jax.new.questions import NO_DATA
from deepseek_jax.scaling.counting import count_params
from deepseek_jax.scaling.laws import DEEPSEEK_ALLOCATION
from deepseek_jax.scaling.sweep_plan import MIN_STEPS

# What DeepSeek LLM fitted its laws on (sections 3.1 and 3.2), in FLOPs.
FITTED = (1e17, 3e20)
LONG_HOURS = 24 * 365
KINDS = {"dense": "dense, as DeepSeek LLM", "moe": "a mixture of experts, as DeepSeek-V3"}


def title(advice: Advice) -> str:
  """One line."""
  counts = count_params(advice.size.model)
  active = f" ({short(counts.active)} active)" if counts.active < counts.total else ""
  kind = KINDS[advice.answers.model]
  return f"{advice.config.name}: {short(counts.total)} parameters{active}, {kind}; {short(advice.tokens)} tokens."


def summary(advice: Advice) -> dict[str, str]:
  """{name: line} of size, run, layout, memory and time."""
  config, model, hardware = advice.config, advice.size.model, advice.answers.topology
  counts, batch = count_params(model), config.train.global_batch
  active = f", {counts.active:,} active" if counts.active < counts.total else ""
  fitted = f"fitted on {FITTED[0]:.0e} to {FITTED[1]:.0e} FLOPs" + (
    "" if FITTED[0] <= advice.flops <= FITTED[1] else ": this is an extrapolation"
  )
  seconds = advice.layout.seconds
  how = "by the roofline of its plan, not measured" if hardware.topology else (
    f"at {step_fraction(model.embed):.0%} of a matrix product that was timed here"
  )  # fmt: skip
  of = f" of {format_bytes(hardware.memory)} that a step may use" if hardware.memory else ""
  return {
    "size": f"{model.layers} layers of width {model.embed:,}: {counts.total:,} parameters{active}",
    "compute": f"{advice.flops:.3g} FLOPs, {advice.size.scale:.3g} per token; laws of DeepSeek LLM, {fitted}",
    "run": f"{advice.steps:,} steps of {batch:,} sequence{'s' if batch > 1 else ''} of {config.data.seq:,} tokens: {short(advice.tokens)} tokens; "
    f"peak learning rate {config.schedule.peak:.3g}",
    "memory": f"{format_bytes(advice.layout.memory)} a device{of}, by the estimate",
    "time": f"{seconds:.3g} s a step, {advice.hours:.3g} hours in all, {how}",
  }


def notes(advice: Advice) -> list[str]:
  """What a reader should know of the numbers, a line each."""
  found = []
  if advice.reduced:
    found.append(
      f"the law asks for {advice.size.wanted:.3g} FLOPs per token; this is the largest model that fits the hardware"
    )
  elif advice.size.scale > 2 * advice.size.wanted:
    found.append(
      f"the law asks for {advice.size.wanted:.3g} FLOPs per token; this is the smallest shape that is made: ask for "
      "more tokens"
    )
  if advice.answers.model == "moe":
    found.append("the law was fitted on dense models; here it counts the FLOPs of the experts that a token uses")
  if advice.steps < MIN_STEPS:
    found.append(f"{advice.steps} steps are few: ask for more tokens; scaling sweeps have at least {MIN_STEPS}")
  if advice.hours > LONG_HOURS:
    found.append(
      f"{advice.hours:.3g} hours are {advice.hours / LONG_HOURS:,.1f} years: ask for fewer tokens, or name more devices"
    )
  if not advice.answers.data:
    found.append("no text is named yet: data.sources is the interpreter's own library, a placeholder")
  return found


def header(advice: Advice) -> list[str]:
  """The lines below the title."""
  hardware = advice.answers.topology
  lines = [f"For {hardware.description}. Written by:", f"  {command(advice)}", ""]
  lines += [f"- {name}: {text}." for name, text in summary(advice).items()]
  law = DEEPSEEK_ALLOCATION.scale_law
  lines += [
    f"- M = {law.coefficient} C^{law.exponent} is the compute-optimal number of FLOPs per token without the embedding "
    "(arXiv:2401.02954, eq. 2 and 4). Another number of tokens needs another size, batch and learning rate: run it again.",
    *(f"- {note[:1].upper()}{note[1:]}." for note in notes(advice)),
  ]
  return lines


def command(advice: Advice) -> str:
  """The command that gives this config again."""
  answers = advice.answers
  length = answers.length
  flags = {
    "model": answers.model, "topology": answers.topology.text,
    **({"tokens": exact(length.tokens)} if length.tokens else {"hours": exact(length.hours)}),
    "data": ",".join(answers.data) or NO_DATA, "tokenizer": answers.tokenizer.name, "seq": str(answers.seq),
    "name": answers.name,
  }  # fmt: skip
  return "python -m deepseek_jax.new " + " ".join(shlex.quote(f"--{name}={value}") for name, value in flags.items())


def exact(number: float) -> str:
  """All digits, in the shortest form: 2e+09, 123456789.0."""
  text = f"{number:g}"
  return text if float(text) == number else repr(number)


def short(number: float) -> str:
  """A count in three digits: 1.23B."""
  number = float(f"{number:.3g}")  # rounded first: 999.9M is 1B
  for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
    if number >= size:
      return f"{number / size:.3g}{unit}" if number < 1000 * size else f"{number / size:,.0f}{unit}"
  return f"{number:.0f}"
