"""Names and folders of Hugging Face checkpoints: one table both ways, checked reading, FP8, streamed writing."""

import dataclasses
import json
import pathlib

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from deepseek_jax.checkpoint.hf_files import HFReader, write_tensors
from deepseek_jax.checkpoint.hf_names import hf_tensors
from deepseek_jax.checkpoint.hf_tensor import HFTensor
from deepseek_jax.errors import CheckpointError
from tests import configs

V3 = dataclasses.replace(
  configs.V3, vocab=32, embed=24, mlp=20,
  attention=dataclasses.replace(configs.MLA, heads=2, q_lora_rank=10, kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=3),
  moe=dataclasses.replace(configs.MOE, num_routed_experts=4, num_shared_experts=2, mlp=5, num_expert_groups=1, topk_groups=1),
)  # fmt: skip
F32 = np.dtype(np.float32)


def random(shape, seed=0):
  return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


def save(folder, tensors, **kwargs):
  """`tensors`: name -> array of any dtype."""
  write_tensors(folder, [(name, a.shape, a.dtype) for name, a in tensors.items()], tensors.__getitem__, **kwargs)


def wanted(**shapes):
  return [HFTensor(name, (), (), shape, shape) for name, shape in shapes.items()]


def test_names_of_v3():
  table = {entry.name: entry for entry in hf_tensors(V3)}
  assert len(table) == len(hf_tensors(V3))
  expert = table["model.layers.2.mlp.experts.3.down_proj.weight"]
  assert (expert.path, expert.index) == (("moe_layers", "moe", "experts", "down", "kernel"), (1, 3))
  assert (expert.shape, expert.param_shape) == ((24, 5), (5, 24))
  output = table["model.layers.0.self_attn.o_proj.weight"]
  assert (output.path, output.index, output.param_shape) == (("dense_layers", "attn", "o", "kernel"), (0,), (2, 3, 24))
  assert table["model.layers.3.eh_proj.weight"].param_shape == (48, 24)
  assert table["model.layers.3.mlp.gate.e_score_correction_bias"].path == (
    "mtp_layers",
    "block",
    "moe",
    "router",
    "bias",
  )
  assert [name for name, entry in table.items() if entry.is_copy] == [
    "model.layers.3.embed_tokens.weight",
    "model.layers.3.shared_head.head.weight",
  ]
  assert "lm_head.weight" in table and "lm_head.weight" not in {
    e.name for e in hf_tensors(dataclasses.replace(V3, tied_embeddings=True))
  }


def test_both_directions_are_inverse_and_transpose():
  for entry in hf_tensors(V3):
    tensor = random(entry.shape)
    ours = entry.to_param(tensor)
    assert ours.shape == entry.param_shape
    np.testing.assert_array_equal(entry.to_hf(ours), tensor)
  query = next(e for e in hf_tensors(V3) if e.name.endswith("0.self_attn.q_b_proj.weight"))
  tensor = random(query.shape)
  # Head 1's third row of [heads * width, latent] is [:, 1, 2] of [latent, heads, width].
  np.testing.assert_array_equal(query.to_param(tensor)[:, 1, 2], tensor[6 + 2])


@pytest.mark.parametrize("max_file_bytes", [10**9, 300])
def test_folders_come_back_bit_by_bit(tmp_path, max_file_bytes):
  tensors = {
    "a": random((8, 9)),
    "b": random((3, 5, 7)).astype(ml_dtypes.bfloat16),
    "c": random((6,)).astype(np.float64),
    "d": random((4, 4)).astype(np.float16),
    "e": random((40, 9)),
  }
  save(tmp_path, tensors, max_file_bytes=max_file_bytes)
  reader = HFReader(tmp_path)
  assert sorted(reader.names) == sorted(tensors)
  for name, array in tensors.items():
    assert (reader.shape(name), reader.dtype(name)) == (array.shape, array.dtype)
    assert reader.read(name).tobytes() == array.tobytes()
    np.testing.assert_array_equal(reader.read(name, slice(2, 4)), array[2:4])
  files = sorted(path.name for path in tmp_path.iterdir())
  if max_file_bytes == 10**9:
    assert files == ["model.safetensors"]
  else:
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in tensors.values())
    assert index["weight_map"]["a"] == "model-00001-of-00003.safetensors" and len(files) == 4
  with safe_open(tmp_path / files[0], "np") as file:
    assert file.metadata() == {"format": "pt"}
    np.testing.assert_array_equal(file.get_tensor("a"), tensors["a"])


def test_a_new_save_replaces_the_old_one_only_when_it_is_whole(tmp_path):
  save(tmp_path, {"a": random((8, 8)), "b": random((8, 8))}, max_file_bytes=256)
  before = sorted(tmp_path.iterdir())

  def fails(name):
    raise RuntimeError("disk")

  with pytest.raises(RuntimeError):
    write_tensors(tmp_path, [("a", (8, 8), F32)], fails)
  assert sorted(HFReader(tmp_path).names) == ["a", "b"] and sorted(tmp_path.iterdir()) == before
  save(tmp_path, {"c": random((8, 8))})
  assert HFReader(tmp_path).names == ["c"]
  assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def fp8_checkpoint(folder, shape=(300, 130), **kwargs):
  rng = np.random.default_rng(0)
  quantized = rng.uniform(-400, 400, shape).astype(ml_dtypes.float8_e4m3fn)
  scale = rng.uniform(0.5, 2, tuple(-(-size // 128) for size in shape)).astype(np.float32)
  save(folder, {"w.weight": quantized, "norm": random((4,)), "w.weight_scale_inv": scale}, **kwargs)
  return quantized, scale


@pytest.mark.parametrize("max_file_bytes", [10**9, 100])
def test_fp8_blocks_with_partial_edges(tmp_path, max_file_bytes):
  quantized, scale = fp8_checkpoint(tmp_path, max_file_bytes=max_file_bytes)
  reader = HFReader(tmp_path)
  reader.check_tensors(wanted(**{"w.weight": (300, 130), "norm": (4,)}))
  expected = np.empty((300, 130), np.float32)
  for i, j in np.ndindex(300, 130):
    expected[i, j] = np.float32(quantized[i, j]) * scale[i // 128, j // 128]
  assert reader.dtype("w.weight") == F32
  np.testing.assert_array_equal(reader.read("w.weight"), expected)
  np.testing.assert_array_equal(reader.read("w.weight", slice(100, 290)), expected[100:290])


def test_fp8_scales_are_checked(tmp_path):
  weight = np.ones((300, 130), ml_dtypes.float8_e4m3fn)
  save(tmp_path, {"w": weight, "w_scale_inv": np.ones((2, 2), np.float32), "v": weight})
  with pytest.raises(CheckpointError) as error:
    HFReader(tmp_path).check_tensors(wanted(w=(300, 130), v=(300, 130)))
  assert "1 missing, 1 of another shape" in str(error.value)
  assert "w_scale_inv ((2, 2) F32 where (3, 2)" in str(error.value) and "v_scale_inv" in str(error.value)


def test_one_error_lists_all_that_is_wrong(tmp_path):
  bad = random((3, 3))
  bad[1, 1] = np.nan
  worse = np.full((2,), np.inf, np.float32)
  counts = np.zeros((2,), np.int32)
  tensors = {"good": random((2, 2)), "nan": bad, "inf": worse, "shape": random((2, 3)), "extra": random((1,))}
  save_file(tensors | {"counts": counts}, tmp_path / "model.safetensors")
  reader = HFReader(tmp_path)
  shapes = {"good": (2, 2), "nan": (3, 3), "inf": (2,), "shape": (3, 2), "counts": (2,), "gone": (1,), "lost": (1,)}
  with pytest.raises(CheckpointError) as error:
    reader.check_tensors(wanted(**shapes))
  text = str(error.value)
  assert "2 missing, 1 not expected, 2 of another shape or dtype, 2 not finite" in text and str(tmp_path) in text
  for part in ("gone", "lost", "extra", "shape ((2, 3) where (3, 2)", "counts (dtype I32", "nan", "inf"):
    assert f"\n  {part}" in text
  assert "good" not in text


def test_non_finite_tensors_are_listed_after_reading(tmp_path):
  values = {name: np.array([value], np.float32) for name, value in zip("abc", (1, np.nan, np.inf), strict=True)}
  save_file(values, tmp_path / "model.safetensors")
  reader = HFReader(tmp_path)
  reader.check_tensors(wanted(a=(1,), b=(1,), c=(1,)))
  reader.check_finite()
  for name in "abcb":
    reader.read(name)
  with pytest.raises(CheckpointError, match="2 not finite") as error:
    reader.check_finite()
  assert "\n  b\n  c" in str(error.value)


def test_what_nobody_needs_is_neither_missing_nor_extra(tmp_path):
  copies = [HFTensor("model.layers.3.embed_tokens.weight", (), (), (2,), (2,), is_copy=True)]
  ignored = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": random((2,)),
    "mlp.shared_experts.up_proj.weight": random((0, 2)),
  }
  save(tmp_path, {"a": random((2,)), **ignored})
  HFReader(tmp_path).check_tensors(wanted(a=(2,)) + copies)


def write_index(folder, weight_map):
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
  "file", ["../model.safetensors", "/etc/model.safetensors", "sub/model.safetensors", "..\\m.safetensors"]
)
def test_the_index_stays_in_its_folder(tmp_path, file):
  write_index(tmp_path, {"a": file})
  with pytest.raises(CheckpointError, match="must lie in its own folder"):
    HFReader(tmp_path)


def test_an_index_that_cannot_be_read_is_one_line(tmp_path, monkeypatch):
  index = tmp_path / "model.safetensors.index.json"
  index.mkdir()
  with pytest.raises(CheckpointError, match=r"index\.json cannot be read: Is a directory; download it again$"):
    HFReader(tmp_path)
  index.rmdir()
  for content in (b"", b"[]", b'{"weight_map": 3}', b"\xff", b"[" * 100_000):
    index.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"index\.json is not an index with a weight_map: .*") as error:
      HFReader(tmp_path)
    assert "\n" not in str(error.value)

  def refuse(*arguments, **options):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr(pathlib.Path, "read_text", refuse)  # root may read every file
  with pytest.raises(CheckpointError, match=r"index\.json cannot be read: Permission denied"):
    HFReader(tmp_path)


def test_only_safetensors_are_read(tmp_path):
  write_index(tmp_path, {"a": "pytorch_model.bin"})
  (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
  with pytest.raises(CheckpointError, match="only safetensors"):
    HFReader(tmp_path)
  (tmp_path / "model.safetensors.index.json").unlink()
  with pytest.raises(CheckpointError, match=r"pytorch_model.bin is a pickle.*save it as safetensors"):
    HFReader(tmp_path)


def test_missing_folders_files_and_damage(tmp_path):
  with pytest.raises(CheckpointError, match="not a folder"):
    HFReader(tmp_path / "nowhere")
  with pytest.raises(CheckpointError, match="neither model.safetensors"):
    HFReader(tmp_path)
  write_index(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
  save_file({"a": random((2,))}, tmp_path / "model-1.safetensors")
  with pytest.raises(CheckpointError, match="not there: model-2.safetensors"):
    HFReader(tmp_path)
  save_file({"a": random((2,))}, tmp_path / "model-2.safetensors")
  with pytest.raises(CheckpointError, match="has a, and so has model-1"):
    HFReader(tmp_path)
  path = tmp_path / "model-2.safetensors"
  path.write_bytes(path.read_bytes()[:-3])
  with pytest.raises(CheckpointError, match="model-2.safetensors is not a complete safetensors file"):
    HFReader(tmp_path)
  (tmp_path / "model.safetensors.index.json").write_text("[1]")
  with pytest.raises(CheckpointError, match="not an index"):
    HFReader(tmp_path)
