"""The notebook API on small random checkpoints: what is loaded, what comes out, what is saved, what is refused."""

import contextlib
import dataclasses
import errno
import importlib.metadata
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

import deepseek_jax
from deepseek_jax.checkpoint import hf_files
from deepseek_jax.checkpoint.convert import convert
from deepseek_jax.checkpoint.hf_files import HFReader, write_safetensors, write_tensors
from deepseek_jax.checkpoint.hf_model import to_model_config
from deepseek_jax.checkpoint.hf_names import hf_tensors
from deepseek_jax.checkpoint.weights import open_weights
from deepseek_jax.errors import CheckpointError, ConfigError
from deepseek_jax.model.router import limit_to_groups

pytestmark = pytest.mark.jax_version

SHAPE = {
  "vocab_size": 40, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
LLAMA = {"model_type": "llama", **SHAPE}
V3 = {
  "model_type": "deepseek_v3", **SHAPE, "q_lora_rank": 10, "kv_lora_rank": 6, "qk_nope_head_dim": 4,
  "qk_rope_head_dim": 2, "v_head_dim": 3, "moe_intermediate_size": 5, "n_routed_experts": 4, "n_shared_experts": 1,
  "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
}  # fmt: skip
MTP = ["model.layers.2.enorm.weight"]
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 7))


def make_checkpoint(folder, raw, names=(), dtype=np.float32):
  """A folder of `raw` as config.json and noise of `dtype`; buffers are float32. `names` make its MTP layers."""
  config = to_model_config(raw, names, "config.json")
  tensors = {}
  for entry in hf_tensors(config):
    rng = np.random.default_rng([0, *entry.name.encode()])
    noise = (
      rng.uniform(0.5, 1.5, entry.shape) if entry.name.endswith("norm.weight") else rng.normal(0, 0.4, entry.shape)
    )
    tensors[entry.name] = noise.astype(np.float32 if entry.buffer else dtype)
  for entry in hf_tensors(config):
    if entry.is_copy:
      tensors[entry.name] = tensors["model.embed_tokens.weight" if entry.path == ("embed",) else "lm_head.weight"]
  write_tensors(folder, [(name, a.shape, a.dtype) for name, a in tensors.items()], tensors.__getitem__, 20_000)
  (folder / "config.json").write_text(json.dumps(raw))
  return tensors


@pytest.fixture(scope="module")
def v3(tmp_path_factory):
  folder = tmp_path_factory.mktemp("v3")
  return folder, make_checkpoint(folder, V3, MTP), deepseek_jax.load_pretrained(folder)


def saved(folder):
  reader = HFReader(folder)
  return {name: reader.read(name) for name in reader.names}


def assert_same(a, b):
  assert sorted(a) == sorted(b)
  for name in a:
    assert a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes(), name


def test_importing_the_package_imports_no_jax():
  code = "import sys, deepseek_jax; assert 'jax' not in sys.modules; deepseek_jax.load_pretrained; assert 'jax' in sys.modules"
  subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
  with pytest.raises(AttributeError, match="no attribute 'nothing'"):
    deepseek_jax.nothing  # noqa: B018


def test_names_are_found_before_they_are_imported():
  code = (
    "import sys, deepseek_jax; names = dir(deepseek_jax); assert 'jax' not in sys.modules\n"
    "assert {'Model', 'Run', 'load', 'load_pretrained', 'run', '__version__'} <= set(names), names"
  )
  subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
  assert deepseek_jax.__version__.split(".")[0].isdigit()
  with contextlib.suppress(importlib.metadata.PackageNotFoundError):
    assert deepseek_jax.__version__ == importlib.metadata.version("deepseek_jax")


def test_repr_tells_model_parameters_dtype_and_source(v3):
  folder, tensors, model = v3
  copies = ("layers.2.embed_tokens.weight", "shared_head.head.weight", "_bias")
  count = sum(a.size for name, a in tensors.items() if not name.endswith(copies))
  assert repr(model) == (
    f"<Model deepseek_v3: 2 layers and 1 of multi-token prediction, width 16, 4 experts, {count:,} parameters in float32, "
    f"computes in float32, from {folder}>"
  )


def test_what_is_no_folder_of_hugging_face_is_told_what_to_do(tmp_path):
  (tmp_path / "run" / "checkpoints" / "20").mkdir(parents=True)
  (tmp_path / "run" / "config.json").write_text('{"name": "tiny"}')
  (tmp_path / "file").write_text("")
  advice = f"deepseek_jax.load({str(tmp_path / 'run')!r}).model is its model"
  hub = "if that is a name on the Hugging Face hub, download it first: hf download deepseek-ai/DeepSeek-V3 --local-dir DeepSeek-V3"
  for source, message in {
    tmp_path / "run": advice, tmp_path / "run" / "checkpoints": advice, tmp_path / "run" / "checkpoints" / "20": advice,
    "deepseek-ai/DeepSeek-V3": hub, "gs://bucket/model": "copy gs://bucket/model to one", tmp_path / "file": "is not a folder",
    tmp_path / "nowhere": "is not a folder",
  }.items():  # fmt: skip
    with pytest.raises(CheckpointError) as error:
      deepseek_jax.load_pretrained(source)
    assert message in str(error.value) and "\n" not in str(error.value)
  for call in (
    lambda: convert("deepseek-ai/DeepSeek-V3", tmp_path / "to"),
    lambda: open_weights("deepseek-ai/DeepSeek-V3"),
  ):
    with pytest.raises(CheckpointError, match="hf download deepseek-ai/DeepSeek-V3"):
      call()


@pytest.mark.parametrize("seq", [7, 2])
def test_logits_and_loss_agree(v3, seq):
  model, tokens = v3[2], TOKENS[:, :seq]
  logits = model.logits(tokens)
  assert logits.shape == (2, seq, 40) and logits.dtype == np.float32
  logp = np.asarray(jax.nn.log_softmax(logits[:, :-1]))
  expected = -np.take_along_axis(logp, tokens[:, 1:, None], -1).mean()
  loss, _ = model.loss_and_grads(tokens.tolist())
  np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_losses_of_tokens_add_up_to_the_loss(v3):
  model = v3[2]
  main, mtp = model.token_losses(TOKENS), model.token_losses(TOKENS, depth=1)
  assert main.shape == (2, 6) and mtp.shape == (2, 5)
  np.testing.assert_allclose(main.mean(), model.loss_and_grads(TOKENS)[0], rtol=1e-6)
  # The trainer's own sum: its mean over the targets of the depth, then the weight.
  total = model.loss_and_grads(TOKENS, mtp_weight=0.3)[0]
  np.testing.assert_allclose(main.mean() + 0.3 * mtp.mean(), total, rtol=1e-5)


def test_logits_of_a_depth_take_the_tokens_after_the_position(v3):
  model, other = v3[2], TOKENS.copy()
  logits = model.logits(TOKENS, depth=1)
  assert logits.shape == (2, 6, 40)
  logp = jax.nn.log_softmax(logits[:, :-1])
  losses = -np.take_along_axis(np.asarray(logp), TOKENS[:, 2:, None], -1)[..., 0]
  np.testing.assert_allclose(model.token_losses(TOKENS, depth=1), losses, rtol=1e-5)
  other[:, 4] = (other[:, 4] + 1) % 40
  changed = np.abs(np.asarray(model.logits(other, depth=1) - logits)).max((0, 2))
  assert (changed[:3] == 0).all() and (changed[3:] > 1e-4).all()  # position 3 takes token 4 and predicts token 5


def test_gradients_are_the_slope_of_the_loss(v3):
  model = v3[2]
  params, (loss, grads) = model.params, model.loss_and_grads(TOKENS, mtp_weight=0.3)
  assert jax.tree.map(lambda g: (g.shape, g.dtype), grads) == jax.tree.map(lambda p: (p.shape, p.dtype), params)
  squares = sum(float((np.asarray(g, np.float64) ** 2).sum()) for g in jax.tree.leaves(grads))
  step = 1e-3 / math.sqrt(squares)
  try:
    model.params = jax.tree.map(lambda p, g: p - step * g, params, grads)
    lower, _ = model.loss_and_grads(TOKENS, mtp_weight=0.3)
  finally:
    model.params = params
  np.testing.assert_allclose((loss - lower) / (step * squares), 1, atol=0.02)


def test_weight_of_multi_token_prediction(v3):
  model = v3[2]
  losses = [float(model.loss_and_grads(TOKENS, weight)[0]) for weight in (0.0, 1.0, 0.5)]
  np.testing.assert_allclose(losses[2], (losses[0] + losses[1]) / 2, rtol=1e-6)
  assert losses[1] - losses[0] > 1
  mtp = model.loss_and_grads(TOKENS)[1]["mtp_layers"]
  assert not any(np.any(g) for g in jax.tree.leaves(mtp))


def test_routing(v3):
  indices, weights = v3[2].routing(TOKENS)
  assert indices.shape == weights.shape == (1, 2, 7, 2)
  assert set(np.unique(np.asarray(indices) // 2, axis=-1).ravel()) <= {0, 1}
  assert np.all(np.asarray(indices)[..., 0] // 2 == np.asarray(indices)[..., 1] // 2)  # one group of the two
  np.testing.assert_allclose(np.sum(weights, -1), 2.5, rtol=1e-6)


def test_router_scores_are_those_that_experts_are_chosen_by(v3):
  model = v3[2]
  (indices, weights), scores, moe = model.routing(TOKENS), model.router_scores(TOKENS), model.config.moe
  assert scores.shape == (1, 2, 7, 4) and scores.dtype == np.float32 and np.min(scores) > 0
  chosen = np.take_along_axis(np.asarray(scores), np.asarray(indices), -1)
  np.testing.assert_allclose(weights, moe.route_scale * chosen / chosen.sum(-1, keepdims=True), rtol=1e-6)
  biased = limit_to_groups(scores + model.buffers["moe_layers"]["moe"]["router"]["bias"][:, None, None], moe)
  np.testing.assert_array_equal(np.sort(jax.lax.top_k(biased, 2)[1], -1), np.sort(indices, -1))


def test_works_inside_another_mesh(v3):
  expected = v3[2].logits(TOKENS)
  with jax.set_mesh(jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))):
    np.testing.assert_array_equal(v3[2].logits(TOKENS), expected)
    v3[2].params = jax.tree.map(np.asarray, v3[2].params)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize(
  ("raw", "names"), [(LLAMA, ()), (LLAMA | {"tie_word_embeddings": True}, ()), (V3, MTP)], ids=("llama", "tied", "mtp")
)
def test_saving_gives_back_every_bit(tmp_path, raw, names, dtype):
  tensors = make_checkpoint(tmp_path, raw, names, dtype)
  deepseek_jax.load_pretrained(tmp_path).save_pretrained(tmp_path / "out")
  assert_same(saved(tmp_path / "out"), tensors)
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert config["torch_dtype"] == np.dtype(dtype).name
  assert "lm_head.weight" not in tensors or not raw.get("tie_word_embeddings")


def test_a_sharded_save(v3, tmp_path, monkeypatch):
  monkeypatch.setattr(hf_files, "MAX_FILE_BYTES", 3000)
  v3[2].save_pretrained(tmp_path)
  index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
  assert index["metadata"]["total_size"] == sum(a.nbytes for a in v3[1].values())
  files = {path.name for path in tmp_path.glob("*.safetensors")}
  assert index["weight_map"].keys() == v3[1].keys() and set(index["weight_map"].values()) == files and len(files) > 2
  np.testing.assert_array_equal(deepseek_jax.load_pretrained(tmp_path).logits(TOKENS), v3[2].logits(TOKENS))


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("max_file_bytes", [10**9, 3000])
def test_a_save_that_fails_leaves_the_earlier_one(v3, tmp_path, monkeypatch, max_file_bytes):
  monkeypatch.setattr(hf_files, "MAX_FILE_BYTES", max_file_bytes)
  model = deepseek_jax.load_pretrained(v3[0])
  model.save_pretrained(tmp_path)
  before = contents(tmp_path)

  def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")

  for place, name in ((os, "fsync"), (pathlib.Path, "write_text")):  # of the tensors; of index and config.json
    with monkeypatch.context() as patch:
      patch.setattr(place, name, full_disk)
      with pytest.raises(CheckpointError, match=r"No space left on device; make room, or choose another folder"):
        model.save_pretrained(tmp_path)
    assert contents(tmp_path) == before
  large = jax.tree.map(np.array, model.params)
  large["embed"][3, 4], large["head"]["kernel"][5, 6] = 1e5, np.nan
  model.params = large
  with pytest.raises(CheckpointError, match="4 tensors .*: model.embed_tokens.weight, .*, lm_head.weight;"):
    model.save_pretrained(tmp_path, dtype="float16")
  attention = dataclasses.replace(model.config.attention, latent_norm_eps=1e-5)
  model.params, model.config = v3[2].params, dataclasses.replace(model.config, attention=attention)
  with pytest.raises(CheckpointError, match="latent_norm_eps"):
    model.save_pretrained(tmp_path)
  assert contents(tmp_path) == before


@pytest.mark.parametrize(("old", "new"), [(10**9, 3000), (3000, 10**9), (3000, 3000)])
def test_a_save_that_is_cut_off_is_no_mixture(v3, tmp_path, monkeypatch, old, new):
  model, replace, done = deepseek_jax.load_pretrained(v3[0]), os.replace, 0
  model.params = jax.tree.map(lambda p: 2 * p, model.params)

  def cut_off(*paths):
    left.pop()
    replace(*paths)

  while True:  # after each of the files
    with monkeypatch.context() as patch:
      patch.setattr(hf_files, "MAX_FILE_BYTES", old)
      v3[2].save_pretrained(tmp_path)
      patch.setattr(hf_files, "MAX_FILE_BYTES", new)
      patch.setattr(os, "replace", cut_off)
      left = [None] * done
      try:
        model.save_pretrained(tmp_path)
        break
      except IndexError:
        done += 1
      with pytest.raises(CheckpointError):
        deepseek_jax.load_pretrained(tmp_path)
  assert done == len(contents(tmp_path)) and (done > 4) == (new == 3000)


def test_what_lies_beside_the_weights_is_saved_with_them(tmp_path):
  make_checkpoint(tmp_path / "a", LLAMA)
  names = {"tokenizer.json", "chat_template.jinja", "generation_config.json"}
  for name in names:
    (tmp_path / "a" / name).write_text(name)
  (tmp_path / "a" / "README.md").write_text("theirs")
  model = deepseek_jax.load_pretrained(tmp_path / "a")
  model.save_pretrained(tmp_path / "b")
  assert set(contents(tmp_path / "b")) == {"config.json", "model.safetensors", *names}
  assert contents(tmp_path / "b")["tokenizer.json"] == b"tokenizer.json"
  model.save_pretrained(tmp_path / "a")  # onto itself
  shutil.rmtree(tmp_path / "a")
  model.save_pretrained(tmp_path / "c")
  assert set(contents(tmp_path / "c")) == {"config.json", "model.safetensors"}


def test_buffers_keep_their_dtype_and_values(v3, tmp_path):
  folder, tensors, model = v3
  model.save_pretrained(tmp_path, dtype="bfloat16")
  bias = "model.layers.1.mlp.gate.e_score_correction_bias"
  assert_same({bias: saved(tmp_path)[bias]}, {bias: tensors[bias]})
  assert saved(tmp_path)["lm_head.weight"].dtype == ml_dtypes.bfloat16


def test_assigned_params_are_saved_and_copied(v3, tmp_path):
  model = deepseek_jax.load_pretrained(v3[0])
  model.params = jax.tree.map(lambda p: np.asarray(2 * p, np.float64), model.params)
  assert {p.dtype for p in jax.tree.leaves(model.params)} == {np.dtype(np.float32)}
  model.save_pretrained(tmp_path)
  tensors = {name: a if name.endswith("_bias") else 2 * a for name, a in v3[1].items()}
  assert_same(saved(tmp_path), tensors)


def test_copies_are_optional_when_read_and_written_from_the_main_ones(v3, tmp_path):
  kept = {
    name: a for name, a in v3[1].items() if not name.endswith(("2.embed_tokens.weight", "shared_head.head.weight"))
  }
  write_tensors(tmp_path, [(name, a.shape, a.dtype) for name, a in kept.items()], kept.__getitem__)
  (tmp_path / "config.json").write_text(json.dumps(V3))
  deepseek_jax.load_pretrained(tmp_path).save_pretrained(tmp_path / "out")
  assert_same(saved(tmp_path / "out"), v3[1])


def test_copies_that_differ_are_noted(v3, tmp_path, capsys):
  tensors = v3[1] | {"model.layers.2.shared_head.head.weight": v3[1]["lm_head.weight"] * np.nan}
  table = [(name, a.shape, a.dtype) for name, a in tensors.items()]
  (tmp_path / "config.json").write_text(json.dumps(V3))
  write_safetensors(tmp_path / "model.safetensors", table, tensors.__getitem__)  # not used, so that it may be NaN
  deepseek_jax.load_pretrained(v3[0])
  assert capsys.readouterr().out == ""
  deepseek_jax.load_pretrained(tmp_path)
  (line,) = capsys.readouterr().out.splitlines()
  assert line.startswith("note     model.layers.2.shared_head.head.weight differs from lm_head.weight")


def test_a_head_that_differs_from_the_embedding_is_not_tied(tmp_path, capsys):
  tensors = make_checkpoint(tmp_path / "untied", LLAMA)
  expected = deepseek_jax.load_pretrained(tmp_path / "untied").logits(TOKENS)
  tied = tmp_path / "tied"
  make_checkpoint(tied, LLAMA)
  (tied / "config.json").write_text(json.dumps(LLAMA | {"tie_word_embeddings": True}))
  capsys.readouterr()
  model = deepseek_jax.load_pretrained(tied)
  (line,) = capsys.readouterr().out.splitlines()
  assert line.startswith(
    f"note     {tied / 'config.json'}: tie_word_embeddings=true is not followed: lm_head.weight is"
  )
  assert not model.config.tied_embeddings
  np.testing.assert_array_equal(model.logits(TOKENS), expected)
  # Where both are the same, they are one.
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
  table = [(name, a.shape, a.dtype) for name, a in tensors.items()]
  write_tensors(tied, table, tensors.__getitem__, config=LLAMA | {"tie_word_embeddings": True})
  assert deepseek_jax.load_pretrained(tied).config.tied_embeddings and capsys.readouterr().out == ""


def test_what_is_not_taken_as_it_stands_is_one_note_each(tmp_path, capsys):
  more = {"num_nextn_predict_layers": 1, "sliding_window": 8, "rope_scaling": {"type": "default", "scale": 2}}
  make_checkpoint(tmp_path, V3 | more)
  deepseek_jax.load_pretrained(tmp_path)
  mtp, unknown = capsys.readouterr().out.splitlines()
  assert "num_nextn_predict_layers=1 (transformers' default) is not followed" in mtp
  assert unknown.endswith("that are not used: sliding_window, rope_scaling.scale")


def test_assigned_arrays_are_not_shared(v3):
  model = deepseek_jax.load_pretrained(v3[0])
  mine = jax.tree.map(np.array, model.params)
  model.params, mine["embed"][:] = mine, 7
  assert not np.any(model.params["embed"] == 7)


def test_assigned_params_are_checked(v3):
  model = v3[2]
  tree = {name: value for name, value in model.params.items() if name != "embed"}
  tree |= {"surplus": np.zeros(3), "head": {"kernel": np.zeros((3, 3))}}
  with pytest.raises(ConfigError) as error:
    model.params = tree
  for part in ("embed is missing", "surplus is not a parameter", "head/kernel is (3, 3) where (16, 40) is expected"):
    assert part in str(error.value)


@pytest.mark.parametrize("part", ["enorm", "hnorm", "eh_proj", "shared_head.norm"])
def test_a_missing_part_of_multi_token_prediction_is_missing(v3, tmp_path, part):
  tensors = {name: a for name, a in v3[1].items() if name != f"model.layers.2.{part}.weight"}
  write_tensors(tmp_path, [(name, a.shape, a.dtype) for name, a in tensors.items()], tensors.__getitem__, config=V3)
  with pytest.raises(CheckpointError, match=rf": 1 missing\.[^,]*\nmissing: \n  model.layers.2.{part}.weight$"):
    deepseek_jax.load_pretrained(tmp_path)


@pytest.mark.parametrize(
  ("tokens", "message"),
  [([[1.0]], "integers"), ([1, 2], "integers"), ([[True]], "integers"), ([[40]], "outside the vocabulary, 0 to 39"),
   ([[-1]], "outside"), ([[]], "integers"), (np.zeros((0, 3), int), "too few")],
)  # fmt: skip
def test_tokens_are_checked(v3, tokens, message):
  with pytest.raises(ConfigError, match=message):
    v3[2].logits(tokens)


def test_refusals(v3, tmp_path):
  folder, _, model = v3
  with pytest.raises(ConfigError, match="too few.*at least 3"):
    model.loss_and_grads(TOKENS[:, :2], mtp_weight=0.3)
  with pytest.raises(ConfigError, match="too few.*at least 2"):
    model.loss_and_grads(TOKENS[:, :1])
  with pytest.raises(ConfigError, match="float16.*float32, float64, bfloat16"):
    deepseek_jax.load_pretrained(folder, dtype="float16")
  with pytest.raises(ConfigError, match="int8"):
    model.save_pretrained(tmp_path, dtype="int8")
  with pytest.raises(ConfigError, match="save to a folder, and copy that to gs://bucket/model"):
    model.save_pretrained("gs://bucket/model")
  with pytest.raises(CheckpointError, match="config.json"):
    deepseek_jax.load_pretrained(tmp_path)
  make_checkpoint(tmp_path, LLAMA)
  dense = deepseek_jax.load_pretrained(tmp_path)
  with pytest.raises(ConfigError, match="no layers for multi-token prediction"):
    dense.loss_and_grads(TOKENS, mtp_weight=0.3)
  with pytest.raises(ConfigError, match="dense"):
    dense.routing(TOKENS)
  with pytest.raises(ConfigError, match=r"router_scores\(\) needs experts"):
    dense.router_scores(TOKENS)
  for depth in (-1, 2):
    with pytest.raises(ConfigError, match=f"depth={depth}, .* has 1 of .*: expected 0 .* to 1"):
      model.logits(TOKENS, depth)
  with pytest.raises(ConfigError, match="too few.*at least 3"):
    model.token_losses(TOKENS[:, :2], depth=1)
  assert dense.buffers == {}


def test_a_folder_that_does_not_fit_its_config(v3, tmp_path):
  make_checkpoint(tmp_path, LLAMA)
  (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": 3, "vocab_size": 41}))
  with pytest.raises(CheckpointError, match="9 missing, 2 of another shape"):
    deepseek_jax.load_pretrained(tmp_path)


def test_a_stray_layer_is_not_expected(v3, tmp_path):
  tensors = v3[1] | {"model.layers.1000000.foo": np.ones(3, np.float32)}
  write_tensors(tmp_path, [(name, a.shape, a.dtype) for name, a in tensors.items()], tensors.__getitem__)
  (tmp_path / "config.json").write_text(json.dumps(V3))
  with pytest.raises(CheckpointError, match=r"not expected: \n  model.layers.1000000.foo"):
    deepseek_jax.load_pretrained(tmp_path)


def test_float64_needs_x64_and_is_float64_throughout(v3, tmp_path):
  with pytest.raises(ConfigError, match="jax_enable_x64"):
    deepseek_jax.load_pretrained(v3[0], dtype="float64")
  with jax.enable_x64(True):
    model = deepseek_jax.load_pretrained(v3[0], dtype="float64")
    logits = model.logits(TOKENS)
    assert logits.dtype == np.float64
    assert {p.dtype for p in jax.tree.leaves((model.params, model.buffers))} == {np.dtype(np.float64)}
  for use in (model.logits, model.loss_and_grads, model.routing):
    with pytest.raises(ConfigError, match="jax_enable_x64"):
      use(TOKENS)
  with pytest.raises(ConfigError, match="jax_enable_x64"):
    model.params = jax.tree.map(np.asarray, model.params)
  model.save_pretrained(tmp_path, dtype="float64")
  assert_same(
    saved(tmp_path), {name: a if name.endswith("_bias") else a.astype(np.float64) for name, a in v3[1].items()}
  )
  np.testing.assert_allclose(v3[2].logits(TOKENS), logits, atol=2e-5 * float(np.abs(logits).max()))


def test_bfloat16_keeps_float32_parameters(v3):
  model = deepseek_jax.load_pretrained(v3[0], dtype="bfloat16")
  assert {p.dtype for p in jax.tree.leaves(model.params)} == {np.dtype(np.float32)}
  assert model.logits(TOKENS).dtype == np.float32 and model.config.compute_dtype == "bfloat16"
