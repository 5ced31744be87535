"""A device that computes wrong, in the pass that the check for silent corruption repeats."""

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.sharding import axis_index, pvary
from deepseek_jax.training import checked_pass

FAULTY = 2  # the device's number


class Fault:
  """Device FAULTY multiplies the scale of the final norm, or the gradient of that, by 1.001 while the fault is on.

  where: "forward", "backward", or None: the fault is off.
  on_after: executions of the pass after which `where` is "forward".
  """

  def __init__(self, patch, on_after=None):
    self.where, self.on_after, self.executions = None, on_after, 0
    make = checked_pass.make_objective_fn

    def make_faulty(context, frozen):
      objective_fn = make(context, frozen)

      def faulty(weights, tokens, key):
        norms = jax.tree.map(self.scale, weights["final_norm"])
        return objective_fn(weights | {"final_norm": norms}, tokens, key)

      return faulty

    patch.setattr(checked_pass, "make_objective_fn", make_faulty)
    self.scale = jax.custom_vjp(lambda x: x * self.factor("forward"))
    self.scale.defvjp(lambda x: (self.scale(x), None), lambda _, g: (g * self.factor("backward"),))

  def factor(self, where):
    def read(device):
      if device != FAULTY:
        return np.float32(1)
      self.executions += where == "forward"
      if self.on_after is not None and self.executions > self.on_after:
        self.where = "forward"
      return np.float32(1.001 if self.where == where else 1)

    return pvary(jax.pure_callback(read, jax.ShapeDtypeStruct((), jnp.float32), axis_index("devices")))
