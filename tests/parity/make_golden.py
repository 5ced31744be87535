"""Writes golden/CASE.npz, the outputs of transformers for test_golden.py, for the named cases or for all:

.venv-parity/bin/python -m tests.parity.make_golden [CASE ...]
"""

import pathlib
import sys
import tempfile

import numpy as np

from tests.parity.cases import CASES
from tests.parity.digest import digest
from tests.parity.reference import compute
from tests.parity.weights import make_modules, write_folder

GOLDEN = pathlib.Path(__file__).parent / "golden"


def main(names):
  for name in names or CASES:
    with tempfile.TemporaryDirectory() as folder:
      write_folder(pathlib.Path(folder), CASES[name])
      outputs = compute(pathlib.Path(folder), CASES[name], make_modules(CASES[name]))
    path = GOLDEN / f"{name}.npz"
    np.savez_compressed(path, **digest(outputs))
    print(f"{name:18} loss {outputs['loss']:.9f}  {path.stat().st_size / 1000:.0f} KB", flush=True)


if __name__ == "__main__":
  main(sys.argv[1:])
