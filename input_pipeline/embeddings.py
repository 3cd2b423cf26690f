"""Embeddings as a data set: rows of numbers with labels, made long-tailed if asked.

For features that another model made (CLIP, DINO, a tabular model): read from .npz, .npy or Parquet
(a file or a folder of parts), checked, and split like images are. Synthetic features are written
back in the same formats.

Numbers are kept as float32, of which neighbours lie 1e-7 of their size apart. A column that varies
by less becomes constant, for example a time in seconds since 1970 that spans a minute; subtract an
offset from such a column first.

A class of one row is allowed: it trains, and is not tested if the test set is split off. A class
without test rows has no accuracy of its own.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from input_pipeline import feature_files, label_classes, long_tail
from input_pipeline.feature_files import LabelledRows
from memdiff.config import at_least, between, one_of, path_setting, setting
from memdiff.errors import ConfigError, DataError
from memdiff.runtime.workdir import write_arrays, write_atomically

PROFILES = (*long_tail.PROFILES, "natural")
_OPTIONAL = "class_names"  # the name of an array that a file may lack


@dataclasses.dataclass(frozen=True)
class ArraysConfig:
  """Names in .npz files."""

  features: str = setting("features", "[N, D] numbers")
  labels: str = setting("labels", "[N] whole numbers or texts")
  class_names: str = setting(
    "class_names", "[C] texts, in the order of the classes; may be missing"
  )
  test_features: str = setting("test_features", "the test set in the file of train_path")
  test_labels: str = setting("test_labels", "its labels")


@dataclasses.dataclass(frozen=True)
class ColumnsConfig:
  """Names in Parquet files."""

  features: str = setting("features", "lists; or a column per number: dim_* for dim_0, dim_1, ...")
  label: str = setting("label", "whole numbers or texts")


@dataclasses.dataclass(frozen=True)
class EmbeddingsConfig:
  train_path: str = path_setting(
    ".npz, .npy, .parquet or a folder of .parquet files: numbers and a label per row"
  )
  train_labels_path: str = path_setting(".npy: the file of its labels")
  test_path: str = path_setting('as train_path; "": in the same .npz, or split off by test_share')
  test_labels_path: str = path_setting(".npy: the file of its labels")
  test_share: float = setting(
    0.0, "share of each class split off as the test set; 0: one is given", between(0, 0.5)
  )
  test_seed: int = setting(0, "which rows are split off", between(0, 2**32 - 1))
  arrays: ArraysConfig = setting(ArraysConfig(), "names in .npz files")
  columns: ColumnsConfig = setting(ColumnsConfig(), "names in Parquet files")
  profile: str = setting(
    "natural", "how the set is cut: natural takes all; step as LDAM", one_of(PROFILES)
  )
  imbalance: float = setting(
    100.0, "exponential, step: rows of the largest class / of the smallest", at_least(1)
  )
  split_seed: int = setting(
    0, "which rows the tail keeps; the others judge and are the oracle", between(0, 2**32 - 1)
  )
  skip_non_finite: bool = setting(False, "leave out rows with a NaN or an infinity, and say so")

  def __post_init__(self):
    if self.test_path and self.test_share:
      raise ValueError(
        f"test_path is {self.test_path} and test_share is {self.test_share:g}, but the test set is"
        " either in a file or split off; give one of them."
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongTailEmbeddings(long_tail.LongTailLabels):
  """A long-tailed training set of embeddings, its test set, and what the long tail left out."""

  train_features: np.ndarray  # [N, D] float32, in the units of the file
  left_out_features: np.ndarray
  test_features: np.ndarray
  train_rows: np.ndarray  # [N] int64, rows of the training file, from 0
  label_values: np.ndarray  # [C] the classes as the file calls them: whole numbers or texts
  num_skipped: int  # rows left out for a NaN or an infinity, of train and test


# --- reading ---------------------------------------------------------------------------------


def load(config: EmbeddingsConfig) -> LongTailEmbeddings:
  """Reads labelled embeddings, splits off a test set if asked, and cuts the long tail.

  Classes are the labels of the training file in ascending order, or the file's `class_names` in
  theirs, which then must name a class each: label c, or the label itself if labels are texts.
  Hugging Face's ClassLabel in a Parquet schema names classes too; names without a row are dropped.

  Raises:
    ConfigError, DataError: with a sentence that says what to do.
  """
  train = _read(config.train_path, config.train_labels_path, config, "train")
  test = _read_test(config)
  values, names = label_classes.classes_of(train)
  labels = label_classes.encode(train, values, train.where)
  rows = _usable_rows(train, config.skip_non_finite)
  num_skipped = len(labels) - len(rows)
  _check_train(train, labels, rows, names)
  if test is None:
    rows, test_rows = long_tail.hold_out(
      rows, labels[rows], config.test_share, config.test_seed, least=1
    )
    test_features, test_labels = train.features[test_rows], labels[test_rows]
    if not len(test_rows):
      raise DataError(f"No class in {train.where} has two rows, so that no test set can be split.")
  else:
    _check_test(train, test)
    test_rows = _usable_rows(test, config.skip_non_finite)
    num_skipped += len(test.labels) - len(test_rows)
    test_features = test.features[test_rows]
    test_labels = label_classes.encode(test, values, train.where)[test_rows]
  kept, left_out, imbalance = long_tail.cut(
    labels[rows], names, config.profile, config.imbalance, config.split_seed
  )
  kept, left_out = rows[kept], rows[left_out]
  return LongTailEmbeddings(
    name=pathlib.Path(config.train_path).name,
    class_names=names,
    profile=config.profile,
    imbalance=imbalance,
    train_features=train.features[kept],
    train_labels=labels[kept],
    holdout_labels=labels[:0],
    left_out_features=train.features[left_out],
    left_out_labels=labels[left_out],
    test_features=test_features,
    test_labels=test_labels,
    split_sha256=long_tail.fingerprint(kept),
    train_rows=kept.astype(np.int64),
    label_values=values,
    num_skipped=num_skipped,
  )


def _read(path: str, labels_path: str, config: EmbeddingsConfig, part: str) -> LabelledRows:
  """One file by its suffix, or a folder; `part` is train or test."""
  where = f"config.dataset.{part}"
  if not path:
    raise DataError(f"{where}_path is empty; give a file of labelled embeddings.")
  file = pathlib.Path(path).expanduser()
  suffix = feature_files.format_of(file, f"{where}_path")
  if bool(labels_path) != (suffix == ".npy"):
    raise ConfigError(
      f"{where}_labels_path is {labels_path!r} with {path}; the file of labels is for .npy, and"
      " needed there."
    )
  if suffix == ".npy":
    return feature_files.read_npy(file, pathlib.Path(labels_path).expanduser())
  if suffix == ".parquet":
    return _parquet_files().read(file, config.columns.features, config.columns.label)
  names = config.arrays
  found = feature_files.read_npz(file, dataclasses.asdict(names))
  if found.class_names is None and names.class_names != _OPTIONAL:
    raise DataError(
      f"{path} has no array {names.class_names!r}, but config.dataset.arrays.class_names is that."
    )
  return found


def _parquet_files():
  """The module, imported only if Parquet is read or written: Arrow takes its time to load."""
  from input_pipeline import parquet_files

  return parquet_files


def _read_test(config: EmbeddingsConfig) -> LabelledRows | None:
  """The given test set, or None if it is to be split off."""
  if config.test_path:
    return _read(config.test_path, config.test_labels_path, config, "test")
  if config.test_labels_path:
    raise ConfigError(
      f"config.dataset.test_labels_path is {config.test_labels_path}, but config.dataset.test_path"
      " is empty."
    )
  train, names = pathlib.Path(config.train_path).expanduser(), config.arrays
  inside = train.suffix.lower() == ".npz" and names.test_features in feature_files.npz_names(train)
  if inside and config.test_share:
    raise ConfigError(
      f"config.dataset.test_share is {config.test_share:g}, but {train} holds a test set"
      f" ({names.test_features}); set it to 0, or name another array in"
      " config.dataset.arrays.test_features."
    )
  if not inside and not config.test_share:
    raise DataError(
      f"{train} holds no test set; give config.dataset.test_path, or split one off with"
      " config.dataset.test_share, for example 0.2."
    )
  if not inside:
    return None
  return feature_files.read_npz(train, dataclasses.asdict(names), "test_")


def _usable_rows(rows: LabelledRows, skip: bool) -> np.ndarray:
  """Numbers of the finite rows. Raises DataError for others, or says that they are left out."""
  finite = np.isfinite(rows.features).all(axis=1)
  bad = np.flatnonzero(~finite).tolist()
  if bad and not skip:
    more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    raise DataError(
      f"Row {bad[0]}{more} of {rows.where} has a NaN or an infinity; repair such rows, or leave"
      " them out with --config.dataset.skip_non_finite=True."
    )
  if len(bad) == len(finite):
    raise DataError(f"Every row of {rows.where} has a NaN or an infinity.")
  if bad:
    some = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
    print(f"memdiff: left out {len(bad)} rows of {rows.where} that have a NaN or an infinity: "
          f"{some}", file=sys.stderr)  # fmt: skip
  return np.flatnonzero(finite)


def _check_train(train: LabelledRows, labels, rows, names: Sequence[str]) -> None:
  """Raises DataError if the usable rows cannot be learnt from."""
  empty = np.flatnonzero(np.bincount(labels[rows], minlength=len(names)) == 0)
  if len(empty):
    raise DataError(
      f"Every row of the class {names[empty[0]]!r} in {train.where} has a NaN or an infinity; every"
      " class needs at least one."
    )
  same = (train.features == train.features[rows[0]]).all(axis=1)
  if same[rows].all():
    raise DataError(f"All rows of features in {train.where} are the same; they tell nothing apart.")


def _check_test(train: LabelledRows, test: LabelledRows) -> None:
  """Raises DataError if the test set speaks of something else than the training set."""
  widths = train.features.shape[1], test.features.shape[1]
  if widths[0] != widths[1]:
    raise DataError(
      f"The rows of {train.where} have {widths[0]} numbers and those of {test.where} {widths[1]};"
      " they must be of one model."
    )
  if train.columns and test.columns and train.columns != test.columns:
    names = sorted(set(train.columns) ^ set(test.columns))
    raise DataError(
      f"{train.where} and {test.where} have different columns of features, for example"
      f" {names[0]!r}; both must have the same."
    )
  if None not in (train.class_names, test.class_names) and train.class_names != test.class_names:
    raise DataError(f"{train.where} and {test.where} name the classes differently.")


# --- writing ---------------------------------------------------------------------------------


def export_suffix(train_path: str) -> str:
  """Of the format in which synthetic features go back to the user: .npz or .parquet."""
  return ".npz" if pathlib.Path(train_path).suffix.lower() in (".npz", ".npy") else ".parquet"


@dataclasses.dataclass(frozen=True)
class SyntheticRows:
  """Synthetic features, and where they come from.

  Attributes:
    method: what made them, for all rows or per row.
    features: [M, D] in the units of the training file.
    labels: [M] classes, int in [0, C).
    confidence: [M].
    number: [M], the n-th feature of its class.
    num_exemplars: [M] training rows of the class.
    nearest_index: [M] the nearest training row of the class, in `train_features`.
    nearest_distance: [M] to that row.
  """

  method: str | Sequence[str]
  features: np.ndarray
  labels: np.ndarray
  confidence: np.ndarray
  number: np.ndarray
  num_exemplars: np.ndarray
  nearest_index: np.ndarray
  nearest_distance: np.ndarray


def write_synthetic(
  path: str | pathlib.Path, data: LongTailEmbeddings, rows: SyntheticRows
) -> None:
  """Writes synthetic features so that they can be used like the file they were made from.

  Arrays (.npz) or columns (.parquet): features, labels (label in Parquet) as the training file
  calls them, confidence, method, number, num_exemplars, nearest_row of the training file from 0,
  nearest_distance. `load` reads such a file.

  Args:
    path: ends in .npz or .parquet.
    data: the set they were made from.
    rows: what is written.

  Raises:
    ConfigError: for another suffix. WorkdirError: if it cannot be written.
  """
  path = pathlib.Path(path)
  suffix = path.suffix.lower()
  if suffix not in (".npz", ".parquet"):
    raise ConfigError(f"The path of synthetic features, {path}, must end in .npz or .parquet.")
  labels = np.asarray(rows.labels)
  arrays = {
    "features": np.asarray(rows.features, np.float32),
    "label" if suffix == ".parquet" else "labels": data.label_values[labels],
    "confidence": np.asarray(rows.confidence),
    "method": np.broadcast_to(np.asarray(rows.method), len(labels)),
    "number": np.asarray(rows.number),
    "num_exemplars": np.asarray(rows.num_exemplars),
    "nearest_row": data.train_rows[rows.nearest_index],
    "nearest_distance": np.asarray(rows.nearest_distance),
  }
  if suffix == ".npz":
    write_arrays(path, arrays)
  else:
    write_atomically(path, _parquet_files().parquet_bytes(arrays))
