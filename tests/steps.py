"""The update of make_train_step, from the same two functions, whose gradients are a result too."""

from deepseek_jax.model.transformer import graphdef
from deepseek_jax.training.step import make_apply_gradients, make_gradients


def make_step_with_grads(config, bos=0):
  """`(state, batch, microbatches, rates) -> (state, metrics, gradients laid out as state.params)`."""
  gradients, apply_gradients = make_gradients(config, graphdef(config.model), bos), make_apply_gradients(config)

  def step(state, batch, microbatches, rates):
    grads, metrics = gradients(state, batch, microbatches, rates["mtp_weight"])
    return *apply_gradients(state, grads, metrics, rates), grads

  return step
