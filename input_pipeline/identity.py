"""Digests of data: whether what lies behind a path is still what a run began with.

Arrays and names count by content. Images that stay on disk count by their paths, sizes and samples
of their content, so that an ImageNet takes a minute or two, and a copy on another machine counts as
the same. Times of modification are no part of it: copying changes them.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from memdiff.errors import DataError

_BLOCK = 4096  # bytes read at the start, in the middle and at the end of a sampled file
_SAMPLED = 50_000  # files of which blocks are read, evenly spread; of all others the size
_THREADS = 16  # they wait for the disk
_CHUNK = 256  # files per task of a thread


def digest(value: Any) -> str:
  """SHA-256, as 64 hexadecimal digits.

  Args:
    value: an array, a tuple of texts, or an object with a `fingerprint()` of its own.
  """
  if isinstance(value, np.ndarray):
    return _of_array(value)
  if isinstance(value, tuple):
    return of_bytes(json.dumps(value).encode())
  return value.fingerprint()


def of_bytes(*parts: bytes) -> str:
  """SHA-256 of `parts`, of which the lengths count as well."""
  found = hashlib.sha256()
  for part in parts:
    found.update(len(part).to_bytes(8, "little"))
    found.update(part)
  return found.hexdigest()


def _of_array(array: np.ndarray) -> str:
  """Of type, shape and content."""
  found = hashlib.sha256(f"{array.dtype.str} {array.shape}".encode())
  found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
  return found.hexdigest()


def spread(number: int, at_most: int) -> np.ndarray:
  """Up to `at_most` of the indices below `number`, evenly spread, first and last included."""
  return np.unique(np.linspace(0, number - 1, min(number, at_most)).round().astype(np.int64))


def of_file(path: str | os.PathLike) -> str:
  """SHA-256 of the whole content of a file.

  Raises:
    DataError: if it cannot be read.
  """
  try:
    with open(path, "rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()
  except OSError as error:
    raise DataError(f"Cannot read the file {path} ({error.strerror}).") from error


def of_path(path: str | os.PathLike) -> str:
  """SHA-256 of a file, or of the files in a folder as `of_files` has it."""
  if not os.path.isdir(path):
    return of_file(path)
  found = (os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
  return of_files(sorted(found))


def of_files(paths: Sequence[str | os.PathLike]) -> str:
  """SHA-256 of files, in order: paths below their common folder, sizes, and samples of content.

  Three blocks of 4 KiB are read of each of up to 50,000 files, evenly spread.

  Raises:
    DataError: naming a file that is gone or cannot be read.
  """
  paths = [os.fspath(path) for path in paths]
  if not paths:
    return of_bytes()
  root = os.path.commonpath({os.path.dirname(path) for path in paths})
  sampled = np.zeros(len(paths), bool)
  sampled[spread(len(paths), _SAMPLED)] = True

  def of_chunk(start: int) -> bytes:
    chunk = range(start, min(start + _CHUNK, len(paths)))
    return b"".join(_of_file(paths[i], root, sampled[i]) for i in chunk)

  with ThreadPoolExecutor(_THREADS) as pool:
    return of_bytes(*pool.map(of_chunk, range(0, len(paths), _CHUNK)))


def _of_file(path: str, root: str, sampled: bool) -> bytes:
  """SHA-256 of path, size and, if `sampled`, three blocks, which may overlap."""
  found = hashlib.sha256(os.fsencode(path[len(root) :]))
  try:
    size = os.stat(path).st_size
    found.update(b"\0%d\0" % size)
    if sampled:
      with open(path, "rb", buffering=0) as file:
        for start in (0, (size - _BLOCK) // 2, size - _BLOCK):
          file.seek(max(start, 0))
          found.update(file.read(_BLOCK))
  except OSError as error:
    raise DataError(f"Cannot read the file {path} ({error.strerror}).") from error
  return found.digest()
