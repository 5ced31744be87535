"""The notebooks as files: what every one of them has, without executing them (`make colabs` does)."""

import ast
import json
import pathlib
import re
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "colabs").glob("*.ipynb"))
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
LONGEST_DEFINITION = 12  # lines; what is longer belongs into the library
LINK = re.compile(r"\]\(([^)\s]+)\)")


def cells(path, kind):
  return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def definitions(path):
  """(name, lines) of each function and class that the notebook defines."""
  for source in cells(path, "code"):
    for node in ast.walk(ast.parse(re.sub(r"^[%!].*$", "pass", source, flags=re.MULTILINE))):
      if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name, node.end_lineno - node.lineno + 1


def test_there_are_notebooks():
  assert len(NOTEBOOKS) >= 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
  def test_it_begins_with_its_badge_and_what_the_reader_will_have(self, path):
    first = cells(path, "markdown")[0]
    blob = f"{REPOSITORY.replace('https://github.com', 'https://colab.research.google.com/github')}/blob/main/colabs/{path.name}"
    assert first.startswith("# ") and f"]({blob})" in first and "**At the end you have**" in first

  def test_its_first_cell_installs_the_project_and_finds_the_device(self, path):
    first = cells(path, "code")[0]
    assert first == cells(NOTEBOOKS[0], "code")[0] and f"git+{REPOSITORY}" in first and "find_device()" in first

  def test_it_is_saved_without_outputs(self, path):
    for cell in json.loads(path.read_text())["cells"]:
      assert cell["cell_type"] != "code" or (cell["outputs"], cell["execution_count"]) == ([], None)

  def test_its_links_lead_somewhere(self, path):
    links = [link for text in cells(path, "markdown") for link in LINK.findall(text)]
    for link in (link for link in links if "://" not in link):
      assert (path.parent / link.partition("#")[0]).exists(), link
    assert all(link.startswith("https://") for link in links if "://" in link)

  def test_it_defines_nothing_that_the_library_should(self, path):
    assert [(name, lines) for name, lines in definitions(path) if lines > LONGEST_DEFINITION] == []
