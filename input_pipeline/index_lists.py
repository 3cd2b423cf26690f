"""Published lists of training images: index files, and official lists of file names."""

import pathlib
import zipfile

import numpy as np

from memdiff.errors import DataError


def read(path: str, labels: np.ndarray, names: np.ndarray | None) -> np.ndarray:
  """Indices of the listed training images, in the list's order.

  Args:
    path: an .npz file of indices into the official training order, as PATH or PATH:KEY where it
      holds several arrays; or a text file with a file name and a class number per line.
    labels: [N] of the whole training set.
    names: [N] its official file names, or None where it has none.

  Raises:
    DataError: naming the first entry that does not fit, and how many do not.
  """
  if not path:
    raise DataError(
      "config.dataset.profile is list, but config.dataset.list_path is empty; give the file."
    )
  file, _, key = path.partition(".npz:")
  if key or path.endswith(".npz"):
    indices = _read_npz(f"{file}.npz" if key else path, key)
  else:
    indices = _read_names(path, labels, names)
  _check(path, indices, len(labels))
  return indices


def _read_npz(path: str, key: str) -> np.ndarray:
  try:
    with np.load(path, allow_pickle=False) as arrays:
      if key and key not in arrays:
        raise DataError(f"{path} has no array {key!r}; it has {', '.join(arrays)}.")
      if not key and len(arrays.files) != 1:
        raise DataError(
          f"{path} holds several arrays ({', '.join(arrays)}); name one, as in"
          f" {path}:{arrays.files[0]}."
        )
      indices = arrays[key or arrays.files[0]]
  except FileNotFoundError:
    raise DataError(f"There is no file {path} (config.dataset.list_path).") from None
  except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
    raise DataError(f"Cannot read the index list {path} ({error}).") from error
  if indices.ndim != 1 or not np.issubdtype(indices.dtype, np.integer):
    raise DataError(
      f"The index list {path} has shape {indices.shape} and type {indices.dtype}; it must be one"
      " row of whole numbers."
    )
  return indices.astype(np.int64)


def _read_names(path: str, labels: np.ndarray, names: np.ndarray | None) -> np.ndarray:
  try:
    lines = [line.split() for line in pathlib.Path(path).read_text().splitlines() if line.strip()]
  except FileNotFoundError:
    raise DataError(f"There is no file {path} (config.dataset.list_path).") from None
  except (OSError, UnicodeDecodeError) as error:
    raise DataError(f"Cannot read the list {path} ({error}).") from error
  if names is None:
    raise DataError(
      f"{path} lists file names, but this data set has none; give an .npz file of indices."
    )
  bad = next((n for n, line in enumerate(lines) if len(line) != 2 or not line[1].isdigit()), None)
  if bad is not None:
    raise DataError(
      f"Line {bad + 1} of {path} is {' '.join(lines[bad])!r}, but must be a file name and a class"
      " number."
    )
  depth = max(len(_parts(str(name))) for name in names[:100])
  place = {_parts(str(name)): i for i, name in enumerate(names)}
  listed = [_parts(name)[-depth:] for name, _ in lines]
  unknown = [n for n, parts in enumerate(listed) if parts not in place]
  if unknown:
    raise DataError(
      f"{len(unknown)} of {len(lines)} files in {path} are not in the training set, the first is"
      f" {lines[unknown[0]][0]}."
    )
  indices = np.array([place[parts] for parts in listed], np.int64)
  wrong = np.flatnonzero(labels[indices] != np.array([int(label) for _, label in lines]))
  if len(wrong):
    name, label = lines[wrong[0]]
    raise DataError(
      f"{path} gives {name} the class {label}, but the data set has {labels[indices[wrong[0]]]};"
      f" {len(wrong)} of {len(lines)} lines disagree."
    )
  return indices


def _parts(name: str) -> tuple[str, ...]:
  """Folders and file, from the outermost."""
  return tuple(part for part in name.split("/") if part not in ("", "."))


def _check(path: str, indices: np.ndarray, size: int) -> None:
  outside = np.flatnonzero((indices < 0) | (indices >= size))
  if len(outside):
    raise DataError(
      f"{len(outside)} of {len(indices)} indices in {path} lie outside the training set of {size}"
      f" images, the first is {indices[outside[0]]}."
    )
  values, counts = np.unique(indices, return_counts=True)
  if (counts > 1).any():
    raise DataError(
      f"{(counts > 1).sum()} images stand more than once in {path}, the first is index"
      f" {values[counts > 1][0]}."
    )
  if not len(indices):
    raise DataError(f"The list {path} is empty.")
