"""Published lists of training images: index files, and official lists of file names."""

import os
import pathlib
import zipfile
import zlib

import numpy as np

from memdiff.errors import DataError


def read(path: str, labels: np.ndarray, names: np.ndarray | None) -> np.ndarray:
  """Indices of the listed training images, in the list's order.

  Args:
    path: an .npz file of indices into the official training order, as PATH or PATH:KEY where it
      holds several arrays; or a text file with a file name and a class number per line.
    labels: [N] of the whole training set.
    names: [N] its official file names, or None if it has none.

  Raises:
    DataError: naming the first entry that does not fit, and how many do not.
  """
  if not path:
    raise DataError(
      "config.dataset.profile is list, but config.dataset.list_path is empty; give the file."
    )
  path = os.path.expanduser(path)
  file, _, key = path.partition(".npz:")
  if key or path.endswith(".npz"):
    indices = _read_npz(f"{file}.npz" if key else path, key)
  else:
    indices = _read_names(path, labels, names)
  _check(path, indices, len(labels))
  return indices.astype(np.int64)


def _read_npz(path: str, key: str) -> np.ndarray:
  try:
    with open(path, "rb") as file:  # numpy itself leaves damaged archives open
      arrays = np.load(file, allow_pickle=False)
      if isinstance(arrays, np.ndarray):
        raise ValueError("it is one array in .npy format")
      if not arrays.files:
        raise DataError(f"{path} holds no array.")
      if key and key not in arrays:
        raise DataError(f"{path} has no array {key!r}; it has {', '.join(arrays)}.")
      if not key and len(arrays.files) != 1:
        raise DataError(
          f"{path} holds several arrays ({', '.join(arrays)}); name one, as in"
          f" {path}:{arrays.files[0]}."
        )
      indices = np.asarray(arrays[key or arrays.files[0]])
  except FileNotFoundError:
    raise DataError(f"There is no file {path} (config.dataset.list_path).") from None
  except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
    raise DataError(f"Cannot read the index list {path} ({error}).") from error
  if indices.ndim != 1 or not np.issubdtype(indices.dtype, np.integer):
    raise DataError(
      f"The index list {path} has shape {indices.shape} and type {indices.dtype}; it must be one"
      " row of whole numbers."
    )
  return indices


def _read_names(path: str, labels: np.ndarray, names: np.ndarray | None) -> np.ndarray:
  try:
    text = pathlib.Path(path).read_text(encoding="utf-8")
  except FileNotFoundError:
    raise DataError(f"There is no file {path} (config.dataset.list_path).") from None
  except (OSError, UnicodeDecodeError) as error:
    raise DataError(f"Cannot read the list {path} ({error}).") from error
  if names is None:
    raise DataError(
      f"{path} lists file names, but this data set has none; give an .npz file of indices."
    )
  lines = []
  for number, line in enumerate(text.splitlines(), 1):
    words = line.split()
    if words and (len(words) != 2 or not words[1].isdecimal()):
      raise DataError(
        f"Line {number} of {path} is {line.strip()!r}, but must be a file name and a class number."
      )
    lines += [words] if words else []
  place = {_parts(str(name)): i for i, name in enumerate(names)}
  depth = max(map(len, place))
  listed = [_parts(name)[-depth:] for name, _ in lines]
  unknown = [n for n, parts in enumerate(listed) if parts not in place]
  if unknown:
    raise DataError(
      f"{len(unknown)} of {len(lines)} files in {path} are not in the training set, the first is"
      f" {lines[unknown[0]][0]}."
    )
  indices = np.array([place[parts] for parts in listed], np.int64)
  _check_classes(path, labels[indices], [int(label) for _, label in lines])
  return indices


def _parts(name: str) -> tuple[str, ...]:
  """Folders and file without its suffix, from the outermost."""
  parts = [part for part in name.split("/") if part not in ("", ".")]
  return (*parts[:-1], parts[-1].rsplit(".", 1)[0]) if parts else ()


def _check_classes(path: str, ours: np.ndarray, listed: list[int]) -> None:
  """Both must part the images alike; the numbers of the classes may differ."""
  known: dict[int, int] = {}
  for number, (our_label, label) in enumerate(zip(ours.tolist(), listed, strict=True), 1):
    if known.setdefault(our_label, label) != label:
      raise DataError(
        f"{path} gives images of one class of the data set the classes {known[our_label]} and"
        f" {label}"
        f" (its entry {number}); it is a list of another data set, or damaged."
      )
  twice = [label for label in known.values() if list(known.values()).count(label) > 1]
  if twice:
    raise DataError(
      f"{path} calls images of several classes of the data set the class {twice[0]}; it is a list"
      " of another data set, or damaged."
    )


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
