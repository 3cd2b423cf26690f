"""Labelled rows of numbers in .npz and .npy files, and the checks that all formats share.

Nothing in a file is unpickled. Parquet is read by `parquet_files`.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import shlex
import sys
from collections.abc import Collection, Mapping

import numpy as np

from memdiff.errors import DataError

PARQUET_SUFFIXES = (".parquet", ".pq")
_SUFFIXES = (".npz", ".npy", *PARQUET_SUFFIXES)
_MAX_NAMES = 8  # in a message
_WHOLE = 2**53  # up to here float64 holds every whole number
_BFLOAT16 = np.dtype("V2")  # how NumPy saves it; no other of its types of two bytes loses its name
_TO_PARQUET = (
  "import sys, pyarrow.csv as c, pyarrow.parquet as p;"
  " p.write_table(c.read_csv(sys.argv[1]{options}), sys.argv[2])"
)
_TO_NPZ = (
  "import sys, numpy, torch; d = torch.load(sys.argv[1], map_location='cpu');"
  " numpy.savez(sys.argv[2], features=d['features'].float().numpy(), labels=d['labels'].numpy())"
)
_TO_NPY = "import sys, numpy; numpy.save(sys.argv[2], numpy.loadtxt(sys.argv[1], dtype=str))"


@dataclasses.dataclass(frozen=True)
class LabelledRows:
  """What a file holds, checked but for the values."""

  where: str  # it lies, for messages
  features: np.ndarray  # [N, D] float32; a missing number is NaN
  labels: np.ndarray  # [N] whole numbers, booleans or texts
  class_names: tuple[str, ...] | None = None  # if the file has them
  may_lack_rows: bool = False  # whether a class name without a row is dropped instead of refused
  columns: tuple[str, ...] | None = None  # D names, if each number has a column of its own


# --- formats ---------------------------------------------------------------------------------


def format_of(path: pathlib.Path, option: str) -> str:
  """.npz, .npy or .parquet; folders are Parquet unless their name says otherwise.

  Raises:
    DataError: for any other format, with the line that converts it. `option` names the path.
  """
  suffix = path.suffix.lower()
  if suffix in PARQUET_SUFFIXES:
    return ".parquet"
  if suffix in _SUFFIXES:
    return suffix
  if os.path.isdir(path):  # False, not an error, if it cannot be looked at
    return ".parquet"
  if suffix in (".csv", ".tsv"):
    options = ", parse_options=c.ParseOptions(delimiter=chr(9))" if suffix == ".tsv" else ""
    line = _command(_TO_PARQUET.format(options=options), path, ".parquet")
    raise DataError(
      f"{option} is {path}; convert it with {line} and read columns such as dim_0, dim_1 with"
      " --config.dataset.columns.features='dim_*'."
    )
  if suffix in (".pt", ".pth"):
    line = _command(_TO_NPZ, path, ".npz")
    raise DataError(
      f"{option} is {path}; convert it with {line} if it holds a dictionary of features and labels."
    )
  raise DataError(
    f"{option} is {path}, but must end in one of {', '.join(_SUFFIXES)}, or be a folder of Parquet"
    " files; numpy.savez('embeddings.npz', features=..., labels=...) writes such a file."
  )


def _command(program: str, path: pathlib.Path, suffix: str) -> str:
  """A line for a shell that writes what `path` holds beside it, with this suffix."""
  source, target = (shlex.quote(str(p)) for p in (path, path.with_suffix(suffix)))
  return f'python -c "{program}" {source} {target}'


@contextlib.contextmanager
def reading(path: pathlib.Path):
  """Turns any error of a reader into one sentence: zip, zlib and Arrow raise many types."""
  try:
    yield
  except DataError:
    raise
  except FileNotFoundError:
    parts = "; to read several files, give their folder" if "*" in path.name else ""
    raise DataError(f"There is no file {path}{parts}.") from None
  except Exception as error:
    reason = " ".join(str(error).split()) or repr(error)
    if "Object arrays" in reason:
      raise DataError(
        f"{path} holds Python objects, which memdiff does not read because they can run code; save"
        " texts with labels.astype(str) and features as one array of numbers."
      ) from error
    raise DataError(f"Cannot read {path} ({reason[:300]}).") from error


def there_are(names: Collection[str], option: str) -> str:
  """The end of a sentence about a missing name: those there are, and the option that names one."""
  if not len(names):
    return "it has none"
  shown = list(names)[:_MAX_NAMES]
  more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
  return f"it has {', '.join(shown)}{more}; choose one with --config.dataset.{option}"


# --- NumPy's formats -------------------------------------------------------------------------


def _load(file):
  """What NumPy reads from an open file; it would take any other format for a pickle."""
  start = file.read(6)
  if not start.startswith((b"PK", b"\x93NUMPY")):
    wrong = "it is not in NumPy's format; numpy.save writes that" if start else "it is empty"
    raise ValueError(wrong)
  file.seek(0)
  return np.load(file, allow_pickle=False)


@contextlib.contextmanager
def _npz(path: pathlib.Path):
  with reading(path), path.open("rb") as file:  # numpy itself leaves damaged archives open
    arrays = _load(file)
    if isinstance(arrays, np.ndarray):
      raise ValueError("it is one array in .npy format")
    yield arrays


def npz_names(path: pathlib.Path) -> list[str]:
  """Of the arrays in a .npz file."""
  with _npz(path) as arrays:
    return list(arrays)


def read_npz(path: pathlib.Path, names: Mapping[str, str], prefix: str = "") -> LabelledRows:
  """Reads the arrays of a training set, or those of a test set with the prefix `test_`.

  Args:
    names: the fields of `config.dataset.arrays`; the array `class_names` may be missing.

  Raises:
    DataError: as all readers here, with one sentence about the file.
  """
  options = f"{prefix}features", f"{prefix}labels"
  features, labels = (names[option] for option in options)
  key = names["class_names"]
  with _npz(path) as arrays:
    for option in options:
      if names[option] not in arrays:
        known = there_are(list(arrays), f"arrays.{option}")
        raise DataError(f"{path} has no array {names[option]!r}; {known}.")
    found = [np.asarray(arrays[name]) for name in (features, labels)]
    class_names = np.asarray(arrays[key]) if key in arrays else None
  return checked(f"{path} ({features}, {labels})", *found, _names(path, key, class_names))


def read_npy(path: pathlib.Path, labels_path: pathlib.Path) -> LabelledRows:
  """Reads features from one file and labels from another."""
  if labels_path.suffix.lower() in (".txt", ".csv"):
    line = _command(_TO_NPY, labels_path, ".npy")
    raise DataError(
      f"{labels_path} is no .npy file of labels; convert it with {line} and give the new file."
    )
  found = []
  for file_path in (path, labels_path):
    with reading(file_path), file_path.open("rb") as file:
      array = _load(file)
      if not isinstance(array, np.ndarray):
        raise ValueError("it is an archive in .npz format")
      found.append(array)
  return checked(f"{path} with {labels_path}", *found)


def read_array(path: pathlib.Path, name: str) -> np.ndarray:
  """An array [N, ...] that needs no labels: of a .npy file, or of this name in a .npz file.

  A .npz file with one array may call it as it likes.
  """
  with reading(path), path.open("rb") as file:
    arrays = _load(file)
    if isinstance(arrays, np.ndarray):
      return arrays
    names = list(arrays)
    if name not in names and len(names) != 1:
      known = ", ".join(names[:_MAX_NAMES]) or "none"
      raise DataError(f"{path} has no array {name!r}, but {known}; rename the one to use.")
    return np.asarray(arrays[name if name in names else names[0]])


def as_rows(where: str, features: np.ndarray) -> np.ndarray:
  """Features of a file as float32 [N, D]; axes of length one are dropped."""
  features = _without_axes_of_one(features, 2)
  if features.ndim != 2:
    raise DataError(
      f"The features in {where} have the shape {features.shape}; they must be [rows, numbers], as"
      " features.reshape(len(features), -1) is."
    )
  return _numbers(where, features)


def _names(path: pathlib.Path, key: str, names: np.ndarray | None) -> tuple[str, ...] | None:
  if names is None:
    return None
  if names.ndim != 1 or names.dtype.kind not in "SU":
    raise DataError(
      f"The array {key!r} of {path} has the shape {names.shape} and type {names.dtype}; it must be"
      " one row of texts."
    )
  return tuple(_texts(path, names).tolist())


# --- checks ----------------------------------------------------------------------------------


def checked(
  where: str,
  features: np.ndarray,
  labels: np.ndarray,
  class_names: tuple[str, ...] | None = None,
  **more,
) -> LabelledRows:
  """Labelled rows of what a file holds; `more` are further fields of LabelledRows.

  Axes of length one are dropped, as in features [N, 1, D] and labels [N, 1].

  Raises:
    DataError: if shapes or types are not those of labelled rows.
  """
  features, labels = as_rows(where, features), _without_axes_of_one(labels, 1)
  if labels.shape != features.shape[:1]:
    one_hot = "; one-hot labels become that by labels.argmax(axis=1)" if labels.ndim == 2 else ""
    raise DataError(
      f"{where} has {len(features)} rows of features and labels of the shape {labels.shape}; there"
      f" must be one label per row{one_hot}."
    )
  if not features.size:
    empty = "no rows" if not len(features) else "rows without a number"
    raise DataError(f"{where} holds {empty}.")
  return LabelledRows(where, features, _label_values(where, labels), class_names, **more)


def _without_axes_of_one(array: np.ndarray, ndim: int) -> np.ndarray:
  """[N, ...] -> [N] or [N, D], if no more than that is longer than one; else as it is."""
  lengths = array.shape[1:]
  if array.ndim <= ndim or sum(length != 1 for length in lengths) >= ndim:
    return array
  return array.reshape(len(array), *[math.prod(lengths)] * (ndim - 1))


def _numbers(where: str, features: np.ndarray) -> np.ndarray:
  """As float32."""
  if features.dtype == _BFLOAT16:
    print(f"memdiff: read the two-byte values in {where} as bfloat16, which NumPy saves without its"
          " name", file=sys.stderr)  # fmt: skip
    bits = np.ascontiguousarray(features).view(np.uint16).astype(np.uint32)
    bits <<= 16  # bfloat16 is the upper half of float32
    return bits.view(np.float32)
  if features.dtype.kind not in "biuf":
    advice = {
      "c": "features.real takes the real part",
      "V": "save features.astype('float32')",
    }.get(features.dtype.kind, "features.astype('float32') converts them")
    raise DataError(
      f"The features in {where} have the type {features.dtype}; they must be numbers: {advice}."
    )
  # What is too large becomes infinite, and signalling NaNs quiet; both are looked for later.
  with np.errstate(over="ignore", invalid="ignore"):
    return features.astype(np.float32, copy=False)


def _label_values(where: str, labels: np.ndarray) -> np.ndarray:
  """Labels [N] as whole numbers, booleans or texts: floats become int64, bytes become texts."""
  if labels.dtype.kind in "SU":
    return _texts(where, labels)
  if labels.dtype.kind in "biu":
    return labels
  if labels.dtype.kind != "f":
    raise DataError(
      f"The labels in {where} have the type {labels.dtype}; they must be whole numbers or texts, as"
      " labels.astype(int) or labels.astype(str) gives."
    )
  values = labels.astype(np.float64)
  missing = np.flatnonzero(np.isnan(values))
  if len(missing):
    raise DataError(
      f"Row {missing[0]} of {where} has NaN as its label; give it a label, or leave the row out."
    )
  broken = np.flatnonzero((values != np.rint(values)) | (np.abs(values) > _WHOLE))
  if len(broken):
    raise DataError(
      f"Row {broken[0]} of {where} has the label {values[broken[0]]}; labels must be whole numbers"
      " or texts, as labels.astype(int) or labels.astype(str) gives."
    )
  return values.astype(np.int64)


def _texts(where, values: np.ndarray) -> np.ndarray:
  """Bytes as text."""
  try:
    return np.char.decode(values, "utf-8") if values.dtype.kind == "S" else values
  except UnicodeDecodeError as error:
    raise DataError(f"A text in {where} is not in UTF-8 ({error}).") from None
