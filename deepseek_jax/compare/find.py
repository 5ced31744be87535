"""Finds runs: by folder, by glob, by URL, and in folders that hold runs."""

import fnmatch
import glob
import os
import re
from collections.abc import Iterator, Sequence

from deepseek_jax.console import printable
from deepseek_jax.storage import ObjectStore, is_url
from deepseek_jax.training.metrics import EVENTS, METRICS
from deepseek_jax.training.run_records import CONFIG

RUN_FILES = (CONFIG, METRICS, EVENTS)
PassedOver = tuple[str, str]  # (path or URL, why)


def find_runs(place: str) -> tuple[list[str], list[PassedOver]]:
  """(folders or URLs of the runs at `place`, what is no run there).

  Args:
    place: the folder of a run, a folder with runs in it at any depth, a glob of these, or a URL of either, gs:// or
      s3://, in which names may have wildcards too.

  Raises StorageError for a bucket that cannot be listed.
  """
  if is_url(place):
    runs = _in_bucket(place)
    return runs, [] if runs else [(place, "no run is there")]
  paths = [place] if os.path.exists(place) else sorted(glob.glob(place, recursive=True), key=natural_order)
  if not paths:
    return [], [(place, "no such folder" if not glob.has_magic(place) else "matches nothing")]
  runs, passed_over = [], []
  for path in paths:
    if not os.path.isdir(path):
      passed_over.append((path, "expected the folder of a run, got a file"))
      continue
    unread: list[PassedOver] = []
    found = list(_below(path, unread))
    runs += found
    passed_over += unread if found or unread else [(path, "no run is in this folder")]
  return runs, passed_over


def short_names(runs: Sequence[str]) -> list[str]:
  """A name for each of the folders `runs`: its path without what all have in common, for people."""
  split = [[part for part in re.split(r"[/\\]", run) if part not in ("", ".")] for run in runs]
  shared = 0
  while all(len(parts) > shared + 1 and parts[shared] == split[0][shared] for parts in split):
    shared += 1
  return [printable("/".join(parts[shared:]) or run) for parts, run in zip(split, runs, strict=True)]


def natural_order(text: str) -> list[tuple[int, int | str]]:
  """Key that sorts run-2 before run-10."""
  return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", text)]


def _below(folder: str, unread: list[PassedOver]) -> Iterator[str]:
  """The folders of runs at or below `folder`, in natural order. Runs hold no runs. Adds to `unread` what cannot be listed.

  Hidden folders are passed by, and links to a folder above, which would have no end.
  """
  if any(os.path.isfile(os.path.join(folder, name)) for name in RUN_FILES):
    yield folder
    return
  try:
    names = sorted(os.listdir(folder), key=natural_order)
  except OSError as error:
    unread.append((folder, f"cannot be listed: {error.strerror}"))
    return
  here = os.path.join(os.path.realpath(folder), "")
  for name in names:
    path = os.path.join(folder, name)
    if os.path.isdir(path) and not name.startswith(".") and not here.startswith(f"{os.path.realpath(path)}/"):
      yield from _below(path, unread)


def _in_bucket(url: str) -> list[str]:
  """URLs of the runs at or below `url`, in natural order."""
  scheme, _, path = url.rstrip("/").partition("://")
  parts = path.split("/")
  first_wildcard = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
  base, pattern = "/".join(parts[:first_wildcard]), parts[first_wildcard:]
  store = ObjectStore(f"{scheme}://{base}")
  if not pattern and any(store.exists(name) for name in RUN_FILES):
    return [url.rstrip("/")]
  folders: list[list[str]] = []
  for folder in {name.rpartition("/")[0] for name in store.list_names() if name.rpartition("/")[2] in RUN_FILES}:
    folder_parts = folder.split("/")
    if all(fnmatch.fnmatchcase(*pair) for pair in zip(folder_parts, pattern, strict=False)) and folder:
      if len(folder_parts) >= len(pattern):
        folders.append(folder_parts)
  runs = sorted("/".join(parts) for parts in folders)
  top = [run for run in runs if not any(run.startswith(f"{other}/") for other in runs)]
  return [f"{scheme}://{base}/{run}" for run in sorted(top, key=natural_order)]
