"""Classes from labels: which there are, what they are called, and their numbers."""

import sys

import numpy as np

from input_pipeline.feature_files import LabelledRows
from memdiff.errors import DataError


def classes_of(train: LabelledRows) -> tuple[np.ndarray, tuple[str, ...]]:
  """Label values [C] and names of the classes.

  Class names that the file lists must each have a row, unless they come from a schema, which may
  describe more data than the file holds; then names without a row are dropped, and that is said.
  """
  values, names = np.unique(train.labels), train.class_names
  if names is None:
    names = tuple(str(value) for value in values.tolist())
  else:
    values, names = _named(train, values, names)
  if len(names) < 2:
    raise DataError(f"{train.where} has one class, {names[0]!r}; a classifier needs at least two.")
  return values, names


def _named(
  train: LabelledRows, present: np.ndarray, names: tuple[str, ...]
) -> tuple[np.ndarray, tuple[str, ...]]:
  """Label values and names in the order of the file's class names."""
  if len(set(names)) < len(names):
    twice = next(name for name in names if names.count(name) > 1)
    raise DataError(f"The class names in {train.where} have {twice!r} more than once.")
  named = np.array(names) if train.labels.dtype.kind == "U" else np.arange(len(names))
  unknown = np.setdiff1d(present, named).tolist()
  used = np.isin(named, present)
  without = named[~used].tolist()
  if without and not train.may_lack_rows:
    raise DataError(
      f"{train.where} has {len(names)} class names, but no row with the label {without[0]!r};"
      " every class needs at least one."
    )
  if unknown:
    raise DataError(
      f"{train.where} has the label {unknown[0]!r}, but no class name for it among {len(names)}."
    )
  if without:
    unused = [names[c] for c in np.flatnonzero(~used)]
    some = ", ".join(unused[:5]) + (", ..." if len(unused) > 5 else "")
    print(f"memdiff: dropped {len(unused)} class names of {train.where} that no row has: {some}",
          file=sys.stderr)  # fmt: skip
  return named[used], tuple(names[c] for c in np.flatnonzero(used))


def encode(rows: LabelledRows, values: np.ndarray, train: str) -> np.ndarray:
  """Classes [N] int32 of the labels of `rows`."""
  number = {value: c for c, value in enumerate(values.tolist())}
  present, inverse = np.unique(rows.labels, return_inverse=True)
  unknown = [i for i, value in enumerate(present.tolist()) if value not in number]
  if unknown:
    raise DataError(
      f"Row {np.argmax(inverse == unknown[0])} of {rows.where} has the label"
      f" {present.tolist()[unknown[0]]!r}, which no row of {train} has."
    )
  return np.array([number[value] for value in present.tolist()], np.int32)[inverse]
