"""The directive `config-reference`: every config field, from the dataclasses. Names of fields on pages link to it."""

import typing

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.docutils import SphinxDirective

from deepseek_jax.config import Config
from deepseek_jax.schema import leaf_paths

PAGE = "reference/config"
COLUMNS = (("field", 24), ("type", 12), ("default", 16), ("limits", 16), ("meaning", 48))
LIMITS = {
  "at_least": "at least",
  "at_most": "at most",
  "above": "above",
  "below": "below",
  "path_inside": "a path inside",
}


def anchor(path):
  return "config-" + path.replace(".", "-").replace("_", "-")


def limits(metadata):
  """The limits of a field as text: `at least 0, below 1`, or its choices."""
  if "choices" in metadata:
    return ", ".join(map(str, metadata["choices"]))
  return ", ".join(f"{LIMITS[name]} {bound}" for name, bound in metadata.items() if name in LIMITS)


def type_name(kind):
  if typing.get_origin(kind) is tuple:
    return f"{typing.get_args(kind)[0].__name__}, ..."
  return kind.__name__


class ConfigReference(SphinxDirective):
  """A section with a table for each config section."""

  def run(self):
    sections = {}
    for path, field in leaf_paths(Config).items():
      sections.setdefault(path.rpartition(".")[0], []).append((path, field))
    return [self.section(name, fields) for name, fields in sections.items()]

  def section(self, name, fields):
    section = nodes.section(ids=[anchor(name or "top-level")])
    section += nodes.title("", "", nodes.literal(text=name) if name else nodes.Text("Top level"))
    group = nodes.tgroup(cols=len(COLUMNS))
    group += [nodes.colspec(colwidth=width) for _, width in COLUMNS]
    group += nodes.thead("", self.row([nodes.Text(title) for title, _ in COLUMNS]))
    body = nodes.tbody()
    for path, field in fields:
      cells = [nodes.literal(text=path.rpartition(".")[2]), nodes.Text(type_name(field.type))]
      cells += [
        nodes.literal(text=repr(field.default)),
        nodes.Text(limits(field.metadata)),
        nodes.Text(field.metadata["doc"]),
      ]
      body += self.row(cells, ids=[anchor(path)])
    group += body
    section += nodes.table("", group)
    return section

  def row(self, cells, **attributes):
    return nodes.row("", *(nodes.entry("", nodes.paragraph("", "", cell)) for cell in cells), **attributes)


class FieldLinks(SphinxPostTransform):
  """A literal `model.moe.score` or `--config.model.moe.score=...` becomes a link to its row."""

  default_priority = 900

  def run(self, **kwargs):
    if self.env.docname == PAGE or self.app.builder.format != "html":
      return
    fields = leaf_paths(Config)
    for literal in list(self.document.findall(nodes.literal)):
      path = literal.astext().removeprefix("--config.").partition("=")[0]
      if path in fields and "." in literal.astext() and not isinstance(literal.parent, nodes.reference):
        uri = f"{self.app.builder.get_relative_uri(self.env.docname, PAGE)}#{anchor(path)}"
        literal.replace_self(nodes.reference("", "", literal.deepcopy(), refuri=uri, internal=True))


def setup(app: Sphinx):
  app.add_directive("config-reference", ConfigReference)
  app.add_post_transform(FieldLinks)
  return {"parallel_read_safe": True, "parallel_write_safe": True}
