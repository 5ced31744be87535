"""Executes the notebooks of this folder, as `make colabs` does:  python colabs/execute.py [--smoke] [NAME ...]

Each runs from its first cell to its last in a kernel of its own, in an empty folder; a cell that raises is an error, exit
code 1. --smoke: the smallest sizes, as in CI. --out=FOLDER keeps the executed notebooks, to look at their figures.
Needs the extras `colab` and `notebook-tests` of pyproject.toml.
"""

import argparse
import os
import pathlib
import sys
import tempfile
import time

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

FOLDER = pathlib.Path(__file__).resolve().parent
CELL_SECONDS = 1200  # of one cell


def main() -> int:
  """Returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("names", nargs="*", help="notebooks, without .ipynb; default: all")
  parser.add_argument("--smoke", action="store_true", help="the smallest sizes")
  parser.add_argument("--out", type=pathlib.Path, help="folder of the executed notebooks")
  options = parser.parse_args()
  notebooks = {path.stem: path for path in sorted(FOLDER.glob("*.ipynb"))}
  if unknown := set(options.names) - set(notebooks):
    parser.error(f"no notebook {', '.join(sorted(unknown))}; there are {', '.join(notebooks)}")
  failed = []
  for name in options.names or notebooks:
    start = time.monotonic()
    error = execute(notebooks[name], options.smoke, options.out)
    print(f"{name}: {error or 'ran'} ({time.monotonic() - start:.0f} s)", flush=True)
    failed += [name] if error else []
  if failed:
    print(f"error: {len(failed)} of {len(options.names or notebooks)} notebooks failed: {', '.join(failed)}")
  return 1 if failed else 0


def execute(path: pathlib.Path, smoke: bool, out: pathlib.Path | None) -> str | None:
  """Executes the notebook at `path` and returns what went wrong."""
  notebook = nbformat.read(path, as_version=4)
  environment = os.environ | {"DEEPSEEK_JAX_SMOKE": "1" if smoke else "0", "PYTHONPATH": str(FOLDER.parent)}
  with tempfile.TemporaryDirectory() as folder:
    client = NotebookClient(
      notebook, timeout=CELL_SECONDS, kernel_name="python3", resources={"metadata": {"path": folder}},
      extra_arguments=["--IPKernelApp.log_level=40"],  # not that its sockets on this machine are not encrypted
    )  # fmt: skip
    try:
      client.execute(env=environment)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
      return f"failed\n{error}\n"
    finally:
      if out:
        out.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, out / path.name)
  return None


if __name__ == "__main__":
  sys.exit(main())
