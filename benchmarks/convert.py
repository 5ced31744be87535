"""Time and peak memory of converting a Hugging Face checkpoint to a workdir and back, each in a process of its own.

  python -m benchmarks.convert [--folder=DIR] [--vocab=129280] [--embed=2048] [--layers=3] [--experts=32]

Writes a random V3 checkpoint in bfloat16 (by default 4.1 GB; the workdir takes 6 GB), converts it there and back,
compares every tensor, and removes all files. The exit code is 1 if a tensor differs, or if a conversion takes more
memory than twice the largest tensor and 1 GiB.
"""

import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np
from absl import flags

from deepseek_jax.checkpoint.hf_config import to_hf_config
from deepseek_jax.checkpoint.hf_files import HFReader, write_tensors
from deepseek_jax.checkpoint.hf_names import hf_tensors
from deepseek_jax.console import format_bytes
from deepseek_jax.flags import parse, run_program
from deepseek_jax.model_config import AttentionConfig, ModelConfig, MoEConfig

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
MAXRSS_BYTES = {"linux": 1024, "darwin": 1}  # bytes per unit of ru_maxrss
# A child process inherits the peak memory of its parent, so conversions are started by this small process.
LAUNCHER = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def small_v3(vocab: int, embed: int, layers: int, experts: int) -> ModelConfig:
  """V3 with fewer layers and experts and a smaller width, with one layer for multi-token prediction."""
  return ModelConfig(
    vocab=vocab, embed=embed, layers=layers, first_dense_layers=1, num_mtp_layers=1, mlp=4 * embed,
    attention=AttentionConfig(
      kind="mla", heads=16, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
    ),
    moe=MoEConfig(
      num_routed_experts=experts, num_shared_experts=1, num_experts_per_token=8, mlp=1408, score="sigmoid",
      num_expert_groups=8, topk_groups=4, group_score="top2_sum", router_bias=True, norm_topk_prob=True, route_scale=2.5,
    ),
  )  # fmt: skip


def write_random_checkpoint(folder: pathlib.Path, config: ModelConfig) -> int:
  """Writes a Hugging Face checkpoint, one tensor at a time, router biases in float32.

  Returns bytes of the largest tensor.

  Copies of the embedding and the head are equal to the original.
  """
  entries_by_name = {entry.name: entry for entry in hf_tensors(config)}
  rng = np.random.default_rng(0)
  originals: dict[tuple, pathlib.Path] = {}  # {path in the tree: file with the tensor}

  def read(name):
    entry = entries_by_name[name]
    if entry.path in originals:
      return np.fromfile(originals[entry.path], BFLOAT16).reshape(entry.shape)
    tensor = (rng.standard_normal(entry.shape, np.float32) * 0.02).astype(np.float32 if entry.buffer else BFLOAT16)
    if not entry.index and len(entry.shape) > 1:  # embedding and head have copies
      originals[entry.path] = folder / f"{entry.path[0]}.copy"
      tensor.tofile(originals[entry.path])
    return tensor

  folder.mkdir()
  tensors = [(e.name, e.shape, np.dtype(np.float32) if e.buffer else BFLOAT16) for e in entries_by_name.values()]
  write_tensors(folder, tensors, read, 10**9, to_hf_config(config, "bfloat16"))
  for file in originals.values():
    file.unlink()
  return max(int(np.prod(shape)) * dtype.itemsize for _, shape, dtype in tensors)


def convert(source: pathlib.Path, target: pathlib.Path, *arguments: str) -> tuple[float, int]:
  """(seconds, peak resident bytes) of a conversion in a process of its own, with `arguments` of the program."""
  command = [sys.executable, "-m", "deepseek_jax.checkpoint", "convert", f"--from={source}", f"--to={target}"]
  start = time.monotonic()
  launch = [sys.executable, "-c", LAUNCHER, *command, *arguments]
  out = subprocess.run(launch, check=True, stdout=subprocess.PIPE, text=True).stdout
  return time.monotonic() - start, int(out.split()[-1]) * MAXRSS_BYTES[sys.platform]


def main(argv: list[str]) -> int:
  values = flags.FlagValues()
  flags.DEFINE_string("folder", None, "folder for temporary files; default: the system's", flag_values=values)
  flags.DEFINE_integer("vocab", 129_280, "rows of the embedding", lower_bound=2, flag_values=values)
  flags.DEFINE_integer("embed", 2048, "model width", lower_bound=1, flag_values=values)
  flags.DEFINE_integer("layers", 3, "layers, of which the first is dense", lower_bound=2, flag_values=values)
  flags.DEFINE_integer("experts", 32, "routed experts per layer, a multiple of 8", lower_bound=16, flag_values=values)
  parse(argv, values, __doc__)

  folder = pathlib.Path(tempfile.mkdtemp(dir=values.folder))
  try:
    original, workdir, exported = folder / "original", folder / "workdir", folder / "exported"
    largest = write_random_checkpoint(original, small_v3(values.vocab, values.embed, values.layers, values.experts))
    size = sum(path.stat().st_size for path in original.iterdir())
    limit = 2 * largest + 2**30
    print(f"checkpoint  {format_bytes(size)} in bfloat16, largest tensor {format_bytes(largest)}", flush=True)
    peaks = []
    for name, source, target, *arguments in (
      ("to workdir", original, workdir),
      ("and back", workdir, exported, "--dtype=bfloat16"),
    ):
      seconds, peak = convert(source, target, *arguments)
      peaks.append(peak)
      print(
        f"{name:12}{seconds:.1f} s, {format_bytes(size / seconds)}/s of bfloat16, peak memory {format_bytes(peak)} "
        f"({'' if peak < limit else 'TOO MUCH: '}{format_bytes(limit)} allowed: twice the largest tensor and 1 GiB)",
        flush=True,
      )
    before, after = HFReader(original), HFReader(exported)
    same = [before.read(name).tobytes() == after.read(name).tobytes() for name in before.names]
    print(f"compared    {sum(same)} of {len(same)} tensors are bitwise equal after the round trip")
    return 0 if all(same) and before.names == after.names and max(peaks) < limit else 1
  finally:
    shutil.rmtree(folder)


if __name__ == "__main__":
  run_program(main)
