"""Which of two groups is better on held-out text, if the seeds tell."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from deepseek_jax.compare.groups import Group
from deepseek_jax.compare.intervals import MeanDifference, mean_difference, seeds_needed

# The relative difference in loss below which DeepSeek-V3's report calls FP8 and BF16 training alike (section 3.3).
SMALLEST = 0.0025
NO_DIFFERENCE, NOT_ENOUGH = "no difference found that large", "not enough seeds to tell"


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What the final held-out bits per byte of two groups say.

  Attributes:
    outcome: "A is better", "B is better", NO_DIFFERENCE or NOT_ENOUGH; A and B are the groups' letters.
    a, b: the groups.
    difference: of the means, A - B, in bits per byte; None where there are too few seeds for an interval.
    smallest: the smallest difference that matters, in bits per byte.
    seeds_needed: of each group, for an interval of ± `smallest` at the spread seen; None: no spread was seen.
    notes: what else to know before believing it.
  """

  outcome: str
  a: Group
  b: Group
  difference: MeanDifference | None
  smallest: float
  seeds_needed: int | None
  notes: tuple[str, ...]

  def lines(self) -> Iterator[str]:
    """Sentences for people, the outcome first."""
    better = next((g for g in (self.a, self.b) if self.outcome == f"{g.letter} is better"), None)
    yield f"{self.outcome}: {better.label}" if better else self.outcome
    if d := self.difference:
      relative = d.mean / (self._mean_of_b() or 1)
      yield (
        f"{self.a.letter} - {self.b.letter} in final held-out bits per byte: {d.mean:+.4f} ({relative:+.2%}), 95% interval "
        f"{d.low:+.4f} to {d.high:+.4f}"
      )
      yield _seeds(d)
    yield from self._explanation()
    yield from self.notes

  def to_json(self) -> dict[str, Any]:
    """For programs."""
    return {
      "outcome": self.outcome,
      "a": self.a.letter,
      "b": self.b.letter,
      "difference": dataclasses.asdict(self.difference) if self.difference else None,
      "relative_difference": self.difference.mean / (self._mean_of_b() or 1) if self.difference else None,
      "smallest": self.smallest,
      "seeds_needed": self.seeds_needed,
      "notes": list(self.notes),
      "text": list(self.lines()),
    }

  def _mean_of_b(self) -> float:
    final = self.b.final()
    return final.mean if final else 0.0

  def _explanation(self) -> Iterator[str]:
    size = f"{self.smallest:.4f} bits per byte"
    needed = self.seeds_needed
    if self.difference and " is better" in self.outcome and abs(self.difference.mean) < self.smallest:
      yield f"but by less than {size}, the smallest difference that matters (--smallest)"
    elif self.outcome == NO_DIFFERENCE:
      yield f"differences of {size} or more, the smallest that matters (--smallest), are outside the interval"
    elif self.outcome == NOT_ENOUGH:
      if self.difference:
        yield f"the interval holds 0, and also differences of {size}, the smallest that matters (--smallest)"
      else:
        yield "an interval needs two seeds that are in both groups, or two of each"
      if self.difference and (half := (self.difference.high - self.difference.low) / 2) <= self.smallest:
        yield f"it is ± {half:.4f}, but not around 0: more seeds move and narrow it, how many cannot be said"
      elif needed:
        yield f"with the spread seen, an interval of ± {self.smallest:.4f} takes about {needed:,} seeds of each"
      elif self.difference:
        yield f"with the spread seen, an interval of ± {self.smallest:.4f} is out of reach"
      else:
        yield "no spread was seen yet from which to say how many more it takes"


def judge(a: Group, b: Group, smallest: float = SMALLEST) -> Verdict:
  """The verdict on two groups.

  A group is better where the 95% interval of the difference leaves out 0. Where the interval holds 0, there is no
  difference as large as `smallest` if all of the interval is smaller; if not, the seeds are too few to tell.

  Args:
    smallest: the smallest relative difference that matters.
  """
  values_a, values_b = a.by_seed(), b.by_seed()
  base = b.final() or a.final()
  absolute = smallest * base.mean if base else 0.0
  difference = mean_difference(values_a, values_b)
  outcome = NOT_ENOUGH
  if difference and difference.high < 0:
    outcome = f"{a.letter} is better"
  elif difference and difference.low > 0:
    outcome = f"{b.letter} is better"
  elif difference and max(-difference.low, difference.high) < absolute:
    outcome = NO_DIFFERENCE
  needed = seeds_needed(values_a, values_b, absolute) if absolute else None
  return Verdict(outcome, a, b, difference, absolute, needed, tuple(_notes(a, b, difference)))


def _seeds(difference: MeanDifference) -> str:
  if difference.method == "paired":
    return f"paired over {len(difference.seeds_a)} seeds: {', '.join(map(str, difference.seeds_a))}"
  return (
    f"not paired (Welch): seeds {', '.join(map(str, difference.seeds_a))} of the one, "
    f"{', '.join(map(str, difference.seeds_b))} of the other"
  )


def _notes(a: Group, b: Group, difference: MeanDifference | None) -> Iterator[str]:
  for group in (a, b):
    for name, reason in group.not_counted.items():
      yield f"{name} of {group.letter} does not count: it {reason}; what is left may be the lucky runs"
  if difference and difference.method == "paired":
    for group in (a, b):
      if left := sorted(set(group.by_seed()) - set(difference.seeds_a)):
        yield f"seeds {', '.join(map(str, left))} of {group.letter} have no partner and do not count"
  if dict(a.fields) == dict(b.fields):
    yield "the configs of both have the same effect: what differs is chance, or what no config says"
  for name, title in (("tokens", "tokens"), ("flops", "FLOPs")):
    of_a, of_b = a.final(name), b.final(name)
    if of_a and of_b and of_b.mean and abs(of_a.mean / of_b.mean - 1) > 0.01:
      yield f"{a.letter} was trained with {of_a.mean / of_b.mean:.2f} times the {title} of {b.letter}"
