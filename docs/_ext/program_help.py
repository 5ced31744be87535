"""The directive `program-help`: the flags that a program prints on --help, without the config fields."""

import contextlib
import importlib
import io

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class ProgramHelp(SphinxDirective):
  """`{program-help} deepseek_jax.train [COMMAND]`: that module's `main` is called with --help."""

  required_arguments, optional_arguments = 1, 1

  def run(self):
    module, *command = self.arguments
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
      importlib.import_module(module).main([module, *command, "--help"])
    block = text.getvalue().partition("\nConfig fields")[0].strip()
    return [nodes.literal_block(block, block, language="text")]


def setup(app: Sphinx):
  app.add_directive("program-help", ProgramHelp)
  return {"parallel_read_safe": True, "parallel_write_safe": True}
