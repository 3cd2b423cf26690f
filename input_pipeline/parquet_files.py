"""Labelled rows in Parquet: one file or a folder of parts, lists or one column per number."""

import os
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow
from pyarrow import compute, parquet, types

from input_pipeline import feature_files, parquet_columns
from input_pipeline.feature_files import LabelledRows
from input_pipeline.parquet_columns import Columns
from memdiff.errors import DataError

_BATCH = 2048  # rows decoded at a time, so that only the result stands in memory whole
_BUFFER = 1 << 16  # bytes read at a time from a column, for the same reason
_COLUMNS = 32  # one column per number: read at a time; each holds a page of about 1 MB


class _Part(NamedTuple):
  """One file, known by its schema."""

  path: pathlib.Path
  num_rows: int
  columns: Columns


def read(path: pathlib.Path, features: str, label: str) -> LabelledRows:
  """Reads features and labels of a Parquet file, or of all such files in a folder.

  A missing list or number becomes NaN; every label must be there. Rows are numbered over the parts
  of a folder, which are taken in natural order: part-2 before part-10.

  Args:
    path: a file or a folder.
    features: a column of lists; or one column per number, with * for its number, as in dim_*.
    label: a column of whole numbers or texts. Names that Hugging Face's ClassLabel gives to whole
      numbers become the class names.

  Raises:
    DataError: as all readers, with one sentence about the file.
  """
  parts = [_open(file, features, label) for file in _files(path)]
  columns = parts[0].columns
  for part in parts[1:]:
    _check_alike(parts[0], part)
  if not sum(part.num_rows for part in parts):
    raise DataError(f"{path} holds no rows.")
  labels = _labels(path, parts)
  return feature_files.checked(
    f"{path} ({features}, {label})",
    _numbered(parts) if columns.numbered else _lists(path, parts),
    labels,
    columns.class_names,
    may_lack_rows=True,
    columns=columns.features if columns.numbered else None,
  )


def read_features(path: pathlib.Path, features: str) -> np.ndarray:
  """Reads features alone, [N, D] float32; as `read` does."""
  parts = [_open(file, features, None) for file in _files(path)]
  for part in parts[1:]:
    _check_alike(parts[0], part)
  if not sum(part.num_rows for part in parts):
    raise DataError(f"{path} holds no rows.")
  return _numbered(parts) if parts[0].columns.numbered else _lists(path, parts)


# --- files -----------------------------------------------------------------------------------


def _files(path: pathlib.Path) -> list[pathlib.Path]:
  """The file itself; or the parts of a folder, without what Spark and systems hide there."""
  if not os.path.isdir(path):
    return [path]
  with feature_files.reading(path):
    found = [file for file in path.iterdir() if not file.name.startswith((".", "_"))]
  folders = sorted(file.name for file in found if file.is_dir())
  if folders:
    raise DataError(
      f"The folder {path} holds the folder {folders[0]}; put all Parquet files into one folder, and"
      " labels that are names of folders into a column."
    )
  parts = [file for file in found if file.suffix.lower() in feature_files.PARQUET_SUFFIXES]
  if not parts:
    raise DataError(f"The folder {path} holds no Parquet files (.parquet or .pq).")
  others = sorted({file.name for file in found} - {file.name for file in parts})
  if others:
    some = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
    print(f"memdiff: left out {len(others)} files of {path} that are not Parquet: {some}",
          file=sys.stderr)  # fmt: skip
  return sorted(parts, key=lambda file: parquet_columns.natural_order(file.name))


def _parquet_file(path: pathlib.Path) -> parquet.ParquetFile:
  return parquet.ParquetFile(
    path, page_checksum_verification=True, pre_buffer=False, buffer_size=_BUFFER
  )


def _open(path: pathlib.Path, features: str, label: str | None) -> _Part:
  with feature_files.reading(path), _parquet_file(path) as file:
    columns = parquet_columns.choose(path, file.schema_arrow, features, label)
    return _Part(path, file.metadata.num_rows, columns)


def _check_alike(first: _Part, part: _Part) -> None:
  features, others = first.columns.features, part.columns.features
  if features != others:
    name = sorted(set(features) ^ set(others), key=parquet_columns.natural_order)[0]
    raise DataError(
      f"{first.path} and {part.path} have different columns of features, for example {name!r}; all"
      " parts must have the same."
    )
  if first.columns.class_names != part.columns.class_names:
    raise DataError(
      f"{first.path} and {part.path} name the classes differently; write both with the same"
      " ClassLabel."
    )


# --- values ----------------------------------------------------------------------------------


def _batches(part: _Part, names: Sequence[str]) -> Iterator[tuple[int, list]]:
  """The number of the first row, and Arrow arrays of these columns."""
  start = 0
  with feature_files.reading(part.path), _parquet_file(part.path) as file:
    for batch in file.iter_batches(_BATCH, columns=list(names)):
      yield start, [_stored(batch.column(name)) for name in names]
      start += len(batch)


def _stored(column):
  """The values of an extension, such as a tensor of fixed shape."""
  return column.storage if isinstance(column.type, pyarrow.BaseExtensionType) else column


def _numbered(parts: list[_Part]) -> np.ndarray:
  """One column per number -> [N, D] float32."""
  names = parts[0].columns.features
  table = np.empty((sum(part.num_rows for part in parts), len(names)), np.float32)
  offset = 0
  for part in parts:
    for first in range(0, len(names), _COLUMNS):
      for start, columns in _batches(part, names[first : first + _COLUMNS]):
        for i, column in enumerate(columns, first):
          rows = slice(offset + start, offset + start + len(column))
          _assign(table, (rows, i), _numbers(column))
    offset += part.num_rows
  return table


def _lists(path: pathlib.Path, parts: list[_Part]) -> np.ndarray:
  """A column of lists of one length -> [N, D] float32; rows of NaN for missing lists."""
  (name,) = parts[0].columns.features
  total, table, offset = sum(part.num_rows for part in parts), None, 0
  for part in parts:
    for start, (column,) in _batches(part, [name]):
      column = _inner_lists(part, start, column)
      lengths = _lengths(column)
      present = np.flatnonzero(lengths >= 0)
      if not len(present):
        continue
      if table is None:
        table = np.full((total, lengths[present[0]]), np.nan, np.float32)
      ragged = present[lengths[present] != table.shape[1]]
      if len(ragged):
        raise DataError(
          f"Row {start + ragged[0]} of {part.path} has {lengths[ragged[0]]} numbers in the column"
          f" {name!r}, but rows before it have {table.shape[1]}; all must have as many."
        )
      numbers = _numbers(column.flatten()).reshape(len(present), table.shape[1])
      _assign(table, offset + start + present, numbers)
    offset += part.num_rows
  if table is None:
    raise DataError(f"The column {name!r} of {path} is empty in every row.")
  return table


def _inner_lists(part: _Part, start: int, column):
  """[[1, 2]] -> [1, 2], as long as each list holds one list."""
  while parquet_columns.is_list(column.type.value_type):
    lengths = _lengths(column)
    wrong = np.flatnonzero((lengths >= 0) & (lengths != 1))
    if len(wrong):
      raise DataError(
        f"Row {start + wrong[0]} of {part.path} has {lengths[wrong[0]]} lists in the column"
        f" {part.columns.features[0]!r}; store one list of numbers per row, for example their mean."
      )
    column = compute.list_element(column, 0)
  return column


def _lengths(column) -> np.ndarray:
  """[n] lengths of lists, -1 for missing ones."""
  lengths = compute.fill_null(compute.list_value_length(column), -1)
  return lengths.to_numpy(zero_copy_only=False)


def _numbers(column) -> np.ndarray:
  """An Arrow array of numbers as it is, with NaN for missing ones."""
  if types.is_decimal(column.type):
    column = column.cast(pyarrow.float64())
  elif types.is_boolean(column.type):
    column = column.cast(pyarrow.uint8())
  return column.to_numpy(zero_copy_only=False)


def _assign(table: np.ndarray, place, numbers: np.ndarray) -> None:
  # What is too large becomes infinite, and signalling NaNs quiet; both are looked for later.
  with np.errstate(over="ignore", invalid="ignore"):
    table[place] = numbers


def _labels(path: pathlib.Path, parts: list[_Part]) -> np.ndarray:
  """[N] numbers, booleans or texts."""
  name = parts[0].columns.label
  found = [
    _label_values(part, start, column)
    for part in parts
    for start, (column,) in _batches(part, [name])
  ]
  kinds = {values.dtype.kind if values.dtype.kind in "Ub" else "number" for values in found}
  if len(kinds) > 1:
    raise DataError(
      f"The parts of {path} have labels of different types in the column {name!r}; write all of"
      " them as texts, or all as whole numbers."
    )
  return np.concatenate(found)


def _label_values(part: _Part, start: int, column) -> np.ndarray:
  if types.is_dictionary(column.type):
    column = column.dictionary.take(column.indices)
  if column.null_count:
    row = start + compute.index(column.is_null(), True).as_py()
    raise DataError(
      f"Row {row} of {part.path} has no label in the column {part.columns.label!r}; give it one, or"
      " leave the row out."
    )
  if types.is_boolean(column.type):
    return column.to_numpy(zero_copy_only=False)
  if not parquet_columns.is_text(column.type):
    return _numbers(column)
  try:
    return np.array(column.cast(pyarrow.large_string()).to_pylist(), str)
  except (pyarrow.ArrowInvalid, UnicodeDecodeError):
    raise DataError(
      f"The column {part.columns.label!r} of {part.path} has labels that are not texts in UTF-8;"
      " write them as texts or whole numbers."
    ) from None


# --- writing ---------------------------------------------------------------------------------


def parquet_bytes(columns: dict[str, np.ndarray]) -> bytes:
  """A Parquet file of these columns: [n] or, as lists of fixed length, [n, D]."""

  def column(values):
    if values.ndim == 1:
      return pyarrow.array(values)
    flat = pyarrow.array(np.ascontiguousarray(values).reshape(-1))
    return pyarrow.FixedSizeListArray.from_arrays(flat, values.shape[1])

  return table_bytes({name: column(values) for name, values in columns.items()})


def table_bytes(columns: Mapping[str, Any]) -> bytes:
  """A Parquet file of columns that Arrow knows; None in a list is a missing value."""
  sink = pyarrow.BufferOutputStream()
  parquet.write_table(pyarrow.table(dict(columns)), sink, write_page_checksum=True)
  return sink.getvalue().to_pybytes()
