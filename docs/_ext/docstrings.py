"""Docstrings are plain text: here they become reStructuredText. The directive `api-modules` documents modules."""

import pathlib
import re

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import nested_parse_with_titles

ROOT = pathlib.Path(__file__).resolve().parents[2]
SECTION = re.compile(r"(Args|Returns|Raises|Attributes|Yields):$")
RESULT = re.compile(r"\s+[\w\\]+: ")  # an item of a section, escaped
BULLET = re.compile(r"\s*(-|\d+\.) +")
# Of other platforms, programs, and what only the modules beside them use.
PRIVATE = re.compile(r"__main__|__init__|pallas_|hopper|libraries|child$|\._")


def escaped(text):
  """`text` with its `code` as literals, and nothing else that reStructuredText would read as markup."""
  parts = re.split(r"(`[^`]+`)", text)
  return "".join(f"`{part}`" if part[:1] == "`" else re.sub(r"([*_|\\`])", r"\\\1", part) for part in parts)


def indentation(line):
  return len(line) - len(line.lstrip())


def reformat(app, what, name, obj, options, lines):
  """In place: escapes markup, makes indented paragraphs literal blocks, leaves sections such as Args to napoleon."""
  result, in_section, in_block, item, blank = [], "", False, None, True
  for line in lines:
    if not line.strip():
      result.append("")
      blank = True
      continue
    indent = indentation(line)
    if not indent:
      in_section, in_block = line if SECTION.match(line) else "", False
    if in_section == "Returns:" and not blank and RESULT.match(result[-1]) and indent > indentation(result[-1]):
      result[-1] += " " + escaped(line.strip())  # napoleon reads the items of Returns as one paragraph
    elif in_section:
      result.append(escaped(line) if indent else line)
    elif bullet := BULLET.match(line):
      if item is None and not blank:
        result.append("")
      item = indent
      result.append(bullet[0].strip() + " " + escaped(line[bullet.end() :]))
    elif item is not None and indent > item:
      result.append(" " * len(BULLET.match(result_item(result))[0].rstrip() + " ") + escaped(line.strip()))
    elif indent and (in_block or blank):
      if not in_block:
        result += ["::", ""]
        in_block = True
      result.append(line)
    else:  # a continuation line that is indented belongs to its paragraph
      if item is not None and not blank:
        result.append("")
      item = None
      result.append(escaped(line.strip()))
    blank = False
  lines[:] = result


def result_item(lines):
  """The last line that begins an item of a list."""
  return next(line for line in reversed(lines) if BULLET.match(line))


def module_names(name):
  """The module `name`, or the public modules of that package, in alphabetical order.

  Few packages have an __init__.py.
  """
  folder = ROOT / name.replace(".", "/")
  if not folder.is_dir():
    return [name]
  files = sorted(folder.rglob("*.py"))
  found = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
  return [module for module in found if not PRIVATE.search(module)]


class ApiModules(SphinxDirective):
  """`.. api-modules:: deepseek_jax.model deepseek_jax.sharding`: a section for each module, with its public members."""

  required_arguments = 1
  final_argument_whitespace = True

  def run(self):
    lines = []
    for package in self.arguments[0].split():
      for name in module_names(package):
        lines += [
          f"``{name}``",
          "-" * (len(name) + 4),
          "",
          f".. automodule:: {name}",
          "   :members:",
          "   :special-members: __call__",
          "",
        ]
    container = nodes.section()
    container.document = self.state.document
    nested_parse_with_titles(self.state, StringList(lines, source="api-modules"), container)
    return container.children


def setup(app: Sphinx):
  app.add_directive("api-modules", ApiModules)
  app.connect("autodoc-process-docstring", reformat, priority=400)  # before napoleon, at 500
  return {"parallel_read_safe": True, "parallel_write_safe": True}
