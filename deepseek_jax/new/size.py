"""The model of a new config: the form that DeepSeek gave to models of its size, in the shape that the law asks for."""

import dataclasses
import math
from collections.abc import Iterator, Mapping

from deepseek_jax.flags import load_config
from deepseek_jax.model_config import ModelConfig
from deepseek_jax.new.hardware import Hardware
from deepseek_jax.scaling.counting import nonembedding_flops_per_token
from deepseek_jax.scaling.shapes import find_shape, head_dim, with_shape

SMALLEST = (2, 64)  # layers and width: of less, no layer is what it is in a large model
SHAPE_FACTORS = (1.0, 0.87, 1.15, 0.76, 1.32)  # of the wanted scale, tried in turn where no shape is near it
WIDTH_TOLERANCE = 0.15  # how far a width may move so that the devices divide it
MAX_ODD_FACTOR = 3  # of a number of devices; latents that a larger one divides would be far from the wanted ones
# The standard deviation of initial matrices below a width, as in the shipped configs; DeepSeek's models have 0.006.
SMALL_STD, LEAST_WIDTH = 0.02, 1280


@dataclasses.dataclass(frozen=True)
class Form:
  """A model whose ratios are taken, from this width on. reasons: {field or section: why}, for comments."""

  config: str
  least_width: int
  reasons: Mapping[str, str]
  moe: Mapping[str, object] = dataclasses.field(default_factory=dict)  # changes of its experts


_MLA = "V3's form: a head's widths in its ratio of 2 (nope) to 1 (rope) to 2 (values)"
FORMS = {
  "dense": (
    Form("67b", 8192, {"model.attention": "grouped-query attention, 8 query heads a key head, as DeepSeek LLM 67B"}),
    Form("7b", 0, {"model.attention": "multi-head attention, as DeepSeek LLM 7B"}),
  ),
  "moe": (
    Form(
      "v3",
      4096,
      {
        "model.moe": "V3's experts and router (sections 2.1.2 and 4.2); their width in proportion to the model's",
        "model.attention": f"{_MLA}; latents in proportion to the width, as V3's",
      },
    ),
    Form(
      "v2_lite",
      1024,
      {
        "model.moe": "V2-Lite's experts (its appendix B.1), in proportion to the width, with V3's router (section 2.1.2)",
        "model.attention": f"{_MLA}; latents in proportion to the width, as V2-Lite's",
      },
      {"score": "sigmoid", "router_bias": True, "norm_topk_prob": True},
    ),
    Form(
      "small",
      0,
      {
        "model.moe": "V3's router (section 2.1.2), with fewer experts and groups: those of configs/small.py",
        "model.attention": f"{_MLA}; latents in proportion to the width, as in configs/small.py",
      },
    ),
  ),
}


@dataclasses.dataclass(frozen=True)
class Size:
  """A model, and the FLOPs per token that it was asked to have. reasons: as a Form's."""

  model: ModelConfig
  wanted: float
  scale: float
  reasons: Mapping[str, str]


def _base(form: Form, is_moe: bool) -> ModelConfig:
  model = load_config(form.config).model
  moe = dataclasses.replace(model.moe, **form.moe, buffer_factor=0.0)  # type: ignore[arg-type]
  # What the hardware, the tokenizer and the width decide is set by `find_size` and by the plan.
  attention = dataclasses.replace(model.attention, rope_theta=10_000.0)
  return dataclasses.replace(
    model, moe=moe, attention=attention, num_mtp_layers=1 if is_moe else 0, remat="full", compute_dtype="bfloat16"
  )


def find_size(kind: str, seq: int, vocab: int, wanted: float, hardware: Hardware) -> Size | None:
  """The model of `wanted` FLOPs per token in DeepSeek's convention; None where that is larger than every shape.

  Its width is one that the devices divide, if there is such a width near; it is not smaller than SMALLEST.

  Args:
    kind: a key of FORMS.
  """
  for form in FORMS[kind]:  # the last one has no least width
    base = _base(form, kind == "moe")
    smallest = with_shape(base, *SMALLEST)
    if wanted <= nonembedding_flops_per_token(smallest, seq=seq):
      shapes: Iterator[ModelConfig | None] = iter((smallest,))
    else:
      shapes = (find_shape(base, seq, factor * wanted) for factor in SHAPE_FACTORS)
    model = next((shape for shape in shapes if shape), None)
    if model is None:
      return None
    if model.embed >= form.least_width:
      return _fitted(base, form, model, seq, vocab, wanted, hardware)
  raise AssertionError(f"FORMS[{kind!r}] has no form for small models")


def _fitted(
  base: ModelConfig, form: Form, model: ModelConfig, seq: int, vocab: int, wanted: float, hardware: Hardware
) -> Size:
  """`model`, a shape of `base`, for its tokenizer and its hardware."""
  devices = hardware.num_devices // hardware.num_slices
  a = base.attention
  layers, embed = fit_width(model.layers, model.embed, devices, a.heads // a.kv_heads if a.kind == "gqa" else 1)
  model = round_latents(with_shape(base, layers, embed), devices)
  std = SMALL_STD if embed < LEAST_WIDTH else 0.006
  model = dataclasses.replace(model, vocab=vocab, init_std=std, compute_dtype=hardware.compute_dtype)
  return Size(model, wanted, nonembedding_flops_per_token(model, seq=seq), form.reasons)


def fit_width(layers: int, embed: int, devices: int, heads_per_key: int = 1) -> tuple[int, int]:
  """(layers, width) with a width that `devices`, or a 2nd to 8th part of them, divide, and about as many parameters.

  A width within WIDTH_TOLERANCE is taken, or else one of whole groups of `heads_per_key` heads.
  """
  group = head_dim(embed) * heads_per_key
  units = [math.lcm(group * n, devices // n) for n in (1, 2, 4, 8) if devices % n == 0]
  widths = [max(unit, round(embed / unit) * unit) for unit in (*units, group)]
  width = next((width for width in widths if abs(width / embed - 1) <= WIDTH_TOLERANCE), widths[-1])
  return max(1, round(layers * (embed / width) ** 2)), width


def round_latents(model: ModelConfig, devices: int) -> ModelConfig:
  """`model` with latents that are multiples of a power of two, and of the odd factor of `devices` where that is small."""
  if model.attention.kind != "mla":
    return model
  step = 128 if model.embed >= 2048 else 64 if model.embed >= 512 else 8
  odd = devices // (devices & -devices)
  step *= odd if odd <= MAX_ODD_FACTOR else 1
  ranks = {
    name: max(step, round(rank / step) * step)
    for name in ("q_lora_rank", "kv_lora_rank")
    if (rank := getattr(model.attention, name))
  }
  return dataclasses.replace(model, attention=dataclasses.replace(model.attention, **ranks))
