"""Checkpoints from Hugging Face's format to ours and back: values, refusals, interruptions, and runs from them."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import deepseek_jax
from deepseek_jax.checkpoint import chunks, hf_files, manifest
from deepseek_jax.checkpoint.__main__ import main
from deepseek_jax.checkpoint.arrays import ArrayWriter, open_arrays
from deepseek_jax.checkpoint.chunks import shapes_and_chunks, tree_path
from deepseek_jax.checkpoint.convert import convert
from deepseek_jax.checkpoint.hf_config import to_hf_config
from deepseek_jax.checkpoint.hf_files import (
  DTYPES,
  FP8,
  FP8_BLOCK,
  SCALE_SUFFIX,
  HFReader,
  write_safetensors,
  write_tensors,
)
from deepseek_jax.checkpoint.hf_names import hf_tensors
from deepseek_jax.checkpoint.hf_tokenizer import copy_exported_files, exported_files
from deepseek_jax.checkpoint.manager import FORMAT_VERSION, Checkpointer, CheckpointReader
from deepseek_jax.checkpoint.weights import open_weights, saved_config
from deepseek_jax.config import Config
from deepseek_jax.config_sections import CheckpointConfig, DataConfig, MeshConfig, OptimizerConfig
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.errors import CheckpointError, ConfigError, DataError
from deepseek_jax.mesh import make_mesh
from deepseek_jax.model.transformer import init_params
from deepseek_jax.model_config import AttentionConfig
from deepseek_jax.sharding import with_concrete_shardings
from tests import configs

DENSE = dataclasses.replace(
  configs.DENSE, vocab=272, embed=16, mlp=24, attention=AttentionConfig(heads=4, kv_heads=2, head_dim=4)
)
V3 = dataclasses.replace(
  configs.V3, vocab=272, embed=16, mlp=24, compute_dtype="bfloat16",
  attention=dataclasses.replace(configs.MLA, heads=2, q_lora_rank=12),
  moe=dataclasses.replace(configs.MOE, num_routed_experts=4, num_shared_experts=2, mlp=12, num_expert_groups=2, topk_groups=1,
                          num_experts_per_token=2, route_scale=1.0),
)  # fmt: skip
MODELS = {"v3": V3, "dense": DENSE, "tied": dataclasses.replace(DENSE, tied_embeddings=True)}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def make_tensors(model, dtype=BFLOAT16):
  """{name: array} of a checkpoint; the names of one array, where it has several, hold the same."""
  rng, made, tensors = np.random.default_rng(0), {}, {}
  for entry in sorted(hf_tensors(model), key=lambda e: e.is_copy):
    if not entry.is_copy:
      kind = np.float32 if entry.buffer else dtype
      made[entry.path, entry.index] = (rng.standard_normal(entry.shape) * 0.1).astype(kind)
    tensors[entry.name] = made[entry.path, entry.index]
  return tensors


def write(folder, model, tensors):
  table = [(n, a.shape, a.dtype) for n, a in tensors.items()]
  write_tensors(folder, table, tensors.__getitem__, config=to_hf_config(model, "bfloat16"))
  return folder


def write_config(folder, model, original=None):
  folder.mkdir(exist_ok=True)
  (folder / "config.json").write_text(json.dumps(to_hf_config(model, "bfloat16", original)))


def write_damaged(folder, model, tensors):
  """As `write`, which refuses what is not finite."""
  write_config(folder, model)
  table = [(n, a.shape, a.dtype) for n, a in tensors.items()]
  write_safetensors(folder / "model.safetensors", table, tensors.__getitem__)
  return folder


@pytest.fixture
def small_chunks(monkeypatch):
  """Cuts even small matrices."""
  monkeypatch.setattr(chunks, "MAX_CHUNK_BYTES", 600)


def stacked(model, tensors):
  """{path: float32 array of ours}, put together from whole tensors in memory."""
  arrays = {path: np.full(shape, np.nan, np.float32) for path, (shape, _) in shapes_and_chunks(model).items()}
  for entry in hf_tensors(model):
    if not entry.is_copy:
      arrays[tree_path(entry)][entry.index] = entry.to_param(tensors[entry.name].astype(np.float32))
  return arrays


def abstract_weights(model, mesh):
  shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  return dict(zip(("params", "buffers"), with_concrete_shardings(shapes, mesh), strict=True))


def flat(tree):
  return {tuple(key.key for key in path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def restored(workdir, model):
  """{path: array} of step 0, read by Orbax onto a mesh of four devices."""
  mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2 if model.moe.num_routed_experts else 1, tensor=-1))
  with jax.set_mesh(mesh):
    return flat(CheckpointReader(workdir).restore(0, abstract_weights(model, mesh)))


def assert_equal(got, want):
  assert got.keys() == want.keys()
  for name in want:
    assert got[name].dtype == want[name].dtype and got[name].tobytes() == want[name].tobytes(), name


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(tmp_path, name, small_chunks, monkeypatch):
  monkeypatch.setattr(hf_files, "MAX_FILE_BYTES", 4000)
  model, tensors = MODELS[name], make_tensors(MODELS[name])
  source = write(tmp_path / "hf", model, tensors)
  assert len(list(source.glob("*.safetensors"))) > 2
  convert(source, tmp_path / "ours")
  reader = CheckpointReader(tmp_path / "ours")
  assert reader.latest() == 0 and reader.meta(0)["weights_only"]
  config = saved_config(reader, 0)
  assert config.model == dataclasses.replace(model, compute_dtype="bfloat16") and config.data.tokenizer == "none"
  assert_equal(restored(tmp_path / "ours", model), stacked(model, tensors))
  chunk_shapes = {path: a.chunk_layout.read_chunk.shape for path, a in open_arrays(reader.state_folder(0)).items()}
  assert all(
    4 * np.prod(chunk) <= 1200 for chunk in chunk_shapes.values()
  )  # a row of a matrix may be longer than a chunk
  convert(tmp_path / "ours", tmp_path / "back", dtype="bfloat16")
  back = HFReader(tmp_path / "back")
  assert_equal({name: back.read(name) for name in back.names}, tensors)
  index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())["weight_map"]
  assert index.keys() == tensors.keys()
  files = {path.name for path in (tmp_path / "back").glob("*.safetensors")}
  assert set(index.values()) == files and len(files) > 2 and not list((tmp_path / "back").glob("*.tmp"))
  assert set(deepseek_jax.load_pretrained(tmp_path / "back").params) >= {"embed", "final_norm"}
  convert(tmp_path / "back", tmp_path / "again")
  assert_equal(restored(tmp_path / "again", model), stacked(model, tensors))


def test_float32_is_the_default_of_the_way_back(tmp_path):
  tensors = make_tensors(V3, np.float32)
  convert(write(tmp_path / "hf", V3, tensors), tmp_path / "ours")
  convert(tmp_path / "ours", tmp_path / "back")
  back = HFReader(tmp_path / "back")
  assert_equal({name: back.read(name) for name in back.names}, tensors)


@pytest.mark.parametrize("chunk_bytes", [1 << 26, 5000])
def test_fp8_with_partial_blocks(tmp_path, monkeypatch, chunk_bytes):
  monkeypatch.setattr(chunks, "MAX_CHUNK_BYTES", chunk_bytes)
  model = dataclasses.replace(DENSE, mlp=200, embed=136)
  tensors, rng = make_tensors(model), np.random.default_rng(1)
  wanted = dict(tensors)
  for name in [n for n in tensors if "mlp" in n]:
    rows, columns = tensors[name].shape
    scale = rng.uniform(0.5, 2, (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))).astype(np.float32)
    tensors[name], tensors[name + SCALE_SUFFIX] = tensors[name].astype(DTYPES[FP8]), scale
    wanted[name] = tensors[name].astype(np.float32) * scale.repeat(FP8_BLOCK, 0).repeat(FP8_BLOCK, 1)[:rows, :columns]
  convert(write(tmp_path / "hf", model, tensors), tmp_path / "ours")
  assert_equal(restored(tmp_path / "ours", model), stacked(model, wanted))


@pytest.mark.parametrize("shape", [(1, 2, 2), (2, 1, 2), (2, 2, 1)], ids=str)
def test_weights_are_placed_on_a_mesh_as_they_are_read(tmp_path, shape):
  tensors = make_tensors(V3)
  source = write(tmp_path / "hf", V3, tensors)
  convert(source, tmp_path / "ours")
  mesh = make_mesh(MeshConfig(data=1, fsdp=shape[0], expert=shape[1], tensor=shape[2]))
  with jax.set_mesh(mesh):
    wanted = abstract_weights(V3, mesh)
    for folder in (source, tmp_path / "ours"):
      weights = open_weights(folder)
      assert weights.model == V3
      arrays = weights.load(wanted)
      assert jax.tree.map(lambda a: a.sharding, arrays) == jax.tree.map(lambda a: a.sharding, wanted)
      assert_equal(flat(arrays), stacked(V3, tensors))


def test_all_that_is_wrong_is_in_one_error_and_nothing_is_left(tmp_path):
  tensors = make_tensors(V3)
  missing, misshaped = "model.layers.1.mlp.experts.2.up_proj.weight", "model.layers.0.self_attn.o_proj.weight"
  del tensors[missing]
  tensors[misshaped] = tensors[misshaped][:-1]
  tensors["model.layers.1.extra.weight"] = np.ones(3, np.float32)
  infinite, nan = "model.norm.weight", "model.layers.2.mlp.gate.weight"
  tensors[infinite][3], tensors[nan][1, 2] = np.inf, np.nan
  source = write_damaged(tmp_path / "hf", V3, tensors)
  with pytest.raises(CheckpointError) as caught:
    convert(source, tmp_path / "ours")
  for name in (missing, misshaped, "model.layers.1.extra.weight", infinite, nan):
    assert str(caught.value).count(name) == 1
  assert os.listdir(tmp_path) == ["hf"]


def test_every_tensor_that_is_not_finite_is_listed_although_they_are_read_once(tmp_path, small_chunks):
  tensors = make_tensors(V3)
  bad = ["model.embed_tokens.weight", "model.layers.1.mlp.experts.3.down_proj.weight", "lm_head.weight"]
  for name in bad:
    tensors[name] = tensors[name].copy()
    tensors[name][-1, -1] = np.nan
  source = write_damaged(tmp_path / "hf", V3, tensors)
  with pytest.raises(CheckpointError) as caught:
    convert(source, tmp_path / "ours")
  assert all(name in str(caught.value) for name in bad) and os.listdir(tmp_path) == ["hf"]
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  with jax.set_mesh(mesh), pytest.raises(CheckpointError) as caught:
    open_weights(source).load(abstract_weights(V3, mesh))
  assert all(name in str(caught.value) for name in bad)


def save_ours(workdir, model, arrays, steps=(7,)):
  """A checkpoint as a run saves it, of {path: array} and something that is no weight."""
  state = {"step": jnp.zeros(()), "params": {}, "buffers": {}}
  for path, array in arrays.items():
    node = state
    for name in path[:-1]:
      node = node.setdefault(name, {})
    node[path[-1]] = jnp.asarray(array)
  config = Config(model=model)
  meta = {"format_version": FORMAT_VERSION, "config": dataclasses.asdict(config), "samples": 8}
  with Checkpointer(workdir, CheckpointConfig()) as checkpointer:
    for step in steps:
      checkpointer.save(step, state, meta)
  return workdir


def test_a_checkpoint_of_a_run_becomes_a_folder_of_hugging_face(tmp_path, small_chunks):
  tensors = make_tensors(V3)
  workdir = save_ours(tmp_path / "run", V3, stacked(V3, tensors))
  chunk_shapes = {
    p: a.chunk_layout.read_chunk.shape for p, a in open_arrays(CheckpointReader(workdir).state_folder(7)).items()
  }
  assert chunk_shapes["params", "moe_layers", "moe", "experts", "gate", "kernel"] == (
    1,
    1,
    16,
    12,
  )  # not the whole array
  assert chunk_shapes["params", "moe_layers", "attn", "q_b", "kernel"] == (1, 12, 2, 12)
  convert(workdir, tmp_path / "hf", "bfloat16")
  config = json.loads((tmp_path / "hf" / "config.json").read_text())
  assert (config["bos_token_id"], config["eos_token_id"]) == (256, 256)  # the tokenizer of the run: byte
  back = HFReader(tmp_path / "hf")
  assert_equal({name: back.read(name) for name in back.names}, tensors)


def test_the_model_is_that_of_an_older_step_where_the_newest_is_damaged(tmp_path):
  arrays = stacked(DENSE, make_tensors(DENSE))
  save_ours(tmp_path, DENSE, arrays, steps=(7, 8))
  newest = tmp_path / "checkpoints" / "8"
  (newest / "meta" / "metadata").write_text("damaged")
  weights, mesh = open_weights(tmp_path), make_mesh(MeshConfig(data=1), jax.devices()[:1])
  assert weights.model == DENSE
  with jax.set_mesh(mesh):
    assert_equal(flat(weights.load(abstract_weights(DENSE, mesh))), arrays)
    (newest / "meta" / "metadata").write_text(json.dumps({"format_version": FORMAT_VERSION + 1}))
    manifest.write_manifest(newest)
    with pytest.raises(CheckpointError, match="update deepseek_jax"):  # it is whole, and not for this code
      open_weights(tmp_path).load(abstract_weights(DENSE, mesh))
  (tmp_path / "checkpoints" / "7" / "meta" / "metadata").write_text("damaged too")
  with pytest.raises(CheckpointError, match="7/meta/metadata is not the JSON"):
    open_weights(tmp_path)


def test_a_checkpoint_of_a_run_that_does_not_fit_its_config_or_is_not_finite(tmp_path):
  arrays = stacked(DENSE, make_tensors(DENSE))
  arrays["params", "dense_layers", "mlp", "up", "kernel"][1, 2, 3] = np.inf
  arrays["params", "embed"][5] = np.nan
  with pytest.raises(CheckpointError, match=r"embed_tokens\.weight, model\.layers\.1\.mlp\.up_proj\.weight"):
    convert(save_ours(tmp_path / "a", DENSE, arrays), tmp_path / "hf")
  del arrays["params", "embed"]
  arrays["params", "more"] = arrays["params", "final_norm", "scale"]
  arrays["params", "head", "kernel"] = arrays["params", "head", "kernel"][:3]
  with pytest.raises(
    CheckpointError, match=r"3 arrays differ\n  params/embed: missing.*\n  params/head.*\n  params/more"
  ):
    convert(save_ours(tmp_path / "b", DENSE, arrays), tmp_path / "hf")
  assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_kinds_are_told_by_content(tmp_path):
  (tmp_path / "empty").mkdir()
  with pytest.raises(CheckpointError, match=r"is no checkpoint: expected a Hugging Face folder.* or the workdir"):
    convert(tmp_path / "empty", tmp_path / "to")
  (tmp_path / "empty" / "checkpoints").mkdir()
  with pytest.raises(CheckpointError, match="has no checkpoint"):
    convert(tmp_path / "empty", tmp_path / "to")
  write_config(tmp_path / "hf", DENSE)
  (tmp_path / "hf" / "pytorch_model.bin").write_bytes(b"")
  with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle"):
    convert(tmp_path / "hf", tmp_path / "to")


def test_the_target_is_new_or_empty(tmp_path):
  source = write(tmp_path / "hf", DENSE, make_tensors(DENSE))
  (tmp_path / "to").mkdir()
  (tmp_path / "to" / "note.txt").write_text("mine")
  with pytest.raises(CheckpointError, match="not an empty folder"):
    convert(source, tmp_path / "to")
  assert os.listdir(tmp_path / "to") == ["note.txt"]
  (tmp_path / "to" / "note.txt").unlink()
  convert(source, tmp_path / "to")
  assert sorted(os.listdir(tmp_path / "to")) == ["checkpoints", "config.json", "hugging_face"]
  assert sorted(os.listdir(tmp_path)) == ["hf", "to"]


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
  source = write(tmp_path / "hf", DENSE, make_tensors(DENSE))
  convert(source, tmp_path / "ours")
  write_part, calls = ArrayWriter.write, []

  def interrupted(*arguments):
    calls.append(arguments)
    if len(calls) == 6:
      raise KeyboardInterrupt
    write_part(*arguments)

  monkeypatch.setattr(ArrayWriter, "write", interrupted)
  with pytest.raises(KeyboardInterrupt):
    convert(source, tmp_path / "to")
  assert sorted(os.listdir(tmp_path)) == ["hf", "ours"]


def test_nothing_is_written_after_an_error(tmp_path):
  value = np.ones((1, 1 << 19), np.float32)
  with (
    pytest.raises(KeyboardInterrupt),
    ArrayWriter(tmp_path / "state", {("a",): ((48, 1 << 19), value.shape)}) as writer,
  ):
    for row in range(48):
      writer.write(("a",), slice(row, row + 1), value)
    raise KeyboardInterrupt
  chunks = [path for path in (tmp_path / "state" / "a").iterdir() if path.name[0].isdigit()]
  assert [path.stat().st_size for path in chunks] == [value.nbytes] * 48


KILLED = """
import os, signal, sys
from deepseek_jax.checkpoint.__main__ import main
from deepseek_jax.checkpoint.hf_files import HFReader
read, calls = HFReader.read, []
def killed(*arguments):
  calls.append(arguments)
  if len(calls) == 6:
    os.kill(os.getpid(), signal.SIGKILL)
  return read(*arguments)
HFReader.read = killed
main(sys.argv)
"""


def test_a_killed_conversion_leaves_no_target(tmp_path):
  source = write(tmp_path / "hf", DENSE, make_tensors(DENSE))
  arguments = ["convert", f"--from={source}", f"--to={tmp_path / 'to'}"]
  assert subprocess.run([sys.executable, "-c", KILLED, *arguments]).returncode == -signal.SIGKILL
  assert sorted(os.listdir(tmp_path)) == ["hf", "to.partial"]
  with pytest.raises(CheckpointError, match=r"to\.partial exists: a conversion is running, or was killed"):
    main(["checkpoint", *arguments])


@pytest.mark.parametrize(
  ("vocab", "flag", "wanted"),
  [(102400, "", "deepseek-llm"), (129280, "", "deepseek-v3"), (300, "", "none"), (102400, "byte", "byte"),
   (102400, "none", "none"), (100, "", "none")],
)  # fmt: skip
def test_the_tokenizer_of_a_converted_checkpoint(tmp_path, capsys, vocab, flag, wanted):
  model = dataclasses.replace(DENSE, vocab=vocab, embed=2)
  source = write(tmp_path / "hf", model, make_tensors(model))
  convert(source, tmp_path / "ours", tokenizer=flag)
  note = f"note     {source} has no tokenizer.json: data.tokenizer={wanted}"
  assert (note in capsys.readouterr().out) == (not flag)
  assert json.loads((tmp_path / "ours" / "config.json").read_text())["data"]["tokenizer"] == wanted


def write_tokenizer(folder, vocab, specials=("<s>", "</s>"), **config):
  """A tokenizer.json of `vocab` words, and the tokenizer_config.json `config`, if there is one."""
  tokenizers = pytest.importorskip("tokenizers")
  folder.mkdir(exist_ok=True)
  names = [*specials, *(f"w{i}" for i in range(vocab - len(specials)))]
  made = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[-1])
  )
  made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  made.add_special_tokens(list(specials))
  made.save(str(folder / "tokenizer.json"))
  if config:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return folder / "tokenizer.json"


def test_what_lies_beside_the_weights_goes_with_them(tmp_path):
  source = write(tmp_path / "hf", DENSE, make_tensors(DENSE))
  write_config(source, DENSE, {"bos_token_id": 7, "eos_token_id": [8, 9], "max_position_embeddings": 99})
  files = (
    "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "special_tokens_map.json",
    "added_tokens.json", "tokenizer.model", "vocab.json", "merges.txt", "additional_chat_templates/tools.jinja",
    "configuration_deepseek.py", "modeling_deepseek.py", "tokenization_deepseek_fast.py",
  )  # fmt: skip
  (source / "additional_chat_templates").mkdir()
  for name in files:
    (source / name).write_text(f'{{"name": "{name}"}}')
  convert(source, tmp_path / "ours")
  source.rename(tmp_path / "gone")
  tokenizer = json.loads((tmp_path / "ours" / "config.json").read_text())["data"]["tokenizer"]
  assert json.loads(pathlib.Path(tokenizer).read_text()) == {"name": "tokenizer.json"}
  convert(tmp_path / "ours", tmp_path / "back", "bfloat16")
  for name in ("config.json", *files):
    assert json.loads((tmp_path / "back" / name).read_text()) == json.loads((tmp_path / "gone" / name).read_text())
  # A tokenizer that was given takes the place of theirs.
  convert(tmp_path / "gone", tmp_path / "other", tokenizer="byte")
  convert(tmp_path / "other", tmp_path / "again")
  assert {name for name in files if (tmp_path / "again" / name).exists()} == {
    "configuration_deepseek.py",
    "modeling_deepseek.py",
  }
  again = json.loads((tmp_path / "again" / "config.json").read_text())
  assert (again["bos_token_id"], again["eos_token_id"], again["max_position_embeddings"]) == (256, 256, 99)


IDS = {"bos_token_id": 7, "eos_token_id": [8, 9], "pad_token_id": 3}


def ids_of(folder):
  return {key: value for key, value in json.loads((folder / "config.json").read_text()).items() if key.endswith("_id")}


def test_a_checkpoint_without_a_tokenizer_stays_without_one(tmp_path, capsys):
  from deepseek_jax.generate.__main__ import main as generate

  source, ours = write(tmp_path / "hf", DENSE, make_tensors(DENSE)), tmp_path / "ours"
  write_config(source, DENSE, IDS)
  assert main(["checkpoint", "convert", f"--from={source}", f"--to={ours}"]) == 0
  assert "generate takes one by --tokenizer, train by --config.data.tokenizer" in capsys.readouterr().out
  with pytest.raises(DataError, match="came without a tokenizer; give the one.*generate --tokenizer=") as caught:
    generate(["generate", f"--workdir={ours}", "--prompt=ab"])
  assert "\n" not in str(caught.value)
  with pytest.raises(DataError, match="train --config.data.tokenizer="):
    load_tokenizer(saved_config(CheckpointReader(ours), 0).data.tokenizer)
  convert(ours, tmp_path / "back")
  assert ids_of(tmp_path / "back") == IDS
  assert generate(["generate", f"--workdir={ours}", "--prompt=ab", "--max_tokens=3", "--tokenizer=byte"]) == 0
  assert "\nab" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("eos", "expected"),
  [("<8>", IDS), ("<2>", {"bos_token_id": 7, "eos_token_id": 2})],
  ids=("theirs", "another"),
)
def test_ids_of_special_tokens_are_kept_unless_the_tokenizer_has_others(tmp_path, eos, expected):
  source = write(tmp_path / "hf", DENSE, make_tensors(DENSE))
  write_config(source, DENSE, IDS)
  specials = [f"<{i}>" for i in range(10)]
  file = write_tokenizer(tmp_path / "files", 20, specials, bos_token="<7>", eos_token=eos)
  file.rename(file.with_name("mine.json"))
  convert(source, tmp_path / "ours", tokenizer=str(file.with_name("mine.json")))
  convert(tmp_path / "ours", tmp_path / "back")
  assert ids_of(tmp_path / "back") == expected
  assert (tmp_path / "back" / "tokenizer.json").read_bytes() == file.with_name("mine.json").read_bytes()
  assert (tmp_path / "back" / "tokenizer_config.json").exists()


def test_a_tokenizer_that_is_not_the_models_is_refused(tmp_path):
  from deepseek_jax.generate.__main__ import main as generate

  source = write(tmp_path / "hf", DENSE, make_tensors(DENSE))
  large = write_tokenizer(tmp_path / "files", DENSE.vocab + 1)
  convert(source, tmp_path / "ours")
  with pytest.raises(
    ConfigError, match=f"has ids up to {DENSE.vocab} but model.vocab={DENSE.vocab}: raise model.vocab"
  ):
    generate(["generate", f"--workdir={tmp_path / 'ours'}", f"--prompt=w{DENSE.vocab - 2}", f"--tokenizer={large}"])
  before = sorted(os.listdir(tmp_path))
  missing, words = tmp_path / "nowhere.json", f"has ids up to {DENSE.vocab}, but the model has {DENSE.vocab} rows"
  for flag, kind, message in (
    (large, CheckpointError, words), (missing, DataError, "cannot read .*nowhere.json"), ("deepseek-v3", CheckpointError, "128814"),
  ):  # fmt: skip
    with pytest.raises(kind, match=message):
      main(["checkpoint", "convert", f"--from={source}", f"--to={tmp_path / 'to'}", f"--tokenizer={flag}"])
  (source / "tokenizer.json").write_bytes(large.read_bytes())
  with pytest.raises(CheckpointError, match=words):
    convert(source, tmp_path / "to")
  assert sorted(os.listdir(tmp_path)) == before


def test_a_flag_of_the_other_direction_is_refused(tmp_path):
  source = write(tmp_path / "hf", DENSE, make_tensors(DENSE))
  convert(source, tmp_path / "ours")
  (tmp_path / "args.json").write_text("{}")
  for flags, message in (
    ((f"--from={source}", "--dtype=bfloat16"), "--dtype=bfloat16 is for a new Hugging Face folder"),
    ((f"--from={tmp_path / 'ours'}", "--tokenizer=byte"), "--tokenizer=byte is for a new workdir"),
    ((f"--from_model_args={tmp_path / 'args.json'}", "--tokenizer=byte"), "takes no --dtype and no --tokenizer"),
  ):
    with pytest.raises(ConfigError, match=message):
      main(["checkpoint", "convert", *flags, f"--to={tmp_path / 'to'}"])
  assert not (tmp_path / "to").exists()


def test_a_hugging_face_folder_is_no_workdir(tmp_path, text):
  from deepseek_jax.generate.__main__ import main as generate

  source = write(tmp_path / "hf", DENSE, make_tensors(DENSE))
  before = (source / "config.json").read_bytes()
  with pytest.raises(ConfigError, match="is a Hugging Face folder.*--config.init_from="):
    run(text, source)
  with pytest.raises(ConfigError, match="is a Hugging Face folder: make a workdir of it first, .* convert --from="):
    generate(["generate", f"--workdir={source}"])
  assert (source / "config.json").read_bytes() == before


def test_what_does_not_fit_together_in_a_folder_is_noted(tmp_path, capsys):
  source = write(tmp_path / "hf", DENSE, make_tensors(DENSE))
  write_config(source, DENSE, {"bos_token_id": 0, "eos_token_id": 5})
  write_tokenizer(source, 20, bos_token="<s>", eos_token="</s>", add_bos_token=False)
  convert(source, tmp_path / "ours")
  out = capsys.readouterr().out
  assert "eos_token_id=5 in config.json, but 1 by the tokenizer" in out and "bos_token_id=" not in out
  assert "add_bos_token=false" in out
  convert(tmp_path / "ours", tmp_path / "back")
  assert ids_of(tmp_path / "back") == {"bos_token_id": 0, "eos_token_id": 5}
  (source / "tokenizer_config.json").write_text('{"bos_token": "<none>"}')
  convert(source, tmp_path / "other")
  assert "cannot be loaded here: bos_token='<none>' in " in capsys.readouterr().out


def test_prompts_of_a_converted_checkpoint_begin_as_its_tokenizer_says(tmp_path, capsys, monkeypatch):
  from deepseek_jax.generate import __main__ as generate

  source, calls = write(tmp_path / "hf", DENSE, make_tensors(DENSE)), []

  def sample(saved, tokenizer, *arguments):
    calls.append(saved.add_bos(tokenizer))
    return ""

  monkeypatch.setattr(generate, "sample_from_checkpoint", sample)
  for value in (False, True):
    write_tokenizer(source, 20, bos_token="<s>", eos_token="</s>", add_bos_token=value)
    convert(source, tmp_path / str(value))
    generate.main(["generate", f"--workdir={tmp_path / str(value)}", "--prompt=w1"])
    assert ("the prompt begins without bos" in capsys.readouterr().err) == (not value)
  assert calls == [False, True]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  folder = tmp_path_factory.mktemp("text")
  for i in range(12):
    (folder / f"{i}.txt").write_text(f"def f{i}(x): return x + {i}\n" * 40)
  return folder


def run(text, workdir, model=DENSE, **fields):
  """Trains on four devices; returns the lines of metrics.jsonl."""
  from deepseek_jax.evaluate.heldout import evaluate
  from deepseek_jax.training import loop

  tree = Config(
    model=model, data=DataConfig(sources=(str(text),), cache=str(text / "cache"), seq=16, heldout_fraction=0.2)
  )
  steps = fields.pop("steps", 2)
  config = dataclasses.replace(
    tree,
    train=dataclasses.replace(tree.train, steps=steps, global_batch=4),
    mesh=MeshConfig(data=1, fsdp=2, tensor=2),
    log=dataclasses.replace(tree.log, every=1, tensorboard=False),
    eval=dataclasses.replace(tree.eval, final_sequences=4),
    **fields,
  )
  assert loop.run(config, str(workdir), evaluate, lambda *arguments: "", lambda *arguments: ([], [])) == 0
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_training_starts_from_weights_of_either_kind(tmp_path, text, capsys):
  source = write(tmp_path / "hf", DENSE, make_tensors(DENSE))
  convert(source, tmp_path / "ours")
  from_hf = run(text, tmp_path / "a", init_from=str(source))
  out = capsys.readouterr().out
  assert "start    from the weights in" in out and "has another tokenizer" not in out
  from_ours = run(text, tmp_path / "b", init_from=str(tmp_path / "ours"))
  in_place = run(text, tmp_path / "ours")
  random = run(text, tmp_path / "c")
  losses = [[line["loss"] for line in lines] for lines in (from_hf, from_ours, in_place, random)]
  assert losses[0] == losses[1] == losses[2] != losses[3]
  assert [line["samples"] for line in in_place] == [4, 8]
  # What a run has itself goes before init_from, which is not even looked at.
  source.rename(tmp_path / "gone")
  capsys.readouterr()
  assert len(run(text, tmp_path / "a", init_from=str(source), steps=3)) == 3
  assert "resume   from the checkpoint of step 2" in capsys.readouterr().out
  # And a workdir that trained is one to start from, here for a part of the parameters and with another optimizer.
  optimizer = OptimizerConfig(kind="muon", trainable=("*/attn/*",))
  assert run(text, tmp_path / "d", init_from=str(tmp_path / "a"), optimizer=optimizer)[0]["loss"] < losses[0][0]
  with jax.set_mesh(mesh := make_mesh(MeshConfig(data=1), jax.devices()[:1])):
    wanted = abstract_weights(DENSE, mesh)
    old, new = (flat(open_weights(tmp_path / workdir).load(wanted)) for workdir in ("a", "d"))
  assert {path for path in old if (old[path] != new[path]).any()} == {path for path in old if "attn" in path}


def test_an_export_of_a_run_on_converted_weights_has_what_lay_beside_them(tmp_path, text, capsys):
  source = write(tmp_path / "hf", DENSE, make_tensors(DENSE))
  write_config(source, DENSE, IDS)
  specials = [f"<{i}>" for i in range(10)]
  write_tokenizer(source, 20, specials, bos_token="<7>", eos_token="<8>")
  for name in ("generation_config.json", "chat_template.jinja"):
    (source / name).write_text("{}")
  run(text, tmp_path / "bytes", init_from=str(source))
  assert f"note     {source} has another tokenizer than data.tokenizer=byte" in capsys.readouterr().out
  convert(tmp_path / "bytes", tmp_path / "back")
  assert ids_of(tmp_path / "back") == {"bos_token_id": 256, "eos_token_id": 256}
  convert(source, tmp_path / "ours")
  tokenizer = str(tmp_path / "ours" / "hugging_face" / "tokenizer.json")
  for number, beside in enumerate((tokenizer, str(source / "tokenizer.json"))):
    config = Config(model=DENSE, data=DataConfig(tokenizer=beside))
    original, copies = exported_files(tmp_path / "run", beside, config.model)
    (tmp_path / str(number)).mkdir()
    copy_exported_files(copies, beside, tmp_path / str(number))
    assert {key: original[key] for key in IDS} == IDS
    assert sorted(os.listdir(tmp_path / str(number))) == [
      "chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_weights_of_another_shape_are_refused_by_field(tmp_path, text):
  source = write(tmp_path / "hf", DENSE, make_tensors(DENSE))
  other = dataclasses.replace(DENSE, mlp=32, layers=3)
  with pytest.raises(
    CheckpointError, match=r"model\.layers: checkpoint 2, config 3; model\.mlp: checkpoint 24, config 32"
  ):
    run(text, tmp_path / "run", other, init_from=str(source))
  assert not (tmp_path / "run").exists()


def test_fields_that_no_array_depends_on_may_differ(tmp_path, text, capsys):
  source = write(tmp_path / "hf", DENSE, make_tensors(DENSE))
  run(text, tmp_path / "run", dataclasses.replace(DENSE, norm_eps=1e-5), init_from=str(source))
  assert "changed  model.norm_eps: 1e-06 -> 1e-05" in capsys.readouterr().out
