"""The writers that a run opens, by name. `log.tensorboard` turns that of TensorBoard off."""

from deepseek_jax.training.expert_loads import ExpertLoadWriter
from deepseek_jax.training.metrics import JsonlWriter, TensorboardWriter, WriterFactory

WRITERS: dict[str, WriterFactory] = {
  "jsonl": JsonlWriter,
  "expert_loads": ExpertLoadWriter,
  "tensorboard": TensorboardWriter,
}
