"""What the devices have of what a config asks for: errors at the door, and one line where a kernel is not used."""

import dataclasses

import jax
import pytest

from deepseek_jax.config import Config
from deepseek_jax.config_sections import DataConfig, MeshConfig
from deepseek_jax.errors import ConfigError
from deepseek_jax.kernels import implementations
from deepseek_jax.mesh import abstract_mesh
from deepseek_jax.model.kernel_choice import attention_support, check_kernels, may_use_attention_kernel
from deepseek_jax.model_config import AttentionConfig, Fp8Config, ModelConfig, MoEConfig
from deepseek_jax.plan.memory import uses_fused_attention
from deepseek_jax.plan.topology import CHIPS

MOE = MoEConfig(num_routed_experts=4, num_experts_per_token=2, mlp=8, implementation="pallas")


def on(kind):
  """A context in which programs are traced for such a device."""
  device = jax.sharding.AbstractDevice(kind, 1, "gpu" if "NVIDIA" in kind else "tpu")
  return jax.sharding.use_abstract_mesh(abstract_mesh(MeshConfig(data=1), device))


def with_attention(**fields):
  return ModelConfig(attention=AttentionConfig(**fields))


@pytest.mark.parametrize(
  ("kind", "config", "message"),
  [
    ("NVIDIA A100", with_attention(implementation="pallas"), "attention.implementation=pallas: attention: no Pallas kernel for NVIDIA A100"),
    ("NVIDIA H200", dataclasses.replace(with_attention(implementation="pallas"), compute_dtype="float32"), "pallas: tokamax's attention is for bfloat16"),
    ("NVIDIA H200", ModelConfig(moe=MOE, compute_dtype="float32"), "moe.implementation=pallas: grouped matmuls on Hopper are for bfloat16"),
    ("NVIDIA H200", ModelConfig(precision="fp8", fp8=Fp8Config(block=256, implementation="pallas")), "fp8.implementation=pallas: .* tiles of 1 x 128"),
    ("TPU v4", ModelConfig(precision="fp8", fp8=Fp8Config(implementation="pallas")), "fp8.implementation=pallas: TPU v4 has no products"),
  ],
)  # fmt: skip
def test_a_named_kernel_that_cannot_do_the_config_is_an_error(kind, config, message):
  with on(kind), pytest.raises(ConfigError, match=message):
    check_kernels(config)


@pytest.mark.parametrize("kind", ["NVIDIA H200", "TPU v5", "TPU7x"])
def test_named_kernels_that_can_are_none(kind):
  with on(kind):
    check_kernels(with_attention(implementation="pallas"))
    check_kernels(ModelConfig(moe=MOE))
    check_kernels(ModelConfig(precision="fp8", moe=MOE, fp8=Fp8Config(implementation="pallas")))


def test_what_the_config_rules_out_is_logged_once_in_plain_words(monkeypatch, caplog):
  monkeypatch.setattr(implementations, "_fallbacks_logged", set())
  dropout, ring = AttentionConfig(dropout=0.1), AttentionConfig(kv_comm="ring")
  assert not may_use_attention_kernel(dropout, context_parallel=False) and not caplog.records  # no kernel on a CPU
  with on("TPU v5"):
    assert may_use_attention_kernel(ring, context_parallel=False)
    for _ in range(2):
      assert not may_use_attention_kernel(dropout, context_parallel=False)
      assert not may_use_attention_kernel(ring, context_parallel=True)
  assert [record.getMessage() for record in caplog.records] == [
    "attention: falling back to XLA: kernels have no dropout",
    f"attention: falling back to XLA: {attention_support(ring, context_parallel=True).reason}",
  ]


@pytest.mark.parametrize(
  ("chip", "fields", "seq", "context", "is_fused"),
  [
    ("v5p", {}, 256, 1, True), ("v5p", {}, 200, 1, False), ("v5p", {}, 256, 2, True), ("v5p", {}, 384, 2, False),
    ("v5p", {"kv_comm": "ring"}, 256, 2, False), ("v5p", {"dropout": 0.1}, 256, 1, False),
    ("h200", {}, 256, 1, False), ("h200", {"implementation": "pallas"}, 256, 1, True),
    ("h200", {"implementation": "pallas", "head_dim": 256}, 256, 1, False), ("a100", {}, 256, 1, False),
  ],
)  # fmt: skip
def test_the_plan_asks_the_kernels(chip, fields, seq, context, is_fused):
  config = Config(model=with_attention(**fields), data=DataConfig(seq=seq), mesh=MeshConfig(data=1, context=context))
  assert uses_fused_attention(config, CHIPS[chip].kind) == is_fused
