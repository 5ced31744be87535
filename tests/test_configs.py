"""The shipped configs: every value of theirs, where each comes from, and how programs find them."""

import ast
import dataclasses
import io
import json
import pathlib
import re
import tokenize
import tomllib

import pytest

from deepseek_jax import train
from deepseek_jax.config import Config
from deepseek_jax.errors import ConfigError
from deepseek_jax.flags import find_config, load_config, shipped_configs
from deepseek_jax.plan.flops import count_parameters
from deepseek_jax.schema import flatten_config
from deepseek_jax.stages import resolve_stages
from tests.golden_configs import golden_dumps

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
each_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def test_golden_dumps():
  """Every default, and what each shipped config differs in, reviewed as a diff: tests/golden_configs.py rewrites them."""
  golden = {path.stem: json.loads(path.read_text()) for path in ROOT.joinpath("tests", "golden").glob("*.json")}
  assert golden_dumps() == golden


def fields_without_source(source, changed):
  """The paths of `changed` that the config file `source` sets without a comment that says why.

  A comment counts for a field if it is on the field's line, on the line before, or likewise at the section that the
  field is in (not at the sections around that). A field that only names a constant may have it where the constant is
  assigned.
  """
  tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
  comments = {t.start[0] for t in tokens if t.type == tokenize.COMMENT and is_reason(t.string)}
  alone = {line for line in comments if source.splitlines()[line - 1].lstrip().startswith("#")}

  def commented(first, last):
    return first - 1 in alone or any(line in comments for line in range(first, last + 1))

  tree = ast.parse(source)
  assigned = {
    name.id: commented(node.lineno, node.end_lineno)
    for node in ast.walk(tree)
    if isinstance(node, ast.Assign)
    for target in node.targets
    for name in ast.walk(target)
    if isinstance(name, ast.Name)
  }
  (result,) = (node.value for node in ast.walk(tree) if isinstance(node, ast.Return))
  sourced = set()

  def visit(section, path, section_commented):
    for keyword in section.keywords:
      value, here = keyword.value, [*path, keyword.arg]
      if isinstance(value, ast.Call) and getattr(value.func, "id", "") == "dict":
        visit(value, here, commented(keyword.lineno, keyword.lineno))
      elif (
        section_commented
        or commented(keyword.lineno, value.end_lineno)
        or (isinstance(value, ast.Name) and assigned.get(value.id))
      ):
        sourced.add(".".join(here))

  visit(result.args[0], [], False)
  return sorted(set(changed) - sourced)


def is_reason(comment):
  """Whether a comment has words for a reader, which a directive to a tool has not."""
  return len(re.findall(r"\w+", comment)) >= 2 and not re.match(r"# (fmt|noqa|type|ruff)\b", comment)


def changed_fields(config):
  defaults = flatten_config(Config())
  return [path for path, value in flatten_config(config).items() if value != defaults[path]]


@each_config
def test_every_value_has_its_source_or_reason(path):
  config = load_config(path.stem)
  changed = changed_fields(config)
  assert config.name == path.stem and len(changed) > 10
  assert fields_without_source(path.read_text(encoding="utf-8"), changed) == ["name"]


@pytest.mark.parametrize(
  ("line", "missing"),
  [
    ("model=dict(mlp=8),  # table 2", []),
    ("# Table 2.\n  model=dict(mlp=8),", []),
    ("model=dict(  # table 2\n    mlp=8),", []),
    ("# Table 2.\n  model=dict(\n    embed=8,\n    mlp=8),", []),
    ("model=dict(\n    embed=8,\n    # Table 2.\n    mlp=8),", []),
    ("model=dict(mlp=SIZE),", []),
    ("model=dict(mlp=8),", ["model.mlp"]),
    ("model=dict(mlp=8),  # fmt: skip", ["model.mlp"]),
    ("model=dict(mlp=8),  # 8", ["model.mlp"]),
    ("model=dict(\n    embed=8,  # table 2\n    mlp=8),", ["model.mlp"]),
    ("model=dict(\n    # Table 2.\n    embed=8,\n    mlp=8),", ["model.mlp"]),
    ("train=dict(steps=3),  # table 2\n  model=dict(mlp=8),", ["model.mlp"]),
    ("model=dict(mlp=2 * SIZE),", ["model.mlp"]),
    ("model=dict(mlp=BARE),", ["model.mlp"]),
    ("model=dict(mlp=8, attention=dict(heads=8)),", ["model.attention.heads", "model.mlp"]),
    ("model=dict(  # table 2\n    mlp=8,\n    attention=dict(\n      heads=8)),", ["model.attention.heads"]),
    ("model=SECTION,", ["model.mlp"]),
  ],
)
def test_a_value_without_source_is_found(line, missing):
  source = f"SIZE = 8  # table 2\nBARE = 8\ndef get_config():\n return ConfigDict(dict(  # all of it\n  {line}\n ))\n"
  changed = ["model.mlp", *(["model.attention.heads"] if "heads" in line else [])]
  assert fields_without_source(source, changed) == missing


def test_1b_follows_the_scaling_laws():
  """arXiv:2401.02954, section 3.1, eq. 1; C counts the multiplications of the layers alone."""
  config = load_config("1b")
  model, tokens = config.model, config.schedule.tokens
  layers = count_parameters(model).total - 2 * model.vocab * model.embed
  compute = (6 * layers + 12 * model.layers * model.embed * config.data.seq) * tokens
  assert config.schedule.peak == pytest.approx(0.3118 * compute**-0.1250, rel=0.01)
  assert config.train.global_batch * config.data.seq == pytest.approx(0.2920 * compute**0.3271, rel=0.03)
  assert 20 < tokens / count_parameters(model).total < 21


@pytest.mark.parametrize(
  ("base", "lengths", "batches", "peak", "mscale"),
  [("v2", [32_768], [576], 2.4e-5, 0.707), ("v3", [32_768, 131_072], [1920, 480], 7.3e-6, 1.0)],
)
def test_long_configs_extend_what_the_base_config_trains(base, lengths, batches, peak, mscale):
  """arXiv:2405.04434, section 3.1.4, and arXiv:2412.19437, section 4.3: 1,000 steps at each length, s = 40 from the first on."""
  first, *extensions = resolve_stages(load_config(f"{base}_long"))
  of_base = load_config(base)
  same = {"name": f"{base}_long", "train.steps": first.config.train.steps}
  assert first.config == load_config(base, same) and first.last.tokens >= of_base.schedule.tokens
  assert first.last.tokens - of_base.schedule.tokens < of_base.train.global_batch * of_base.data.seq
  assert [s.config.data.seq for s in extensions] == lengths
  assert [s.config.train.global_batch for s in extensions] == batches
  assert [s.config.train.steps - s.first_step for s in extensions] == [1000] * len(lengths)
  for stage in extensions:
    assert dataclasses.astuple(stage.config.model.attention.yarn) == (40, 4096, 32, 1, mscale, mscale)
    assert stage.config.schedule.kind == "constant" and stage.config.schedule.peak == pytest.approx(peak)
    assert stage.config.schedule.warmup_steps == 0 and not stage.reset_optimizer


def test_names_and_paths_from_any_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert list(shipped_configs()) == [path.stem for path in CONFIGS]
  shipped = load_config("tiny")
  assert shipped == load_config(str(ROOT / "configs" / "tiny.py")) and shipped.name == "tiny"
  pathlib.Path("tiny").mkdir()
  pathlib.Path("7b").write_text("no config")  # a file without suffix hides no shipped config
  pathlib.Path("tiny.json").write_text('{"name": "mine"}')
  assert load_config("tiny") == shipped and load_config("tiny.json").name == "mine"
  assert find_config("7b") == str(ROOT / "configs" / "7b.py")


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("tinny", ["no config file 'tinny'", "1b, 67b, 7b", "did you mean --config=tiny?"]),
    ("configs/67.py", ["no config file 'configs/67.py'", "did you mean --config=67b?"]),
    ("qqqq", ["no config file 'qqqq'", "tiny_dense, tiny_long, v2"]),
    ("notes", ["config file 'notes' must be Python (.py", "or JSON (.json"]),
  ],
)
def test_unknown_names(tmp_path, monkeypatch, name, words):
  monkeypatch.chdir(tmp_path)
  pathlib.Path("notes").write_text("")
  with pytest.raises(ConfigError) as error:
    train.main(["train", f"--config={name}", "--dry_run"])
  message = str(error.value)
  assert all(word in message for word in words) and "\n" not in message
  assert ("did you mean" in message) == any("did you mean" in word for word in words)


def test_the_wheel_has_every_folder_and_the_configs():
  setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
  folders = {path.parent.relative_to(ROOT) for path in (ROOT / "deepseek_jax").rglob("*.py")}
  packages = {".".join(folder.parts) for folder in folders}
  assert set(setuptools["packages"]) == packages | {"deepseek_jax.configs"}
  assert setuptools["package-dir"] == {"deepseek_jax.configs": "configs"}
