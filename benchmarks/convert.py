"""Time and peak memory of converting a big checkpoint to a workdir of ours and back, each in a process of its own.

  python -m benchmarks.convert [--folder=DIR] [--vocab=129280] [--embed=2048] [--layers=3] [--experts=32]

Writes a random checkpoint of V3's form in bfloat16 first (the defaults: 4.1 GB; the workdir takes 6), compares
every tensor that comes back with the one that went in, and removes all of it. The exit code is 1 if one differs, or if a
conversion takes more memory than twice the largest tensor and 1 GiB.
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

from deepseek_jax.checkpoint.hf_config import to_json
from deepseek_jax.checkpoint.hf_files import HFReader, write_tensors
from deepseek_jax.checkpoint.hf_names import entries
from deepseek_jax.flags import parse, run_program
from deepseek_jax.model_config import AttentionConfig, ModelConfig, MoEConfig

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
MEMORY = {"linux": 1024, "darwin": 1}  # bytes in a unit of ru_maxrss
# A process that is started inherits the peak of the one that starts it: this one stays small.
LAUNCHER = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def model(vocab, embed, layers, experts):
  """V3 with fewer layers and experts, in a narrower stream, and with its layer for multi-token prediction."""
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


def write_random(folder, config):
  """A Hugging Face checkpoint of `config`, a tensor at a time; biases in float32, a copy equal to what it copies."""
  table = {entry.name: entry for entry in entries(config)}
  rng, copied = np.random.default_rng(0), {}

  def read(name):
    entry = table[name]
    if entry.path in copied:
      return np.fromfile(copied[entry.path], BFLOAT16).reshape(entry.shape)
    tensor = (rng.standard_normal(entry.shape, np.float32) * 0.02).astype(np.float32 if entry.buffer else BFLOAT16)
    if not entry.index and len(entry.shape) > 1:  # embedding and head have copies
      copied[entry.path] = folder / f"{entry.path[0]}.copy"
      tensor.tofile(copied[entry.path])
    return tensor

  folder.mkdir()
  tensors = [(e.name, e.shape, np.dtype(np.float32) if e.buffer else BFLOAT16) for e in table.values()]
  write_tensors(folder, tensors, read, 10**9, to_json(config, "bfloat16"))
  for file in copied.values():
    file.unlink()
  return max(np.prod(shape) * dtype.itemsize for _, shape, dtype in tensors)


def convert(source, target):
  """(seconds, peak resident bytes) of a conversion in its own process."""
  command = [sys.executable, "-m", "deepseek_jax.checkpoint", "convert", f"--from={source}", f"--to={target}"]
  started = time.monotonic()
  launch = [sys.executable, "-c", LAUNCHER, *command, "--dtype=bfloat16"]
  out = subprocess.run(launch, check=True, stdout=subprocess.PIPE, text=True).stdout
  return time.monotonic() - started, int(out.split()[-1]) * MEMORY[sys.platform]


def main(argv):
  values = flags.FlagValues()
  flags.DEFINE_string("folder", None, "where the files lie meanwhile; default: the system's", flag_values=values)
  flags.DEFINE_integer("vocab", 129_280, "rows of the embedding", lower_bound=2, flag_values=values)
  flags.DEFINE_integer("embed", 2048, "width of the stream", lower_bound=1, flag_values=values)
  flags.DEFINE_integer("layers", 3, "layers, of which the first is dense", lower_bound=2, flag_values=values)
  flags.DEFINE_integer("experts", 32, "routed experts of a layer, a multiple of 8", lower_bound=16, flag_values=values)
  parse(argv, values, __doc__)

  folder = pathlib.Path(tempfile.mkdtemp(dir=values.folder))
  try:
    hugging_face, ours, back = folder / "hugging_face", folder / "ours", folder / "back"
    largest = write_random(hugging_face, model(values.vocab, values.embed, values.layers, values.experts))
    size = sum(path.stat().st_size for path in hugging_face.iterdir())
    limit = 2 * largest + 2**30
    print(f"checkpoint  {size / 1e9:.2f} GB in bfloat16, largest tensor {largest / 1e9:.2f} GB", flush=True)
    peaks = []
    for name, source, target in (("to ours", hugging_face, ours), ("back", ours, back)):
      seconds, peak = convert(source, target)
      peaks.append(peak)
      print(
        f"{name:12}{seconds:.1f} s, {size / seconds / 1e6:.0f} MB/s of bfloat16, peak memory {peak / 1e9:.2f} GB "
        f"({'' if peak < limit else 'TOO MUCH: '}{limit / 1e9:.2f} GB allowed: twice the largest tensor and 1 GiB)",
        flush=True,
      )
    before, after = HFReader(hugging_face), HFReader(back)
    same = [before.read(name).tobytes() == after.read(name).tobytes() for name in before.names]
    print(f"compared    {sum(same)} of {len(same)} tensors came back with the same bytes")
    return 0 if all(same) and before.names == after.names and max(peaks) < limit else 1
  finally:
    shutil.rmtree(folder)


if __name__ == "__main__":
  run_program(main)
