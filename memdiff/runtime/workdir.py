"""The workdir of a run: one folder and one manifest per phase, a lock, atomic writes.

A phase's manifest is written when it begins (with the part of the config it depends on), whenever a
process begins or ends its work on it (with the time that it took), and when it has finished. The
same command resumes at the first unfinished phase; a changed config for a phase that has begun is
refused with the differing fields named. Digests of the data belong to the config, under names that
begin with `data/`.
"""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import jax
import numpy as np

from memdiff import paths
from memdiff.errors import WorkdirError
from memdiff.runtime import distributed

DATA = "data/"  # begins the names of digests of data
_PARTS = {"train": "training", "holdout": "held-out", "left_out": "left-out"}
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)  # what flock says of another's lock


@contextlib.contextmanager
def writing(path: pathlib.Path):
  """Turns a failure to write `path` into a sentence: a full disk, a missing right."""
  try:
    yield
  except OSError as error:
    raise WorkdirError(
      f"Cannot write {path} ({error.strerror}); make room there or choose another --workdir, then"
      " run the same command again: finished phases are kept."
    ) from error


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[BinaryIO]:
  """A file to write that becomes `path` at the end: a kill leaves the old content or the new."""
  partial = path.with_name(path.name + ".partial")
  with writing(path):
    with partial.open("wb") as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(partial, path)


def write_atomically(path: pathlib.Path, data: bytes | memoryview) -> None:
  """Writes a file by `replacing` it. Of several processes the main one writes."""
  if distributed.is_main():
    with replacing(path) as file:
      file.write(data)


def write_json(path: pathlib.Path, value: Any) -> None:
  text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
  write_atomically(path, text.encode(errors="backslashreplace"))  # of names that are no UTF-8


def write_arrays(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes a .npz file by `replacing` it. Of several processes the main one writes."""
  if distributed.is_main():
    with replacing(path) as file:
      np.savez(file, **{name: np.asarray(value) for name, value in arrays.items()})


def read_arrays(path: pathlib.Path, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
  """Reads a .npz file, or the arrays of some names in it; nothing is unpickled."""
  try:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
      return {name: arrays[name] for name in (arrays.files if names is None else names)}
  except Exception as error:  # zipfile and zlib raise many types for torn files
    raise _cannot_read(path, error) from error


def read_json(path: pathlib.Path) -> Any:
  """Reads a .json file that a phase has written."""
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise _cannot_read(path, error) from error


def _cannot_read(path: pathlib.Path, error: Exception) -> WorkdirError:
  """A phase whose manifest is gone runs again, and makes what is missing of its files."""
  manifests = (folder / "manifest.json" for folder in path.parents)
  files = [path, *[manifest for manifest in manifests if manifest.exists()][:1]]
  return WorkdirError(
    f"Cannot read {path} ({error}); remove {' and '.join(map(str, files))} and run the same command"
    " again."
  )


class Workdir:
  """One run's folder, which all its processes see; the main one holds its lock until `close`."""

  def __init__(self, path: str):
    self.path = paths.workdir(path)
    self._lock = _lock(self.path) if distributed.is_main() else None
    distributed.barrier("workdir")
    if not self.path.is_dir():
      raise WorkdirError(
        f"Process {jax.process_index()} does not see the workdir {path}, which process 0 made;"
        " choose a --workdir on a file system that all hosts share."
      )

  def close(self) -> None:
    if self._lock is not None:
      self._lock.close()

  def folder(self, phase: str) -> pathlib.Path:
    return self.path / phase

  def manifest(self, phase: str) -> dict[str, Any] | None:
    """What a phase left of itself, or None if it never began."""
    path = self.folder(phase) / "manifest.json"
    if not path.exists():
      return None
    try:
      manifest = json.loads(path.read_text(encoding="utf-8"))
      dict(manifest["config"]), manifest["finished"]  # both are there
      return manifest
    except (ValueError, KeyError, TypeError):
      raise WorkdirError(f"{path} is damaged; remove it to run the phase again.") from None

  def begin(self, phase: str, config: Mapping[str, Any]) -> bool:
    """Announces that `phase` is to run with `config` (flat: field name -> value).

    Returns:
      True if the phase has already finished with this very config.

    Raises:
      WorkdirError: if it ran, or began, with another config, or another process has another one.
    """
    manifest = self.manifest(phase)
    distributed.barrier(f"manifest of {phase}")  # before the main process writes it
    config = json.loads(json.dumps(config))
    if manifest is None:
      if not distributed.has_main(json.dumps(config, sort_keys=True)):
        raise WorkdirError(
          f"Process {jax.process_index()} was started with another config than process 0, or reads"
          " other data; start the same command on every host, and give all the same data."
        )
      with writing(self.folder(phase)):
        self.folder(phase).mkdir(parents=True, exist_ok=True)
        if distributed.is_main():  # of what was here before
          (self.path / "report.json").unlink(missing_ok=True)
      write_json(self.folder(phase) / "manifest.json", {"config": config, "finished": False})
      return False
    old = manifest["config"]
    if changed := [n for n in sorted(old.keys() | config.keys()) if old.get(n) != config.get(n)]:
      raise WorkdirError(
        f"Phase {phase} in {self.path} was run with"
        f" {_difference(changed, old, config, self.folder(phase))}."
      )
    return manifest["finished"]

  def add(self, phase: str, numbers: Mapping[str, float]) -> None:
    """Adds numbers, such as seconds, to what the manifest of `phase` has under their names."""
    if distributed.is_main():
      manifest = self.manifest(phase)
      sums = {name: round(manifest.get(name, 0) + x, 3) for name, x in numbers.items()}
      write_json(self.folder(phase) / "manifest.json", manifest | sums)

  def finish(self, phase: str, record: Mapping[str, Any]) -> None:
    """Marks `phase` finished; `record` (versions, metrics) joins its manifest."""
    if distributed.is_main():
      manifest = self.manifest(phase) | {"finished": True} | dict(record)
      write_json(self.folder(phase) / "manifest.json", manifest)
    distributed.barrier(f"{phase} finished")


def _difference(changed: Sequence[str], old: Mapping, new: Mapping, folder: pathlib.Path) -> str:
  """What the `changed` names of two flat configs mean, and what to do about it."""
  data = [name for name in changed if name.startswith(DATA)]
  if data and not any(name.startswith(DATA) for name in old):
    return "an older memdiff, which did not record its data; use a new --workdir"
  fields = [
    f"{name} was {old.get(name)!r} and is now {new.get(name)!r}"
    for name in changed
    if name not in data
  ]
  config = f"another config ({'; '.join(fields)})"
  if not data:
    return f"{config}; use a new --workdir, or remove {folder} and the phases after it"
  others = f"other data (changed since: {', '.join(map(_in_words, data))})"
  if not fields:
    return f"{others}; put the data back, or use a new --workdir"
  return f"{config} and {others}; use a new --workdir"


def _in_words(name: str) -> str:
  """`data/left_out_images` -> `the left-out images`."""
  name = name.removeprefix(DATA)
  for part, word in _PARTS.items():
    if name.startswith(f"{part}_"):
      name = word + name.removeprefix(part)
  return f"the {name.replace('_', ' ')}"


def _lock(path: pathlib.Path):
  """Makes the folder and locks it; the lock ends with the process, however that ends."""
  try:
    path.mkdir(parents=True, exist_ok=True)
    lock = (path / ".lock").open("wb")
  except OSError as error:
    raise WorkdirError(
      f"Cannot use the workdir {path} ({error.strerror}); choose another --workdir."
    ) from error
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    if error.errno not in _HELD:  # Lustre and NFS may have no locks
      print(
        f"note: there are no locks in {path} ({error.strerror}), so that a second run there would"
        " not be noticed; start only one.",
        file=sys.stderr,
        flush=True,
      )
      return lock
    lock.close()
    raise WorkdirError(
      f"Another run is working in {path}; wait for it, or choose another --workdir."
    ) from None
  return lock
