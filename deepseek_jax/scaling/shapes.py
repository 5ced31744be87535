"""Model shapes of a sweep: depth and width for a wanted scale, all other sizes in proportion to those of a base config."""

import dataclasses
import functools
import math

import numpy as np

from deepseek_jax.errors import ConfigError
from deepseek_jax.model_config import ModelConfig
from deepseek_jax.scaling.counting import deepseek_flops_per_token, nonembedding_flops_per_token

# Widths per layer of DeepSeek's models lie between 64 and 136, and small models are wider than deep in papers: the ratio
# of width to depth that is wanted grows with the width up to this.
LARGEST_ASPECT = 128
# (from this width on, width of a head): heads are whole, and so widths are multiples of it.
HEAD_DIMS = ((1024, 128), (256, 64), (64, 32), (16, 8))
LARGEST_WIDTH = 32_768
SCALE_TOLERANCE = 0.2  # how far a shape may be from the scale that was asked for


@dataclasses.dataclass(frozen=True)
class MoEVariant:
  """What a ladder of mixtures of experts varies. 0: as in the base config.

  Attributes:
    experts: routed experts.
    granularity: experts are 1 / granularity of a dense MLP, and a token goes through as many, shared ones included: the
      active size is that of the dense model of this depth and width.
  """

  experts: int = 0
  granularity: int = 0


def head_dim(embed: int) -> int:
  """Width of a head in a model of this width."""
  return next(size for start, size in HEAD_DIMS if embed >= start)


def mlp_width(embed: int) -> int:
  """Inner width of a dense SwiGLU: 8/3 of the width (DeepSeek LLM section 2.2), rounded to a multiple of 8, or 64 from 512 on."""
  step = 64 if embed >= 512 else 8
  return max(step, round(8 * embed / 3 / step) * step)


def with_shape(base: ModelConfig, layers: int, embed: int, variant: MoEVariant | None = None) -> ModelConfig:
  """`base` with another depth and width. Latents, experts and heads keep their ratio to the width, where it is whole.

  Raises ConfigError where the sizes do not fit each other.
  """
  variant = variant or MoEVariant()
  a, dim = base.attention, head_dim(embed)
  heads = embed // dim
  if a.kind == "mla":
    # The widths of a head in V3's ratio of 2 (nope) to 1 (rope) to 2 (values).
    attention = dataclasses.replace(
      a, heads=heads, q_lora_rank=_in_ratio(a.q_lora_rank, base.embed, embed),
      kv_lora_rank=_in_ratio(a.kv_lora_rank, base.embed, embed), qk_nope_head_dim=dim,
      qk_rope_head_dim=max(2, dim // 2), v_head_dim=dim,
    )  # fmt: skip
  else:
    shared = a.heads // a.kv_heads
    kv_heads = heads // shared if heads % shared == 0 else heads
    attention = dataclasses.replace(a, heads=heads, kv_heads=kv_heads, head_dim=dim)
  moe = base.moe
  if moe.num_routed_experts:
    moe = dataclasses.replace(moe, mlp=_in_ratio(moe.mlp, base.embed, embed))
    if variant.granularity:
      chosen = variant.granularity - moe.num_shared_experts
      moe = dataclasses.replace(
        moe, mlp=max(8, round(mlp_width(embed) / variant.granularity / 8) * 8), num_experts_per_token=chosen
      )
    if variant.experts:
      moe = dataclasses.replace(moe, num_routed_experts=variant.experts)
  elif variant != MoEVariant():
    raise ConfigError("--experts and --granularity need a base config with model.moe.num_routed_experts above 0")
  dense_layers = min(base.first_dense_layers, layers - 1)
  return dataclasses.replace(
    base, layers=layers, embed=embed, mlp=mlp_width(embed), attention=attention, moe=moe,
    first_dense_layers=dense_layers if moe.num_routed_experts else 0,
  )  # fmt: skip


def _in_ratio(size: int, base_embed: int, embed: int) -> int:
  """`size` of a model of width `base_embed` at width `embed`, as a multiple of 8; 0 stays 0."""
  return max(8, round(size * embed / base_embed / 8) * 8) if size else 0


@functools.cache
def _candidates() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(layers, width, |log| of their ratio over the wanted one) of shapes to choose from: arrays of float64."""
  shapes, embed = [], 16
  while embed <= LARGEST_WIDTH:
    wanted = embed / _aspect(embed)
    shapes += [(n, embed) for n in range(max(1, math.floor(wanted * 0.7)), math.ceil(wanted * 1.4) + 1)]
    embed += head_dim(embed)
  layers, embeds = np.array(shapes, np.float64).T
  return layers, embeds, np.abs(np.log([e / n / _aspect(e) for n, e in shapes]))


def _aspect(embed: int) -> float:
  """The ratio of width to depth that is wanted at a width: 16 at 32, 32 at 128, 64 at 512, 128 from 2,048 on."""
  return min(LARGEST_ASPECT, 2.83 * math.sqrt(embed))


def find_shape(base: ModelConfig, seq: int, scale: float, variant: MoEVariant | None = None) -> ModelConfig | None:
  """The model whose M (`nonembedding_flops_per_token`) is nearest to `scale`; None where none is within SCALE_TOLERANCE.

  Args:
    base: the model whose kind and ratios it has.
    scale: FLOPs per token.
  """
  if variant and variant != MoEVariant() and not base.moe.num_routed_experts:
    raise ConfigError("--experts and --granularity need a base config with model.moe.num_routed_experts above 0")
  # The formula of dense models ranks shapes; `ratio` is what the base's own layers cost beside it at that size.
  ratio = 1.0
  tried: dict[tuple[int, int], tuple[float, ModelConfig]] = {}
  while (shape := _nearest(seq, scale / ratio)) not in tried and len(tried) < 4:
    model = _cached_shape(base, *shape, variant)
    counted = _cached_scale(model, seq=seq)
    tried[shape] = abs(math.log(counted / scale)), model
    ratio = counted / deepseek_flops_per_token(*shape, seq)
  distance, model = min(tried.values(), key=lambda item: item[0])
  return model if distance <= math.log(1 + SCALE_TOLERANCE) else None


def _nearest(seq: int, scale: float) -> tuple[int, int]:
  """(layers, width) of the dense model nearest to `scale`, and less so to the wanted ratio of width to depth."""
  layers, embed, off_aspect = _candidates()
  off_scale = np.abs(np.log((72 * layers * embed**2 + 12 * layers * embed * seq) / scale))
  best = int(
    np.argmin(np.where(off_scale <= math.log(1 + SCALE_TOLERANCE), off_scale + 0.3 * off_aspect, 10 + off_scale))
  )
  return int(layers[best]), int(embed[best])


_cached_shape = functools.cache(with_shape)
_cached_scale = functools.cache(nonembedding_flops_per_token)
