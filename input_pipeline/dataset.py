"""Data sets by name, made long-tailed and checked."""

import dataclasses

import numpy as np

from input_pipeline import digits, long_tail
from input_pipeline.source import Source
from memdiff.config import at_least, between, one_of
from memdiff.errors import DataError

SOURCES = {"digits": digits.load}


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
  name: str = one_of(SOURCES)
  profile: str = one_of(long_tail.PROFILES)
  imbalance: float = at_least(1)
  split_seed: int = between(0, 2**32 - 1)


@dataclasses.dataclass(frozen=True)
class LongTailDataset:
  """A long-tailed training set, its test set, and what the long tail left out.

  The left-out images are real, unseen members of the tail. Nothing trains on them but the oracle;
  they judge the hallucinations.
  """

  name: str
  class_names: tuple[str, ...]
  imbalance: float
  train_images: np.ndarray  # [N, H, W, ch] uint8
  train_labels: np.ndarray  # [N] int32
  left_out_images: np.ndarray
  left_out_labels: np.ndarray
  test_images: np.ndarray
  test_labels: np.ndarray
  split_sha256: str  # of the kept training indices

  @property
  def num_classes(self) -> int:
    return len(self.class_names)

  @property
  def train_counts(self) -> np.ndarray:
    """[C] training images per class."""
    return np.bincount(self.train_labels, minlength=self.num_classes)


def check(source: Source, name: str) -> None:
  """Raises DataError where a source breaks the rules that the rest of memdiff relies on."""
  num_classes = len(source.class_names)
  if num_classes < 2:
    raise DataError(f"Data set {name} has {num_classes} class; a classifier needs at least two.")
  for split in ("train", "test"):
    images = getattr(source, f"{split}_images")
    labels = getattr(source, f"{split}_labels")
    where = f"The {split} set of {name}"
    if images.ndim != 4 or images.dtype != np.uint8:
      raise DataError(
        f"{where} has images of shape {images.shape} and type {images.dtype}; memdiff reads uint8"
        " images [N, height, width, channels]."
      )
    if labels.ndim != 1 or len(labels) != len(images):
      raise DataError(
        f"{where} has {len(images)} images and labels of shape {labels.shape}; there must be one"
        " label per image."
      )
    if not np.issubdtype(labels.dtype, np.integer):
      raise DataError(f"{where} has labels of type {labels.dtype}; they must be whole numbers.")
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
      raise DataError(
        f"{where} has label {labels[wrong[0]]} at index {wrong[0]}; labels must lie between 0 and"
        f" {num_classes - 1}."
      )
    empty = np.flatnonzero(np.bincount(labels, minlength=num_classes) == 0)
    if len(empty):
      raise DataError(
        f"{where} has no image of class {source.class_names[empty[0]]!r}; every class needs at"
        " least one."
      )
  if source.train_images.shape[1:] != source.test_images.shape[1:]:
    raise DataError(
      f"The train and test images of {name} differ in shape: {source.train_images.shape[1:]} and"
      f" {source.test_images.shape[1:]}."
    )


def load(config: DatasetConfig) -> LongTailDataset:
  """Loads a data set by name and cuts its long tail.

  The largest class keeps as many images as the smallest class of the source has, so that every
  class can follow the profile; on balanced sets that is LDAM's rule.
  """
  source = SOURCES[config.name]()
  check(source, config.name)
  num_classes = len(source.class_names)
  n_max = int(np.bincount(source.train_labels).min())
  counts = long_tail.class_counts(n_max, num_classes, config.imbalance, config.profile)
  kept, left_out = long_tail.select(source.train_labels, counts, config.split_seed)
  return LongTailDataset(
    name=config.name,
    class_names=source.class_names,
    imbalance=config.imbalance,
    train_images=source.train_images[kept],
    train_labels=source.train_labels[kept].astype(np.int32),
    left_out_images=source.train_images[left_out],
    left_out_labels=source.train_labels[left_out].astype(np.int32),
    test_images=source.test_images,
    test_labels=source.test_labels.astype(np.int32),
    split_sha256=long_tail.fingerprint(kept),
  )
