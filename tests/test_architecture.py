"""The rules of the code's architecture, read off its syntax trees.

Every rule is shown to fail on a source that breaks it.
"""

import ast
import functools
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = "deepseek_jax"

# Imports point down: a module imports its own package and those of lower lines.
LAYERS = (
  {"errors", "typing", "renamed_fields", "console", "logical_axes", "native_logs"},
  {"processes", "distributed", "cpu_backend"},
  {"schema", "storage"},
  {"model_config", "config_sections"},
  {"config"},
  {"mesh", "sharding", "data", "flags", "json_schema"},
  {"kernels", "compilation_cache", "json_output", "stages"},
  {"model"},
  {"parallel"},
  {"optimizers"},
  {"plan"},
  {"checkpoint"},
  {"training", "generate"},
  {"evaluate"},
  {"selftest", "compare"},
  {"train", "api", "report", "variants", "notebook", "serve"},
  {"notebook_console"},
  {"runs"},
  {"scaling"},
  {"new"},
)
# Imports between neighbors, and where less is allowed than what lies below.
BESIDE = {"sharding": {"mesh"}}
ONLY = {
  "errors": set(), "typing": set(), "renamed_fields": set(), "logical_axes": set(), "kernels": {"kernels", "typing"}, "data": {"data", "config_sections", "console", "errors", "storage", "typing"},
  "__init__": {"api", "runs"},
}  # fmt: skip

MESH_FILES = {"config.py", "logical_axes.py", "mesh.py", "sharding.py"}
PARTITION_SPECS = ("jax.P", "jax.sharding.PartitionSpec", "jax.interpreters.pxla.PartitionSpec")
# `data` and `stage` are also words; as the name of an axis they stand in a call or a look-up of these.
AXIS_WORDS, AXIS_NAMES = {"data", "stage"}, {"fsdp", "expert", "tensor", "stage", "context", "data"}
AXIS_CALLS = {
  "psum", "pmean", "pmax", "pmin", "psum_scatter", "all_gather", "all_to_all", "ragged_all_to_all", "ppermute", "pshuffle",
  "pcast", "axis_index", "axis_size", "shard_map", "make_mesh", "Mesh", "AbstractMesh", "NamedSharding", "spec", "P",
  "PartitionSpec", "with_sharding_constraint", "auto_axes", "explicit_axes",
}  # fmt: skip
AXIS_TABLES = {"shape", "axis_sizes", "sizes"}

BANNED = {
  "flax.nnx.jit": "jax.jit on plain dicts", "flax.nnx.scan": "lax.scan", "flax.nnx.vmap": "jax.vmap",
  "flax.nnx.grad": "jax.grad", "flax.nnx.value_and_grad": "jax.value_and_grad", "flax.nnx.remat": "jax.checkpoint",
  "flax.nnx.Optimizer": "Optax on plain dicts", "flax.nnx.with_partitioning": "out_sharding= of the initializer",
  "flax.nnx.pmap": "jax.jit", "flax.nnx.shard_map": "jax.shard_map", "flax.nnx.cond": "lax.cond",
  "flax.nnx.while_loop": "lax.while_loop", "flax.nnx.fori_loop": "lax.fori_loop", "flax.linen": "flax.nnx",
  "jax.experimental.shard_map": "jax.shard_map", "jax.sharding.use_mesh": "jax.set_mesh", "jax.lax.pvary": "lax.pcast",
  "pickle": "JSON or Orbax", "cloudpickle": "JSON or Orbax", "dill": "JSON or Orbax", "shelve": "JSON", "marshal": "JSON",
  "jax.pmap": "jax.jit",
}  # fmt: skip
BANNED_METHODS = {"sow": "an argument or a result"}
LONGEST_MODULE, LONGEST_FUNCTION = 400, 70
# Files beside each `__main__.py` that print.
PROGRAM_FILES = {"console.py", "flags.py", "train.py", "report.py", "checkpoint/convert.py"}

# tests/X/test_Y.py tests deepseek_jax/X/Y.py or the package deepseek_jax/X/Y, and so for the other folders of code.
# Test files that test no single module, with what they test instead; a folder stands for all of its files.
MIRRORED = (PACKAGE, "benchmarks", "launch")
UNMIRRORED = {
  "test_architecture.py": "rules for all of the code",
  "test_configs.py": "the files of configs/",
  "test_docs.py": "what README.md and docs/ name",
  "colabs": "the notebooks of colabs/",
  "end_to_end": "whole runs in processes, through the command line",
  "parity": "the public API against transformers",
  "tpu": "whole programs compiled for TPUs without the hardware",
  "launch/test_scripts.py": "every script of launch/, and the commands of docs/launch.md",
  "kernels/test_attention_gpu.py": "kernels/attention/pallas_gpu.py",
  "kernels/test_compiled_gpu.py": "machine code of all kernels for Hopper",
  "kernels/test_compiled_tpu.py": "machine code of all kernels for TPUs",
  "kernels/test_fp8.py": "the operations of FP8 and their implementations, by the same cases",
  "kernels/test_races.py": "the race detector of the interpreter, which the other tests of kernels rely on",
  "kernels/test_pass_selftest.py": "all kernels, through the checks of selftest",
  "scaling/test_coverage.py": "intervals of scaling/parametric.py, on 200 surfaces",
  "selftest/test_select.py": "selftest/run.py and selftest/machine.py: which results count",
  "training/test_frozen.py": "the step, of which a part of the parameters is trained",
  "training/test_collectives.py": "collectives of the compiled step, layout by layout",
  "training/test_fp8.py": "the whole step in FP8",
  "training/test_meshes.py": "the whole step in every layout",
}


def names_used(tree):
  """(line, dotted name) of every import and of every attribute chain that starts at an imported name."""
  aliases, used = {}, []
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for name in node.names:
        used.append((node.lineno, name.name))
        aliases[name.asname or name.name.split(".")[0]] = name.name if name.asname else name.name.split(".")[0]
    elif isinstance(node, ast.ImportFrom) and not node.level:
      for name in node.names:
        used.append((node.lineno, f"{node.module}.{name.name}"))
        aliases[name.asname or name.name] = f"{node.module}.{name.name}"
  for node in ast.walk(tree):
    parts, base = [], node
    while isinstance(base, ast.Attribute):
      parts.append(base.attr)
      base = base.value
    if parts and isinstance(base, ast.Name) and base.id in aliases:
      used.append((node.lineno, ".".join([aliases[base.id], *reversed(parts)])))
  return used


def within(name, prefix):
  return name == prefix or name.startswith(prefix + ".")


def check_imports(tree, path):
  """Imports of the package that do not point down. Relative imports are refused, so that none escapes the check.

  `__main__` files are programs, as train.py is, and may import everything below those, and their own package.
  """
  unit = "train" if path.name == "__main__.py" else path.parts[0].removesuffix(".py")
  level = {name: level for level, names in enumerate(LAYERS) for name in names}
  if unit not in level and unit != "__init__":
    yield 1, f"{unit} has no place in LAYERS"
    return
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and node.level:
      yield node.lineno, f"relative import: write from {PACKAGE}... import"
    modules = []
    if isinstance(node, ast.Import):
      modules = [name.name for name in node.names]
    elif isinstance(node, ast.ImportFrom) and not node.level:
      modules = [f"{node.module}.{name.name}" for name in node.names]
    for target in (m.split(".")[1] for m in modules if m.startswith(PACKAGE + ".")):
      below = unit in level and target in level and level[target] < level[unit]
      own = target in (unit, path.parts[0])
      allowed = target in ONLY[unit] if unit in ONLY else below or own or target in BESIDE.get(unit, ())
      if not allowed:
        yield node.lineno, f"{unit} may not import {target}"


def check_mesh_names(tree, path):
  """Axis names and PartitionSpecs outside the files of the mesh: models speak logical names through sharding.spec."""
  if str(path) in MESH_FILES:
    return
  for line, name in names_used(tree):
    if name in PARTITION_SPECS:
      yield line, f"{name}: use sharding.spec with logical names"
  for node in ast.walk(tree):
    if isinstance(node, ast.Constant) and node.value in AXIS_NAMES - AXIS_WORDS:
      yield node.lineno, f"mesh axis {node.value!r}: use a logical name"
    looked_up = isinstance(node, ast.Subscript) and _last_name(node.value) in AXIS_TABLES
    called = isinstance(node, ast.Call) and _last_name(node.func) in AXIS_CALLS
    inside = [node.slice] if looked_up else [*node.args, *(k.value for k in node.keywords)] if called else []
    for item in (i for part in inside for i in _items(part)):
      if isinstance(item, ast.Constant) and item.value in AXIS_WORDS:
        yield item.lineno, f"mesh axis {item.value!r}: use a logical name"


def _last_name(node):
  return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None


def _items(node):
  return [i for e in node.elts for i in _items(e)] if isinstance(node, (ast.Tuple, ast.List, ast.Set)) else [node]


def check_banned(tree, path):
  """APIs that this code does without; each message names what stands in for it."""
  for line, name in names_used(tree):
    for banned, instead in BANNED.items():
      if within(name, banned):
        yield line, f"{banned}: use {instead}"
  for node in ast.walk(tree):
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in BANNED_METHODS:
      yield node.lineno, f"{node.func.attr}: use {BANNED_METHODS[node.func.attr]}"
    if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and getattr(node.value, "value", True):
      yield node.value.lineno, "allow_pickle runs code from data"


def check_length(tree, path):
  """Modules and functions that have grown too long to read; kernels may be longer."""
  if path.parts[0] == "kernels":
    return
  lines = max((node.end_lineno for node in tree.body), default=0)
  if lines > LONGEST_MODULE:
    yield lines, f"{lines} lines, at most {LONGEST_MODULE}: one file, one idea"
  for node in ast.walk(tree):
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
      lines = node.end_lineno - node.lineno + 1
      if lines > LONGEST_FUNCTION:
        yield node.lineno, f"{node.name} has {lines} lines, at most {LONGEST_FUNCTION}"


def check_types(tree, path):
  """Public functions and methods with a parameter or a result that has no type."""
  for scope in [
    tree,
    *(node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")),
  ]:
    for node in scope.body:
      if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
        a = node.args
        parameters = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
        untyped = [p.arg for p in parameters if not p.annotation and p.arg not in ("self", "cls")]
        if untyped or not node.returns:
          yield node.lineno, f"{node.name}: give a type to {', '.join(untyped) or 'its result'}"


def check_print(tree, path):
  """Calls of print in what programs call, which a console can silence or redirect."""
  if path.name == "__main__.py" or str(path) in PROGRAM_FILES:
    return
  for node in ast.walk(tree):
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
      yield node.lineno, "print: use current_console().print"


CHECKS = (check_imports, check_mesh_names, check_banned, check_length, check_types, check_print)


@functools.cache
def modules():
  """[(path, syntax tree)] of the package."""
  paths = sorted((ROOT / PACKAGE).rglob("*.py"))
  assert paths
  return [(path, ast.parse(path.read_text(encoding="utf-8"))) for path in paths]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_package_keeps_the_rule(check):
  broken = [
    f"{path.relative_to(ROOT)}:{line}: {message}"
    for path, tree in modules()
    for line, message in check(tree, path.relative_to(ROOT / PACKAGE))
  ]
  assert not broken, "\n".join(broken)


def test_scripts_keep_the_rule_on_banned_names():
  paths = [path for folder in ("configs", "benchmarks", "launch") for path in (ROOT / folder).rglob("*.py")]
  broken = [(str(p), found) for p in paths for found in check_banned(ast.parse(p.read_text(encoding="utf-8")), p)]
  assert not broken


def _long(statements):
  return "def f(x):\n" + "  x += 1\n" * statements


@pytest.mark.parametrize(
  ("check", "path", "source"),
  [
    (check_imports, "model/block.py", "from deepseek_jax.training.loss import cross_entropy"),
    (check_imports, "model/block.py", "from deepseek_jax import training"),
    (check_imports, "model/block.py", "import deepseek_jax.train as t"),
    (check_imports, "model/block.py", "def f():\n  from deepseek_jax.generate import decoding"),
    (check_imports, "model/block.py", "from ..training import loss"),
    (check_imports, "data/pipeline.py", "from deepseek_jax.model import transformer"),
    (check_imports, "data/pipeline.py", "from deepseek_jax.mesh import AXES"),
    (check_imports, "kernels/api.py", "from deepseek_jax.config import Config"),
    (check_imports, "training/loop.py", "from deepseek_jax.evaluate.heldout import evaluate"),
    (check_imports, "training/loop.py", "from deepseek_jax.train import main"),
    (check_imports, "plan/plan.py", "from deepseek_jax.training.step import abstract_step"),
    (check_imports, "plan/__main__.py", "from deepseek_jax.api import load_pretrained"),
    (check_imports, "plan/__main__.py", "from deepseek_jax.new.questions import QUESTIONS"),
    (check_imports, "mesh.py", "from deepseek_jax.sharding import spec"),
    (check_imports, "errors.py", "from deepseek_jax.config import Config"),
    (check_imports, "config.py", "from deepseek_jax.mesh import AXES"),
    (check_imports, "utils.py", ""),
    (check_mesh_names, "model/mlp.py", "import jax\nx = jax.P()"),
    (check_mesh_names, "model/mlp.py", "from jax.sharding import PartitionSpec as P"),
    (check_mesh_names, "model/mlp.py", "from jax import P"),
    (check_mesh_names, "model/mlp.py", "x = lax.psum(x, 'tensor')"),
    (check_mesh_names, "model/mlp.py", "axes = ('batch', 'fsdp')"),
    (check_mesh_names, "training/step.py", "x = lax.psum(x, ('data', 'batch'))"),
    (check_mesh_names, "training/step.py", "x = lax.pmean(x, axis_name='data')"),
    (check_mesh_names, "training/step.py", "n = mesh.shape['data']"),
    (check_banned, "model/mlp.py", "from flax import nnx\nf = nnx.jit(g)"),
    (check_banned, "model/mlp.py", "from flax.nnx import Optimizer"),
    (check_banned, "model/mlp.py", "import flax\nf = flax.nnx.scan(g)"),
    (check_banned, "model/mlp.py", "from flax import linen as nn"),
    (check_banned, "model/mlp.py", "from jax.experimental.shard_map import shard_map"),
    (check_banned, "model/mlp.py", "from jax.experimental import shard_map"),
    (check_banned, "model/mlp.py", "import jax\nx = jax.lax.pvary(x, 'stage')"),
    (check_banned, "model/mlp.py", "self.sow('intermediates', 'x', x)"),
    (check_banned, "data/packing.py", "import pickle"),
    (check_banned, "data/packing.py", "from pickle import loads"),
    (check_banned, "data/packing.py", "x = np.load(f, allow_pickle=True)"),
    (check_length, "model/mlp.py", _long(70)),
    (check_length, "model/mlp.py", "class A:\n" + "".join("  " + line + "\n" for line in _long(70).splitlines())),
    (check_length, "model/mlp.py", "x = 1\n" * 401),
    (check_types, "model/mlp.py", "def f(x) -> int: ..."),
    (check_types, "model/mlp.py", "def f(x: int): ..."),
    (check_types, "model/mlp.py", "def f(*, x=1) -> int: ..."),
    (check_types, "model/mlp.py", "class A:\n  def f(self, **rest) -> int: ..."),
    (check_print, "training/loop.py", "def f():\n  print('step')"),
  ],
)
def test_a_source_that_breaks_the_rule_is_found(check, path, source):
  assert list(check(ast.parse(source), pathlib.Path(path)))


@pytest.mark.parametrize(
  ("check", "path", "source"),
  [
    (check_imports, "train.py", "from deepseek_jax.training.loop import run"),
    (check_imports, "training/loop.py", "from deepseek_jax.training import metrics\nimport deepseek_jax_extras, jax"),
    (check_imports, "sharding.py", "from deepseek_jax.mesh import AXES"),
    (check_imports, "generate/__main__.py", "from deepseek_jax.checkpoint.manager import Checkpointer"),
    (check_imports, "plan/__main__.py", "from deepseek_jax.training.step import abstract_step"),
    (check_imports, "new/__main__.py", "from deepseek_jax.new.questions import QUESTIONS"),
    (check_mesh_names, "sharding.py", "import jax\nx = jax.P('fsdp')"),
    (check_mesh_names, "training/loop.py", "with clock('data'):\n  x = seconds['data'], config.mesh.tensor"),
    (check_mesh_names, "model/mlp.py", "'''The data of a tensor, fsdp or not.'''\nx = spec('batch', 'experts')"),
    (
      check_banned,
      "model/mlp.py",
      "from flax import nnx\nimport jax\nx = nnx.split(m), jax.jit(f), self.jit, nnx.Param",
    ),
    (check_banned, "data/packing.py", "x = np.load(f, allow_pickle=False)"),
    (check_length, "model/mlp.py", _long(69)),
    (check_length, "kernels/attention/xla.py", _long(500)),
    (check_print, "training/loop.py", "self.console.print('step')"),
    (check_print, "generate/__main__.py", "print('text')"),
    (check_types, "model/mlp.py", "def _f(x): ...\nclass A:\n  def f(self, x: int) -> int:\n    def g(x): ..."),
  ],
)
def test_a_source_that_keeps_the_rule_passes(check, path, source):
  assert not list(check(ast.parse(source), pathlib.Path(path)))


def test_every_layer_is_named_once():
  names = [name for layer in LAYERS for name in layer]
  assert len(names) == len(set(names))


def without_module(tests, modules, exceptions):
  """Paths of test files, relative to tests/, that have neither a module of their name in `modules` nor an exception."""
  for path in map(pathlib.PurePosixPath, tests):
    module = path.with_name(path.name.removeprefix("test_"))
    if not {str(module), str(module.with_suffix(""))} & modules and not {str(path), path.parts[0]} & set(exceptions):
      yield str(path)


def test_each_test_file_is_named_after_the_module_that_it_tests():
  tests = {path.relative_to(ROOT / "tests").as_posix() for path in (ROOT / "tests").rglob("test_*.py")}
  modules = set()
  for folder in MIRRORED:
    base = ROOT if folder != PACKAGE else ROOT / PACKAGE
    paths = [path.relative_to(base) for path in (ROOT / folder).rglob("*.py")]
    modules |= {path.as_posix() for path in paths} | {path.parent.as_posix() for path in paths if path.parent.parts}
  modules |= {f"launch/{path.stem}" for path in (ROOT / "launch").iterdir()}  # shell scripts and manifests too
  lost = list(without_module(sorted(tests), modules, UNMIRRORED))
  assert not lost, f"no module has the name of {', '.join(lost)}"
  needless = [name for name in UNMIRRORED if name not in tests and not (ROOT / "tests" / name).is_dir()]
  needless += [name for name in UNMIRRORED if name in tests and not list(without_module([name], modules, ()))]
  assert not needless, f"exceptions for what is not there or has its module: {', '.join(needless)}"


def test_a_test_file_without_its_module_is_found():
  modules, exceptions = {"data/packing.py", "kernels/attention", "train.py"}, {"parity", "data/test_runs.py"}
  tests = (
    "data/test_packing.py",
    "kernels/test_attention.py",
    "test_train.py",
    "parity/test_live.py",
    "data/test_runs.py",
  )
  assert not list(without_module(tests, modules, exceptions))
  lost = ("model/test_packing.py", "test_packing.py", "data/test_parity.py", "kernels/attention/test_train.py")
  assert list(without_module((*tests, *lost), modules, exceptions)) == list(lost)
