"""The detector under which kernels for TPUs are tested sees a race, where there is one."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


def doubled(x, waits):
  def kernel(x, y, copied, arrived):
    copy = pltpu.make_async_copy(x, copied, arrived)
    copy.start()
    if waits:
      copy.wait()
    y[...] = 2 * copied[...]
    if not waits:
      copy.wait()

  scratch = [pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA]
  whole = [pl.BlockSpec(memory_space=pl.ANY)]
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
    call = pl.pallas_call(kernel, in_specs=whole, out_shape=jax.typeof(x), scratch_shapes=scratch)
    return jax.block_until_ready(jax.jit(call)(x))


def test_a_copy_that_is_read_before_it_is_there_is_seen(capfd):
  x = jnp.ones((8, 128))
  assert (doubled(x, waits=True) == 2).all() and "RACE DETECTED" not in capfd.readouterr().out
  try:
    doubled(x, waits=False)
  except jax.errors.JaxRuntimeError as error:  # so jax 0.12
    assert "RACE DETECTED" in str(error)
  else:
    assert "RACE DETECTED" in capfd.readouterr().out
  finally:
    pltpu.reset_tpu_interpret_mode_state()
