"""Labelled rows of numbers in .npz, .npy and Parquet files; nothing in them is unpickled."""

import contextlib
import dataclasses
import pathlib

import numpy as np

from memdiff.errors import DataError

SUFFIXES = (".npz", ".npy", ".parquet")
_BATCH = 8192  # rows of Parquet at a time, so that float64 never stands in memory whole


@dataclasses.dataclass(frozen=True)
class LabelledRows:
  """What a file holds, checked but for the values."""

  where: str  # it lies, for messages
  features: np.ndarray  # [N, D] float32; a missing number is NaN
  labels: np.ndarray  # [N] whole numbers, booleans or texts
  class_names: tuple[str, ...] | None = None  # where the file has them


@contextlib.contextmanager
def _reading(path: pathlib.Path):
  """Turns whatever reading raises into one sentence: zip, zlib and Arrow raise many types."""
  try:
    yield
  except DataError:
    raise
  except FileNotFoundError:
    raise DataError(f"There is no file {path}.") from None
  except Exception as error:
    reason = " ".join(str(error).split()) or repr(error)
    if "Object arrays" in reason:
      raise DataError(
        f"{path} holds Python objects, which memdiff does not read because they can run code; save"
        " texts with labels.astype(str) and features as one array of numbers."
      ) from error
    raise DataError(f"Cannot read {path} ({reason[:300]}).") from error


def _load(file):
  """What NumPy reads from an open file; what is not in its format it would take for a pickle."""
  start = file.read(6)
  if not start.startswith((b"PK", b"\x93NUMPY")):
    raise ValueError("it is not in NumPy's format" if start else "it is empty")
  file.seek(0)
  return np.load(file, allow_pickle=False)


@contextlib.contextmanager
def _npz(path: pathlib.Path):
  with _reading(path), path.open("rb") as file:  # numpy itself leaves damaged archives open
    arrays = _load(file)
    if isinstance(arrays, np.ndarray):
      raise ValueError("it is one array in .npy format")
    yield arrays


def npz_names(path: pathlib.Path) -> list[str]:
  """Of the arrays in a .npz file."""
  with _npz(path) as arrays:
    return list(arrays)


def read_npz(path: pathlib.Path, features: str, labels: str, class_names: str) -> LabelledRows:
  """Reads the arrays of these names; `class_names` only where the file has it.

  Raises:
    DataError: as all readers here, with one sentence about the file.
  """
  with _npz(path) as arrays:
    for name in (features, labels):
      if name not in arrays:
        raise DataError(f"{path} has no array {name!r}; {_there_are(arrays)}.")
    found = [np.asarray(arrays[name]) for name in (features, labels)]
    names = np.asarray(arrays[class_names]) if class_names in arrays else None
  return _checked(f"{path} ({features}, {labels})", *found, _names(path, class_names, names))


def read_npy(path: pathlib.Path, labels_path: pathlib.Path) -> LabelledRows:
  """Reads features from one file and labels from another."""
  found = []
  for file_path in (path, labels_path):
    with _reading(file_path), file_path.open("rb") as file:
      array = _load(file)
      if not isinstance(array, np.ndarray):
        raise ValueError("it is an archive in .npz format")
      found.append(array)
  return _checked(f"{path} with {labels_path}", *found)


def read_parquet(path: pathlib.Path, features: str, label: str) -> LabelledRows:
  """Reads a column of lists of numbers and a column of labels.

  A missing list, like a missing number, becomes NaN; every label must be there.
  """
  from pyarrow import parquet  # only here and where Parquet is written

  with _reading(path), parquet.ParquetFile(path, page_checksum_verification=True) as file:
    schema = file.schema_arrow
    for name in (features, label):
      if name not in schema.names:
        raise DataError(f"{path} has no column {name!r}; {_there_are(schema.names)}.")
    _check_types(path, schema.field(features), schema.field(label))
    if not file.metadata.num_rows:
      raise DataError(f"{path} holds no rows.")
    batches = [
      (*_lists(batch.column(features)), _label_values(batch.column(label)))
      for batch in file.iter_batches(_BATCH, columns=[features, label])
    ]
  lengths, numbers, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
  if len(missing := np.flatnonzero(labels == None)):  # noqa: E711 (element by element)
    raise DataError(f"Row {missing[0]} of {path} has no label in the column {label!r}.")
  table = _table(path, features, lengths, numbers)
  return _checked(f"{path} ({features}, {label})", table, np.array(labels.tolist()))


def _check_types(path: pathlib.Path, features, label) -> None:
  """Raises DataError where the columns (fields of an Arrow schema) hold something else."""
  from pyarrow import types

  is_list = (types.is_list, types.is_large_list, types.is_fixed_size_list)
  is_number = (types.is_floating, types.is_integer)
  if not any(test(features.type) for test in is_list) or not any(
    test(features.type.value_type) for test in is_number
  ):
    raise DataError(
      f"The column {features.name!r} of {path} has the type {features.type}; it must hold a list of"
      " numbers per row."
    )
  kind = label.type.value_type if types.is_dictionary(label.type) else label.type
  is_label = (types.is_integer, types.is_boolean, types.is_string, types.is_large_string)
  if not any(test(kind) for test in is_label):
    raise DataError(
      f"The column {label.name!r} of {path} has the type {label.type}; labels must be whole numbers"
      " or texts."
    )


def _lists(column) -> tuple[np.ndarray, np.ndarray]:
  """An Arrow column of lists -> lengths [n], -1 where one is missing, and all numbers in a row."""
  from pyarrow import compute

  lengths = compute.fill_null(compute.list_value_length(column), -1)
  numbers = column.flatten().to_numpy(zero_copy_only=False)
  return lengths.to_numpy(zero_copy_only=False), _as_float32(numbers)


def _label_values(column) -> np.ndarray:
  """An Arrow column -> [n] Python values, None where one is missing."""
  values = np.empty(len(column), object)
  values[:] = column.to_pylist()
  return values


def _table(path: pathlib.Path, name: str, lengths: np.ndarray, numbers: np.ndarray) -> np.ndarray:
  """Lists of one length as float32 [N, D]; rows of NaN for missing ones."""
  present = np.flatnonzero(lengths >= 0)
  if not len(present):
    raise DataError(f"The column {name!r} of {path} is empty in every row.")
  width = lengths[present[0]]
  ragged = present[lengths[present] != width]
  if len(ragged):
    raise DataError(
      f"Row {ragged[0]} of {path} has {lengths[ragged[0]]} numbers in the column {name!r}, but row"
      f" {present[0]} has {width}; all must have as many."
    )
  if len(present) == len(lengths):
    return numbers.reshape(len(lengths), width)
  table = np.full((len(lengths), width), np.nan, np.float32)
  table[present] = numbers.reshape(len(present), width)
  return table


def _as_float32(numbers: np.ndarray) -> np.ndarray:
  # What is too large becomes infinite, and signalling NaNs quiet; both are looked for later.
  with np.errstate(over="ignore", invalid="ignore"):
    return numbers.astype(np.float32)


def _there_are(names) -> str:
  return f"it has {', '.join(names)}" if len(names) else "it has none"


def _names(path: pathlib.Path, key: str, names: np.ndarray | None) -> tuple[str, ...] | None:
  if names is None:
    return None
  if names.ndim != 1 or names.dtype.kind not in "SU":
    raise DataError(
      f"The array {key!r} of {path} has the shape {names.shape} and type {names.dtype}; it must be"
      " one row of texts."
    )
  return tuple(_texts(path, names).tolist())


def _texts(where, values: np.ndarray) -> np.ndarray:
  """Bytes as text."""
  try:
    return np.char.decode(values, "utf-8") if values.dtype.kind == "S" else values
  except UnicodeDecodeError as error:
    raise DataError(f"A text in {where} is not in UTF-8 ({error}).") from None


def _checked(
  where: str,
  features: np.ndarray,
  labels: np.ndarray,
  class_names: tuple[str, ...] | None = None,
) -> LabelledRows:
  """Raises DataError where shapes or types are not those of labelled rows."""
  if features.ndim != 2:
    raise DataError(
      f"The features in {where} have the shape {features.shape}; they must be [rows, numbers]."
    )
  if features.dtype.kind not in "fiu":
    raise DataError(
      f"The features in {where} have the type {features.dtype}; they must be numbers."
    )
  if labels.shape != features.shape[:1]:
    raise DataError(
      f"{where} has {len(features)} rows of features and labels of the shape {labels.shape}; there"
      " must be one label per row."
    )
  if not features.size:
    empty = "no rows" if not len(features) else "rows without a number"
    raise DataError(f"{where} holds {empty}.")
  if labels.dtype.kind not in "biuSU":
    raise DataError(
      f"The labels in {where} have the type {labels.dtype}; they must be whole numbers or texts."
    )
  return LabelledRows(where, _as_float32(features), _texts(where, labels), class_names)


def parquet_bytes(columns: dict[str, np.ndarray]) -> bytes:
  """A Parquet file of these columns: [n] or, as lists of fixed length, [n, D]."""
  import pyarrow
  from pyarrow import parquet

  def column(values):
    if values.ndim == 1:
      return pyarrow.array(values)
    flat = pyarrow.array(np.ascontiguousarray(values).reshape(-1))
    return pyarrow.FixedSizeListArray.from_arrays(flat, values.shape[1])

  sink = pyarrow.BufferOutputStream()
  table = pyarrow.table({name: column(values) for name, values in columns.items()})
  parquet.write_table(table, sink, write_page_checksum=True)
  return sink.getvalue().to_pybytes()
