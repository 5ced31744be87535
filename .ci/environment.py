"""Makes a virtual environment with what this checkout needs, unless exactly that was done before.

  python3 .ci/environment.py .venv          # requirements.txt
  python3 .ci/environment.py .venv test     # and the extra `test` of pyproject.toml; more of them may follow

The interpreter that runs this file is the one that the environment gets. A stamp in the environment says what is in it,
so that the package index is asked only when something changed; another interpreter builds the environment anew.
Nothing but the standard library is imported, and old interpreters can parse this file: they are told their age.
"""

import json
import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
LEAST = (3, 11)
# -qq: errors only. A warning of pip is about its own settings, and here nobody can act on it.
# --no-compile: Python compiles what is imported, when it is; all of it takes as long as the rest of the installation.
PIP = ["-m", "pip", "install", "-qq", "--no-compile", "--disable-pip-version-check", "--no-input"]


def main(folder, extras):
  version = ".".join(map(str, sys.version_info[:3]))
  if sys.version_info < LEAST:
    sys.exit(f"error: {sys.executable} is Python {version}; 3.11 or newer is needed: make PYTHON=python3.12 ...")
  wanted = {"python": f"{version} in {sys.base_prefix}", "requirements": requirements(extras)}
  stamp, python = folder / "deepseek_jax.json", folder / "bin" / "python"
  found = read(stamp)
  if found.get("python") != wanted["python"] or not runs(python):
    make(folder, version, clear=stamp.exists())
    stamp.write_text(json.dumps({"python": wanted["python"], "requirements": []}))
  elif set(wanted["requirements"]) <= set(found["requirements"]):
    return
  started = time.monotonic()
  print(f"installing into {folder}: once, up to a few minutes", flush=True)
  if subprocess.call([python, *PIP, *wanted["requirements"]], stdin=subprocess.DEVNULL):
    sys.exit("error: pip failed, see above; with a package index within reach, the same command goes on from here")
  stamp.write_text(json.dumps(wanted, indent=2))
  print(f"installed in {time.monotonic() - started:.0f} s", flush=True)


def requirements(extras):
  """Requirement specifiers of requirements.txt and of the named extras."""
  import tomllib  # only here: older interpreters have none

  lines = [line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
  optional = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
  return [line for line in lines if line] + [line for extra in extras for line in optional[extra]]


def read(stamp):
  try:
    return json.loads(stamp.read_text())
  except (OSError, ValueError):  # none yet, or cut short: the environment is made again
    return {}


def runs(python):
  return python.exists() and subprocess.call([python, "-c", "import pip"], stdin=subprocess.DEVNULL) == 0


def make(folder, version, clear):
  """A fresh environment; `clear` empties one that this file made. What is no environment is never touched."""
  if folder.exists() and os.listdir(folder) and not (folder / "pyvenv.cfg").exists():
    sys.exit(f"error: {folder} exists and is no virtual environment: make VENV=another-folder ...")
  print(f"making {folder} with Python {version}", flush=True)
  command = [sys.executable, "-m", "venv", *(["--clear"] if clear else []), str(folder)]
  if subprocess.call(command, stdin=subprocess.DEVNULL):
    sys.exit(
      f"error: `{sys.executable} -m venv` failed, see above; on Debian and Ubuntu: apt install python3-venv, or name "
      "another interpreter: make PYTHON=python3.12 ..."
    )


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]), sys.argv[2:])
