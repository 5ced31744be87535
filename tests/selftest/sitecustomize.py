"""Python imports a module of this name at its start, from a folder in PYTHONPATH.

The programs of the package get the fake accelerator. A launcher, which computes nothing, need not import jax for it.
"""

import sys

if sys.orig_argv[1] == "-m" and sys.orig_argv[2].startswith("deepseek_jax."):
  import fake_accelerator  # noqa: F401  (imported for its replacements)
