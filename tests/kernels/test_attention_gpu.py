"""tokamax's attention for Hopper: against XLA's, interpreted on CPU, and how it is traced.

jax's interpreter does not know products of an operand in registers nor tokamax's barriers of named numbers. So here it
gets the former, and stages enough that none is used twice, which makes the latter needless: arithmetic is tested, its
order is not.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.kernels.attention import pallas_gpu, xla
from deepseek_jax.kernels.attention.api import attention, attention_of_part
from deepseek_jax.kernels.implementations import Unsupported
from deepseek_jax.model.context_parallel import zigzag
from tests.kernels.marks import NEEDS_JAX_0_11

NEEDS_TOKAMAX = pytest.mark.skipif(
  pallas_gpu.installed_tokamax() != pallas_gpu.TOKAMAX_VERSION,
  reason="the extra tokamax is not installed: make kernels",
)

# batch, seq, heads, kv_heads, width of keys, of values
CASES = {"mla": (1, 256, 2, 2, 192, 128), "gqa": (2, 128, 4, 2, 128, 128), "narrow": (1, 128, 2, 1, 48, 32)}


def problem(name, dtype=jnp.bfloat16):
  """q, k, v, a cotangent, segment_ids."""
  (batch, seq, heads, kv_heads, key, value), rng = CASES[name], np.random.default_rng(0)
  shapes = (heads, key), (kv_heads, key), (kv_heads, value), (heads, value)
  segments = np.sort(rng.integers(0, 4, (batch, seq)), 1).astype(np.int32)
  return [jnp.asarray(rng.normal(size=(batch, seq, *shape)), dtype) for shape in shapes], jnp.asarray(segments)


class Register:
  """An accumulator that is read and added to, in place of a Ref."""

  def __init__(self, value):
    self.value = value

  def __getitem__(self, _):
    return self.value

  def __setitem__(self, _, value):
    self.value = value


def run_state(function):
  def call(values):
    refs = [Register(value) for value in values]
    function(refs)
    return [ref.value for ref in refs]

  return call


def product(acc, a, b):
  from jax.experimental.pallas import mosaic_gpu as plgpu

  if isinstance(acc, Register):
    acc[...] += jax.lax.dot(a, b[...], preferred_element_type=jnp.float32)
  else:
    plgpu.wgmma(acc, a, b)


def wgmma_of_registers(callbacks, kwargs):
  """What the interpreter's wgmma does, for values `a`."""
  memory, thread = callbacks._get_shared_memory(), kwargs["thread"]
  info = callbacks.memory.GPULoggingInfo(kwargs["mesh_location"], thread, kwargs["source_info"])

  def place(name):
    key = callbacks.HostAllocationKey.from_array(kwargs[f"{name}_allocation_key_as_array"])
    transforms = jax.tree.map(int, callbacks._remove_noop_transforms(kwargs[f"{name}_transforms"]))
    return key, memory.access(key, transforms)

  read = lambda name: memory.get_buffer_content(*place(name), thread, logging_info=info)[0]
  acc, b = read("acc"), read("b")
  total = acc + np.matmul(np.asarray(kwargs["a_allocation_key_as_array"]), b, dtype=acc.dtype)
  memory.store_buffer_content(*place("acc"), total, thread, logging_info=info)
  return kwargs["token"]


@pytest.fixture
def on_cpu(monkeypatch):
  from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as callbacks
  from jax.experimental.pallas import mosaic_gpu as plgpu
  from tokamax._src.ops.attention import pallas_mosaic_gpu_kernel_sm90 as forward
  from tokamax._src.ops.attention import pallas_mosaic_gpu_vjp_kernel_sm90 as backward

  known = callbacks.wgmma
  in_memory = lambda kwargs: np.ndim(kwargs["a_allocation_key_as_array"]) == 1
  wgmma = lambda **kwargs: known(**kwargs) if in_memory(kwargs) else wgmma_of_registers(callbacks, kwargs)
  monkeypatch.setattr(callbacks, "wgmma", wgmma)

  def changed(module, **names):
    return types.SimpleNamespace(**vars(module) | names)

  nothing = lambda *_, **__: None
  acc = type("ACC", (), {"__new__": lambda _, *shape: plgpu.ACC(*shape), "init": staticmethod(lambda value: value)})
  for module in (forward, backward):
    # Memory that is shared by what the named barriers keep apart is memory of its own.
    monkeypatch.setattr(module, "plgpu", changed(plgpu, wgmma=product, ACC=acc, RefUnion=lambda *groups: groups))
    monkeypatch.setattr(module, "mgpu_lib", changed(module.mgpu_lib, bar_arrive=nothing, bar_sync=nothing))
    monkeypatch.setattr(module, "pl", changed(module.pl, run_state=run_state))
  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
    yield


def results(attend, q, k, v, dy):
  """(y, dq, dk, dv)."""
  y, pull = jax.vjp(attend, q, k, v)
  return y, *pull(dy)


def assert_close(ours, exact):
  """No more than twice what rounding the operands and results makes inevitable."""
  for a, b in zip(ours, exact, strict=True):
    assert a.dtype == jnp.bfloat16
    assert np.linalg.norm(np.asarray(a, np.float32) - b) < 2 * 2**-8 * np.linalg.norm(b)


@NEEDS_JAX_0_11
@NEEDS_TOKAMAX
@pytest.mark.kernels
@pytest.mark.parametrize(
  ("name", "packed", "window"),
  [("mla", True, 0), ("gqa", True, 0), ("narrow", False, 0), ("narrow", False, 7)],
)
def test_values_and_gradients(name, packed, window, on_cpu):
  arrays, segments = problem(name)
  attend = functools.partial(attention, scale=0.1, segment_ids=segments if packed else None, window=window)
  ours = jax.jit(functools.partial(results, functools.partial(attend, implementation="pallas_gpu")))(*arrays)
  assert_close(ours, results(functools.partial(attend, implementation="xla"), *(x.astype(jnp.float32) for x in arrays)))


@NEEDS_JAX_0_11
@NEEDS_TOKAMAX
@pytest.mark.kernels
@pytest.mark.parametrize("window", [0, 100])
def test_parts_of_a_sequence_are_the_whole(window, on_cpu):
  (q, k, v, dy), segments = problem("mla")
  positions = zigzag(256, 2)

  def of_part(part, q, k, v):
    q_positions = jnp.asarray(positions)[part]
    ids = segments[:, q_positions], segments
    kwargs = {"scale": 0.1, "segment_ids": ids, "window": window, "implementation": "pallas_gpu"}
    return attention_of_part(q[:, q_positions], k, v, positions, part, **kwargs)

  ours = [
    jax.jit(
      lambda part, q, k, v, dy: results(functools.partial(of_part, part), q, k, v, dy[:, jnp.asarray(positions)[part]])
    )(part, q, k, v, dy)
    for part in range(2)
  ]
  order = np.argsort(positions.reshape(-1))
  y = jnp.concatenate([y for y, *_ in ours], 1)[:, order]
  gradients = (sum(x.astype(jnp.float32) for x in pair) for pair in zip(*(g for _, *g in ours), strict=True))
  whole = functools.partial(attention, scale=0.1, segment_ids=segments, window=window, implementation="xla")
  exact = results(whole, *(x.astype(jnp.float32) for x in (q, k, v, dy)))
  assert_close((y, *(x.astype(jnp.bfloat16) for x in gradients)), exact)


@NEEDS_JAX_0_11
@NEEDS_TOKAMAX
@pytest.mark.kernels
def test_inside_shard_map_the_gradients_of_shared_keys_add_up(monkeypatch):
  """With XLA's products in place of the kernels, which are interpreted for one device only."""
  from tokamax._src.ops.attention import pallas_mosaic_gpu_kernel_sm90 as forward
  from tokamax._src.ops.attention import pallas_mosaic_gpu_vjp_kernel_sm90 as backward

  def attended(starts, scale, *arrays):
    seen = jnp.tril(jnp.arange(starts.size) >= starts[0][:, None])
    return xla.masked_attention(seen, *(x[None] for x in arrays), scale=scale)[0]

  def forwards(q, k, v, bias, mask, starts, ends, *, logits_scale, **_):
    assert not jax.typeof(q).manual_axis_type.varying
    return attended(starts, logits_scale, q, k, v), (jnp.zeros(q.shape[1::-1]),) * 2

  def backwards(q, k, v, softmax, y, dy, bias, mask, starts, ends, *, logits_scale, **_):
    return *jax.vjp(functools.partial(attended, starts, logits_scale), q, k, v)[1](dy), None

  monkeypatch.setattr(forward, "flash_attention_kernel", forwards)
  monkeypatch.setattr(backward, "flash_attention_vjp_kernel", backwards)
  (q, k, v, dy), segments = problem("gqa")
  mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,), devices=jax.devices()[:2])

  def of_shared(attend, q, k, v, dy, segments):
    def attended(q, k, v):
      k, v = (jnp.broadcast_to(x, (len(q), *x.shape[1:])) for x in (k, v))
      return attend(q, k, v, scale=0.1, segment_ids=segments)

    return results(attended, q, k, v, dy)

  arguments = q, k[:1], v[:1], dy, segments
  exact = of_shared(
    functools.partial(attention, implementation="xla"),
    *(x if x.dtype == jnp.int32 else x.astype(jnp.float32) for x in arguments),
  )
  with jax.set_mesh(mesh):
    by_rows, everywhere = jax.P("data"), jax.P()
    specs = by_rows, everywhere, everywhere, by_rows, by_rows
    local = functools.partial(of_shared, functools.partial(attention, implementation="pallas_gpu"))
    every = jax.shard_map(local, in_specs=specs, out_specs=(by_rows, by_rows, everywhere, everywhere))
    put = [jax.device_put(x, jax.NamedSharding(mesh, spec)) for x, spec in zip(arguments, specs, strict=True)]
    assert_close(jax.device_get(jax.jit(every)(*put)), exact)


@NEEDS_JAX_0_11
@NEEDS_TOKAMAX
@pytest.mark.kernels
@pytest.mark.parametrize("name", ["mla", "gqa"])
def test_traced_inside_shard_map_and_scan_and_checkpoint(name):
  """With types of varying arrays checked; keys are shared by the devices, so that their gradients are summed."""
  _, seq, heads, kv_heads, key, value = CASES[name]
  mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,), devices=jax.devices()[:2])

  def loss(q, k, v, segments):
    attend = functools.partial(attention, scale=0.1, segment_ids=segments, implementation="pallas_gpu")

    def layer(x, _):
      one = lambda x: x.at[..., :value].add(attend(x, *(jnp.broadcast_to(y, (len(x), *y.shape[1:])) for y in (k, v))))
      return jax.checkpoint(one)(x), None

    return jax.lax.psum((jax.lax.scan(layer, q, None, length=3)[0].astype(jnp.float32) ** 2).sum(), "data")

  with jax.set_mesh(mesh):
    by_rows, everywhere = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in (("data",), ()))
    array = jax.ShapeDtypeStruct
    arguments = [
      array((4, seq, heads, key), jnp.bfloat16, sharding=by_rows),
      array((1, seq, kv_heads, key), jnp.bfloat16, sharding=everywhere),
      array((1, seq, kv_heads, value), jnp.bfloat16, sharding=everywhere),
      array((4, seq), jnp.int32, sharding=by_rows),
    ]
    sharded = jax.shard_map(loss, in_specs=(jax.P("data"), jax.P(), jax.P(), jax.P("data")), out_specs=jax.P())
    lowered = jax.jit(jax.grad(sharded, argnums=(0, 1, 2))).trace(*arguments).lower(lowering_platforms=("cuda",))
  # Forward, the same again under checkpoint, and gradients of queries and of keys with values.
  text = lowered.as_text()
  assert text.count("custom_call @mosaic_gpu") == 4
  # The gradients of keys and of values are summed over devices.
  assert text.count("stablehlo.all_reduce") == 2


@NEEDS_JAX_0_11
def test_what_is_not_supported_is_an_error(monkeypatch):
  arrays, _ = problem("mla")
  named = functools.partial(attention, scale=1, implementation="pallas_gpu")
  monkeypatch.setattr(pallas_gpu, "installed_tokamax", lambda: None)
  with pytest.raises(Unsupported, match="here is none: pip install 'tokamax==0.0.17'"):
    named(*arrays[:3])
  monkeypatch.setattr(pallas_gpu, "installed_tokamax", lambda: pallas_gpu.TOKAMAX_VERSION)
  with pytest.raises(Unsupported, match="for bfloat16, not float32"):
    named(*(x.astype(jnp.float32) for x in arrays[:3]))
  with pytest.raises(Unsupported, match="multiple of 128 positions on each device, not 100"):
    named(*(x[:, :100] for x in arrays[:3]))
  with pytest.raises(Unsupported, match="widths up to .192, 128., not 192 and 192"):
    named(arrays[0], arrays[1], arrays[1])
