"""Rematerialization: what the backward pass recomputes of a layer."""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.model.linear import FP8_OUTPUT


def remat_layer(layer: Callable, remat: str) -> Callable:
  """`layer`, a function of x and more, with the backward pass recomputing what `model.remat` says."""
  if remat == "none":
    return layer
  policies = jax.checkpoint_policies
  if remat == "full":
    policy = None
  elif remat == "dots":
    save_fp8_gemms = policies.save_only_these_names(FP8_OUTPUT)
    policy = policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, save_fp8_gemms)
  else:
    policy = policies.save_and_offload_only_these_names(
      names_which_can_be_saved=[], names_which_can_be_offloaded=["block_input"],
      offload_src="device", offload_dst="pinned_host",
    )  # fmt: skip

  def with_named_input(x, *arguments):
    return layer(checkpoint_name(x, "block_input"), *arguments)

  return jax.checkpoint(with_named_input if remat == "offload" else layer, policy=policy)
