"""Which columns of a Parquet file hold features and labels, by the file's schema alone."""

import collections
import json
import pathlib
import re
from typing import NamedTuple

import pyarrow
from pyarrow import types

from input_pipeline import feature_files
from memdiff.errors import DataError

_LISTS = (
  types.is_list,
  types.is_large_list,
  types.is_fixed_size_list,
  types.is_list_view,
  types.is_large_list_view,
)
_TEXTS = (
  types.is_string,
  types.is_large_string,
  types.is_string_view,
  types.is_binary,
  types.is_large_binary,
  types.is_binary_view,
  types.is_fixed_size_binary,
)
_NUMBERS = (types.is_floating, types.is_integer, types.is_boolean, types.is_decimal)


class Columns(NamedTuple):
  """What to read."""

  features: tuple[str, ...]  # one column of lists, or one column per number
  numbered: bool  # whether it is one column per number
  label: str | None
  class_names: tuple[str, ...] | None


def is_list(kind) -> bool:
  return any(test(kind) for test in _LISTS)


def is_text(kind) -> bool:
  """Bytes are taken for texts in UTF-8."""
  return any(test(kind) for test in _TEXTS)


def is_number(kind) -> bool:
  return any(test(kind) for test in _NUMBERS)


def choose(path: pathlib.Path, schema, features: str, label: str | None) -> Columns:
  """The columns of these names, `features` being a list or, with *, numbered columns.

  Args:
    path: of the file, for messages.
    schema: of Arrow.
    features: see there.
    label: None if none is wanted.

  Raises:
    DataError: if they are not there, or hold something else than numbers and labels.
  """
  names = _feature_columns(path, schema, features, label)
  numbered = names != [features]
  if label is not None and label not in schema.names:
    known = feature_files.there_are(schema.names, "columns.label")
    raise DataError(f"{path} has no column {label!r}; {known}.")
  labels = () if label is None else (label,)
  for name in (*names, *labels):
    number = schema.names.count(name)
    if number > 1:
      raise DataError(f"{path} has {number} columns {name!r}; rename or remove all but one.")
  for name in names:
    (_check_number if numbered else _check_list)(path, schema.field(name))
  if label is None:
    return Columns(tuple(names), numbered, None, None)
  _check_label(path, schema.field(label))
  return Columns(tuple(names), numbered, label, _class_label_names(schema, label))


def natural_order(name: str) -> list:
  """A key that sorts part-2 before part-10; the name itself decides between part-2 and part-02."""
  pieces = re.split(r"([0-9]+)", name)
  return [*(int(text) if i % 2 else text for i, text in enumerate(pieces)), name]


def _feature_columns(path: pathlib.Path, schema, features: str, label: str | None) -> list[str]:
  """The column of this name, or those that fit it in the order of their numbers."""
  if features in schema.names:
    return [features]
  others = [field for field in schema if field.name != label]
  if "*" in features:
    pattern = re.compile("[0-9]+".join(map(re.escape, features.split("*"))))
    found = [field.name for field in others if pattern.fullmatch(field.name)]
    if found:
      return sorted(found, key=natural_order)
    wanted = f"columns {features!r}, in which * stands for a number"
  else:
    wanted = f"column {features!r}"
  numbered = collections.Counter(
    re.sub(r"[0-9]+(?=[^0-9]*$)", "*", field.name)
    for field in others
    if is_number(field.type) and re.search("[0-9]", field.name)
  )
  pattern, number = max(numbered.items(), key=lambda item: item[1], default=("", 0))
  if number < 2:
    known = feature_files.there_are(schema.names, "columns.features")
    raise DataError(f"{path} has no {wanted}; {known}.")
  raise DataError(
    f"{path} has no {wanted}; to read its {number} columns {pattern}, set"
    f" --config.dataset.columns.features='{pattern}'."
  )


def _class_label_names(schema, label: str) -> tuple[str, ...] | None:
  """Class names in the metadata of Hugging Face's datasets, for labels that are whole numbers."""
  try:
    known = json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]
    names, kind = known["names"], known["_type"]
  except (KeyError, TypeError, ValueError):  # no metadata, or of another kind
    return None
  is_named = kind == "ClassLabel" and isinstance(names, list)
  if not is_named or not types.is_integer(_stored(schema.field(label).type)):
    return None
  return tuple(map(str, names))


def _stored(kind):
  """The type of the values in an extension or a dictionary."""
  if isinstance(kind, pyarrow.BaseExtensionType):
    kind = kind.storage_type
  return kind.value_type if types.is_dictionary(kind) else kind


def _check_list(path: pathlib.Path, field) -> None:
  where = f"The column {field.name!r} of {path}"
  if isinstance(field.type, pyarrow.FixedShapeTensorType):
    shape = field.type.shape
    if sum(length != 1 for length in shape) > 1:
      raise DataError(
        f"{where} holds tensors of the shape {tuple(shape)}; store one list of numbers per row, for"
        " example the flattened tensor."
      )
  outer = kind = _stored(field.type)
  while is_list(kind):
    kind = kind.value_type
  if is_list(outer) and is_number(kind):
    return
  if is_number(outer):
    advice = "read one column per number with --config.dataset.columns.features='dim_*'"
  elif is_text(outer):
    advice = "turn texts such as [0.1, 0.2] into lists with json.loads"
  elif types.is_struct(outer):
    advice = "store the list in it as a column, as vector_to_array of pyspark does"
  else:
    advice = "convert it to lists of float32"
  raise DataError(
    f"{where} has the type {field.type}; it must hold a list of numbers per row: {advice}."
  )


def _check_number(path: pathlib.Path, field) -> None:
  if not is_number(field.type):
    raise DataError(
      f"The column {field.name!r} of {path} has the type {field.type}; each column of features must"
      " hold a number per row: convert it to float32, or rename it if it is no feature."
    )


def _check_label(path: pathlib.Path, field) -> None:
  kind = _stored(field.type)
  if not is_number(kind) and not is_text(kind):
    raise DataError(
      f"The column {field.name!r} of {path} has the type {field.type}; labels must be whole numbers"
      " or texts: convert them to int64 or string."
    )
