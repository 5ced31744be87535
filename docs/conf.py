"""Sphinx builds these pages:  make docs"""

import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the API reference imports modules, and no device may be opened for that

project = "deepseek_jax"
author = "The deepseek_jax Authors"
copyright = author

extensions = [
  "myst_parser",
  "sphinx.ext.autodoc",
  "sphinx.ext.napoleon",
  "config_reference",
  "docstrings",
  "program_help",
]
exclude_patterns = ["_ext"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3  # links to headings, as GitHub has them

napoleon_use_ivar = True  # attributes in a docstring may be properties with docs of their own
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_mock_imports = ["datasets", "lm_eval"]  # of the extra lm-eval, which these pages do without
add_module_names = False
toc_object_entries = False  # hundreds of functions in the sidebar of each page cost a third of the build
python_use_unqualified_type_names = True

nitpicky = True
nitpick_ignore_regex = [("py:.*", ".*")]  # types of other projects: their indexes would have to be fetched

html_theme = "furo"
html_title = "deepseek_jax"
html_copy_source = False
html_show_sphinx = False
