"""README and docs name files, fields, programs, targets and identifiers that exist."""

import functools
import pathlib
import re

import pytest

from deepseek_jax.config import Config
from deepseek_jax.renamed_fields import RENAMED_FIELDS
from deepseek_jax.schema import leaf_paths

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = ("deepseek_jax", "benchmarks", "tests", "configs", "launch", ".ci", "docs")
SOURCES = [
  path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in str(path)
]
SOURCES += [ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / "requirements.txt"]
# Of other projects, of jax, of a model's files, of shells, and of a script that a reader is told to write.
FOREIGN = {"ragged_dot_mgpu", "device_map", "XLA_FLAGS", "gcloud", "safetensors", "fori_loop", "sqrt_softplus"}
FOREIGN |= {"train_wandb", "train_wandb.py", "num_concurrent"}


def code(page):
  """(spans between backticks, lines of code blocks) of a page, without what is a table of another project's terms."""
  text = page.read_text(encoding="utf-8")
  text = re.sub(r"^## Terms of .*?(?=^## |\Z)", "", text, flags=re.M | re.S)
  blocks = re.findall(r"^\s*```[^\n]*\n(.*?)^\s*```", text, re.M | re.S)
  spans = re.findall(r"`([^`\n]+)`", re.sub(r"^\s*```.*?^\s*```", "", text, flags=re.M | re.S))
  return spans, [line for block in blocks for line in block.splitlines()]


def files_of(span):
  """The names of source files in a span: `training/step.py`."""
  return re.findall(r"(?:^|(?<=[\s(]))(\.?[\w./-]*\w\.(?:py|css|svg|sh))(?=$|[\s:),])", span)


@functools.cache
def source_text():
  """The text of all code."""
  code = [path for path in SOURCES if path.suffix in (".py", ".sh", ".toml") or not path.suffix]
  return "\n".join(path.read_text(encoding="utf-8") for path in code if path != pathlib.Path(__file__))


@functools.cache
def source_words():
  return set(re.findall(r"\w+", source_text()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_exist(page):
  spans, lines = code(page)
  wrong = [*wrong_files(spans), *wrong_links(page), *wrong_fields(spans, lines)]
  wrong += [*wrong_programs(spans, lines), *wrong_identifiers(spans), *wrong_places(page)]
  assert not wrong, f"{page.relative_to(ROOT)} names what does not exist: {', '.join(sorted(set(wrong)))}"


def wrong_files(spans):
  roots, basenames = [ROOT, ROOT / "deepseek_jax"], {path.name for path in SOURCES}
  for name in (name for span in spans for name in files_of(span)):
    found = any((root / name).exists() for root in roots) if "/" in name else name in basenames
    if not found and name not in FOREIGN and not re.match(r"[A-Z]+\.py|runs/", name):
      yield name


def wrong_links(page):
  text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
  for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
    if not re.match(r"https?:", target) and not (page.parent / target).exists():
      yield target


def wrong_fields(spans, lines):
  """Config fields: `--config.a.b=...` anywhere, and spans such as `model.moe.score` that begin like a section."""
  fields = leaf_paths(Config)
  sections = {path.rpartition(".")[0] for path in fields} | {path.partition(".")[0] for path in fields}
  given = re.findall(r"--config\.([a-z0-9_.]+[a-z0-9_])", "\n".join([*spans, *lines]))
  # Methods of a notebook's `model` and files are no fields.
  known = {path.partition(".")[0] for path in fields if "." in path} - {"model"}
  given += [
    m[1]
    for s in spans
    if (m := re.match(r"((?:[a-z_]+)(?:\.[a-z0-9_]+)+)(?:=\S*)?$", s)) and m[1].split(".")[0] in known
  ]
  given += [m[1] for s in spans if (m := re.match(r"(model\.[a-z0-9_.]+)(?:=\S*)?$", s)) and m[1] not in NOTEBOOK]
  for path in (re.sub(r"^stages\.[a-z0-9_]+\.", "", path) for path in given):  # a field of a stage is one of the config
    if path not in fields and path not in sections and not re.search(r"\.(py|json|jsonl|md|html|svg)$", path):
      yield f"--config.{path}"


NOTEBOOK = {
  f"model.{name}" for name in ("logits", "loss_and_grads", "routing", "save_pretrained", "params", "buffers", "config")
}


def wrong_programs(spans, lines):
  text = "\n".join([*spans, *lines])
  for module in re.findall(r"-m ((?:deepseek_jax|benchmarks|tests)[\w.]*)", text):
    path = ROOT / module.replace(".", "/")
    if not path.with_suffix(".py").exists() and not (path / "__main__.py").exists():
      yield f"python -m {module}"
  targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
  for target in re.findall(r"(?:^|&& |`)make ([a-z-]+)", "\n".join([*(f"`{s}" for s in spans), *lines]), re.M):
    if target not in targets:
      yield f"make {target}"
  defined = set(re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", source_text()))
  for line in lines:
    if re.search(r"-m deepseek_jax\.(train|plan|generate|selftest|checkpoint)", line) and "srun" not in line:
      arguments = re.split(r"-m deepseek_jax", line)[-1]
      for flag in re.findall(r"(?<!\S)--(\w+)(?=[=\s]|$)", arguments):
        if flag not in defined | {"config", "help"} | SAMPLE:
          yield f"--{flag}"


SAMPLE = {path.removeprefix("sample.") for path in leaf_paths(Config) if path.startswith("sample.")}


def wrong_identifiers(spans):
  """Spans that are an identifier of several words, or a name with parentheses, are found in the sources."""
  words = source_words() | FOREIGN
  for span in spans:
    for name in re.findall(r"[A-Za-z_]\w*", span) if re.fullmatch(r"[\w.]+(\(\))?(, [\w.]+)*", span) else ():
      if ("_" in name or re.search(r"[a-z][A-Z]", name)) and name not in words:
        yield name


@pytest.mark.parametrize("figure", sorted((ROOT / "docs" / "images").glob("*.svg")), ids=lambda figure: figure.name)
def test_names_in_figures_exist(figure):
  texts = re.findall(r"<text[^>]*>([^<]*)</text>", figure.read_text(encoding="utf-8"))
  spans = [span for text in texts for span in re.findall(r"[\w./]+", text)]
  wrong = [*wrong_files(spans), *wrong_identifiers(spans)]
  assert not wrong, f"{figure.relative_to(ROOT)} names what does not exist: {', '.join(wrong)}"


def wrong_places(page):
  """Of "`a`, `b` in `file.py`": names that the file does not have."""
  text = page.read_text(encoding="utf-8")
  for names, file in re.findall(
    r"((?:`[\w.]+`(?:, | and )?)+) in (?:`\w+` of )?`(?:deepseek_jax/)?([\w/]+\.py)`", text
  ):
    path = ROOT / "deepseek_jax" / file
    words = set(re.findall(r"\w+", path.read_text(encoding="utf-8"))) if path.exists() else set()
    for name in re.findall(r"\w+", names):
      if path.exists() and name not in words:
        yield f"{name} in {file}"


def missing_tests(rows):
  """Rows of tables, as text, without a test in their last column, and names of tests there that do not exist."""
  for row in rows:
    names = re.findall(r"`([\w/]+\.py)::(\w+)`", row.rstrip("| ").rpartition("|")[2])
    if not names:
      yield row
    for file, name in names:
      path = ROOT / file
      if not path.exists() or not re.search(rf"^def {name}\(", path.read_text(encoding="utf-8"), re.M):
        yield f"{file}::{name}"


def test_each_fault_has_its_test():
  text = (ROOT / "docs" / "user_guide" / "faults.md").read_text(encoding="utf-8")
  rows = [line for line in text.splitlines() if line.startswith("|") and not re.match(r"\|(---|.*\| test \|$)", line)]
  assert len(rows) > 40 and not list(missing_tests(rows))
  wrong = [
    "| a | b | `tests/test_docs.py::test_that_is_not_there` |",
    "| a | b | `no/such.py::test_x` |",
    "| `a.py::b` | c |",
  ]
  assert len(list(missing_tests(wrong))) == 3


def test_old_names_of_fields_are_gone():
  for page in PAGES:
    spans, lines = code(page)
    old = [path for path in RENAMED_FIELDS for text in (*spans, *lines) if re.search(rf"(?<![\w.]){path}(?!\w)", text)]
    assert not old, f"{page.relative_to(ROOT)}: {old} have new names"


def test_readme_leads_to_the_expert_dispatch():
  """The way in the README: at most 8 files and 1,000 lines, and its counts are near what the files have."""
  readme = (ROOT / "README.md").read_text(encoding="utf-8")
  lines = {"README.md": readme.count("\n")}
  assert lines["README.md"] <= 150
  way = re.search(r"From here to the expert dispatch.*?\n\n(.*?)\n\n", readme, re.S)[1]
  for name, stated in re.findall(r"`([\w/.]+\.py)`[^|]*\| ([\d,]+) ", way):
    lines[name] = (ROOT / name).read_text(encoding="utf-8").count("\n")
    assert abs(int(stated) - lines[name]) <= 0.2 * lines[name], (
      f"{name} has {lines[name]} lines: bring README.md up to date"
    )
  assert "deepseek_jax/model/expert_parallel.py" in lines
  assert len(lines) <= 8 and sum(lines.values()) <= 1000, lines
