"""Shapes of new configs: near what is asked for, in DeepSeek's forms, and divisible by the devices."""

import pytest

from deepseek_jax.new.hardware import find_hardware
from deepseek_jax.new.size import SMALLEST, find_size, fit_width

H200 = find_hardware("h200")


@pytest.mark.parametrize(
  ("kind", "wanted", "form"),
  [
    ("dense", 4e9, {"heads_per_key": 1, "experts": 0}),
    ("dense", 4e12, {"heads_per_key": 8, "experts": 0}),
    ("moe", 3e7, {"heads_per_key": 1, "experts": 8}),
    ("moe", 1e10, {"heads_per_key": 1, "experts": 64}),
    ("moe", 2e11, {"heads_per_key": 1, "experts": 256}),
  ],
)
def test_a_model_has_the_form_of_its_size(kind, wanted, form):
  size = find_size(kind, 1024, 272, wanted, H200)
  model = size.model
  assert size.scale == pytest.approx(wanted, rel=0.35) and model.vocab == 272
  assert model.moe.num_routed_experts == form["experts"]
  assert model.num_mtp_layers == (kind == "moe") and (model.attention.kind == "mla") == (kind == "moe")
  if kind == "dense":
    assert model.attention.heads == form["heads_per_key"] * model.attention.kv_heads
  else:
    assert model.moe.router_bias and model.moe.score == "sigmoid" and model.first_dense_layers >= 1
  assert model.init_std == (0.02 if model.embed < 1280 else 0.006)


def test_the_smallest_and_too_large():
  model = find_size("dense", 256, 272, 1.0, H200).model
  assert (model.layers, model.embed) == SMALLEST
  assert find_size("dense", 256, 272, 1e16, H200) is None


def test_latents_and_widths_are_divided_by_devices_with_a_factor_of_three():
  pod = find_hardware("v5p:4x4x12")  # 192
  model = find_size("moe", 4096, 272, 3e10, pod).model
  assert model.embed % 192 == 0 and model.attention.kv_lora_rank % 3 == 0


@pytest.mark.parametrize(
  ("layers", "embed", "devices", "found"),
  [
    (16, 2048, 1, (16, 2048)),
    (16, 2048, 512, (16, 2048)),
    (16, 2176, 512, (18, 2048)),  # as many parameters: 16 x (2176 / 2048)^2
    (24, 3072, 1024, (24, 3072)),
    (8, 1024, 6144, (8, 1024)),  # no width near is divided: the layout replicates the weights
    (30, 3968, 192, (32, 3840)),
  ],
)
def test_widths_that_devices_divide(layers, embed, devices, found):
  assert fit_width(layers, embed, devices) == found
