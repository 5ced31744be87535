"""manifest.json: size and checksum of every file of a step, because Orbax restores damaged arrays without an error.

CRC-32 detects accidental damage, which is all that a manifest beside its data can detect. It is also the fastest in the
standard library (one thread, 256 MiB in memory: crc32 6081 MiB/s, sha256 1812, blake2b 1235).
"""

import concurrent.futures
import json
import os
import pathlib
import stat
import zlib
from collections.abc import Iterator, Mapping, Set
from typing import NoReturn

NAME = "manifest.json"
FORMAT = 1
# Orbax rewrites the last two while it commits, after the manifest exists; they hold no state and no restore reads them.
UNLISTED = {NAME, "_CHECKPOINT_METADATA", "commit_success.txt"}
_READ_BYTES = 1 << 20
_THREADS = 8

Files = Mapping[str, tuple[int, str]]  # name relative to the step -> (size in bytes, CRC-32 as eight hex digits)


def write_manifest(step_dir: str | pathlib.Path) -> None:
  """Writes `step_dir`/manifest.json atomically: size and CRC-32 of every file below `step_dir`."""
  step_dir = pathlib.Path(step_dir)
  names = sorted(_list_step_files(step_dir))
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    checksums = list(pool.map(_crc32_hex, [step_dir / name for name in names]))
  files = {name: ((step_dir / name).stat().st_size, crc) for name, crc in zip(names, checksums, strict=True)}
  partial = step_dir / (NAME + ".tmp")
  with open(partial, "w", encoding="utf-8") as f:
    f.write(to_json_text(files))
    f.flush()
    os.fsync(f.fileno())
  os.replace(partial, step_dir / NAME)


def to_json_text(files: Files) -> str:
  """The content of the manifest of `files`."""
  entries = {name: {"size": size, "crc32": crc} for name, (size, crc) in files.items()}
  return json.dumps({"format": FORMAT, "files": entries}, indent=1)


def verify(step_dir: str | pathlib.Path) -> str | None:
  """None when every file of `step_dir` is as its manifest says; else one line: which is not, and how it differs."""
  step_dir = pathlib.Path(step_dir)
  if not step_dir.is_dir():
    return "it is not a directory"
  try:
    names = set(_list_step_files(step_dir))
    if not names and not (step_dir / NAME).exists():
      return "the directory is empty"
    listed, reason = _read_manifest(step_dir / NAME)
    if listed is None:
      return reason
    return _check_regular(step_dir, names) or compare_names(listed, names) or _compare_contents(step_dir, listed)
  except OSError as error:
    return f"{error.filename or step_dir} cannot be read: {error.strerror}"


def _list_step_files(step_dir: pathlib.Path) -> Iterator[str]:
  """Relative POSIX names of all files and links below `step_dir`, without those that the manifest does not list."""
  for folder, subfolders, names in os.walk(step_dir, onerror=_raise):
    links = [name for name in subfolders if os.path.islink(os.path.join(folder, name))]
    for name in names + links:
      relative = pathlib.Path(folder, name).relative_to(step_dir).as_posix()
      if relative not in UNLISTED:
        yield relative


def _raise(error: OSError) -> NoReturn:
  raise error


def _read_manifest(path: pathlib.Path) -> tuple[Files | None, str | None]:
  try:
    return from_json_bytes(path.read_bytes())
  except FileNotFoundError:
    return None, f"{NAME} is missing"


def from_json_bytes(content: bytes) -> tuple[Files | None, str | None]:
  """(files, None) from the content of a manifest, or (None, reason) where it is not one."""
  try:
    manifest = json.loads(content)
  except (ValueError, RecursionError):
    return None, f"{NAME} is not JSON"
  if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
    return None, f'{NAME} is malformed: no "files"'
  if manifest.get("format") != FORMAT:
    return None, f"{NAME} has format {manifest.get('format')!r}, this code reads {FORMAT}"
  for name, entry in manifest["files"].items():
    components = pathlib.PurePosixPath(name).parts
    canonical = "/".join(components) == name and not name.startswith("/")
    if not components or ".." in components or "\0" in name or not canonical:
      return None, f"{NAME} names {name!r}, which is not a path inside the step"
    if not isinstance(entry, dict) or type(entry.get("size")) is not int or not isinstance(entry.get("crc32"), str):
      return None, f"{NAME} is malformed at {name!r}"
  return {name: (entry["size"], entry["crc32"]) for name, entry in manifest["files"].items()}, None


def _check_regular(step_dir: pathlib.Path, names: Set[str]) -> str | None:
  """None where all are regular files, else which is not."""
  for name in sorted(names):
    if not stat.S_ISREG((step_dir / name).lstat().st_mode):
      return f"{name} is a link or a device, not a file"
  return None


def compare_names(listed: Files, names: Set[str]) -> str | None:
  """None where `names` are the files that a manifest lists, else the first that is missing or not listed."""
  if missing := sorted(listed.keys() - names):
    return f"{missing[0]} is missing"
  if unlisted := sorted(names - listed.keys()):
    return f"{unlisted[0]} is not in {NAME}"
  return None


def _compare_contents(step_dir: pathlib.Path, listed: Files) -> str | None:
  """None where every file has the size and checksum that the manifest lists, else which has not."""
  for name, (size, _) in listed.items():
    actual = (step_dir / name).stat().st_size
    if actual != size:
      return f"{name} has {actual} bytes, {NAME} says {size}"
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    checksums = pool.map(_crc32_hex, [step_dir / name for name in listed])
    for (name, (_, crc)), actual_crc in zip(listed.items(), checksums, strict=True):
      if actual_crc != crc:
        pool.shutdown(cancel_futures=True)
        return f"{name} has checksum {actual_crc}, {NAME} says {crc}"
  return None


def _crc32_hex(path: pathlib.Path) -> str:
  """CRC-32 of a file as eight hex digits, in constant memory; zlib releases the interpreter's lock."""
  crc, buffer = 0, memoryview(bytearray(_READ_BYTES))
  with open(path, "rb", buffering=0) as f:
    while count := f.readinto(buffer):
      crc = zlib.crc32(buffer[:count], crc)
  return f"{crc:08x}"
