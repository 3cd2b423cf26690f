"""Data sets by name, made long-tailed and checked.

To add one: a function from DatasetConfig to Source, and its name in SOURCES (a set that TFDS has: a
row in tfds_sources.SETS).
"""

import dataclasses
import functools
import math

import numpy as np

from input_pipeline import digits, folder, index_lists, long_tail, tfds_sources
from input_pipeline.lazy_images import LazyImages, subset
from input_pipeline.source import Source
from memdiff.config import at_least, between, one_of, path_setting, setting
from memdiff.errors import ConfigError, DataError

PROFILES = (*long_tail.PROFILES, "natural", "list")


def _digits(config: "DatasetConfig") -> Source:
  if config.image_size:
    raise ConfigError(
      f"config.dataset.image_size is {config.image_size}, but digits are used as they are stored;"
      " set it to 0."
    )
  return digits.load()


def _folder(config: "DatasetConfig") -> Source:
  return folder.load(
    config.data_dir,
    config.image_size,
    config.skip_unreadable,
    config.test_share,
    config.test_seed,
    config.grey,
  )


def _tfds(name: str, config: "DatasetConfig") -> Source:
  return tfds_sources.load(name, config.data_dir, config.image_size)


SOURCES = {
  "digits": _digits,
  "folder": _folder,
  **{name: functools.partial(_tfds, name) for name in tfds_sources.SETS},
}


_IN_MEMORY = 16 * 2**30  # bytes of images that may be read


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
  name: str = setting("cifar100", "digits, folder, or a set of TFDS", one_of(SOURCES))
  data_dir: str = path_setting(
    'where TFDS keeps its sets, "": its default; folder: the folder of images'
  )
  profile: str = setting(
    "exponential",
    "how the set is cut: step as LDAM, natural takes all, list follows a file",
    one_of(PROFILES),
  )
  imbalance: float = setting(
    100.0, "exponential, step: images of the largest class / of the smallest", at_least(1)
  )
  split_seed: int = setting(
    0, "which images the tail keeps; 0 is the field's standard", between(0, 2**32 - 1)
  )
  list_path: str = path_setting(
    "list: indices (.npz, .npz:key) or an official list, a path and a label per line"
  )
  holdout: float = setting(
    0.0, "share of each class's training images kept for selection; 0: none", between(0, 0.5)
  )
  image_size: int = setting(
    0, "side in pixels of large sets and folders; 0: as stored", at_least(0)
  )
  grey: bool = setting(False, "folder: make images grey, of one channel")
  skip_unreadable: bool = setting(False, "folder: leave out images that cannot be read, and say so")
  test_share: float = setting(
    0.0, "folder: share of each class split off as the test set; 0: it has one", between(0, 0.5)
  )
  test_seed: int = setting(0, "folder: which images are split off", between(0, 2**32 - 1))

  def __post_init__(self):
    if self.test_share and self.name != "folder":
      raise ValueError(
        f"test_share is {self.test_share:g}, but {self.name} comes with a test set; set it to 0."
      )
    if self.grey and self.name != "folder":
      raise ValueError(f"grey is for folders; {self.name} is used as it is stored, leave it out.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongTailDataset(long_tail.LongTailLabels):
  """A long-tailed training set of images, its test set, and what the long tail left out."""

  train_images: np.ndarray | LazyImages  # [N, H, W, ch] uint8
  holdout_images: np.ndarray | LazyImages
  left_out_images: np.ndarray | LazyImages
  test_images: np.ndarray | LazyImages
  train_captions: tuple[str, ...] | None = None  # N texts, "" for images without; None: no captions
  test_captions: tuple[str, ...] | None = None

  @property
  def streamed(self) -> bool:
    """Whether the training images stay on disk."""
    return isinstance(self.train_images, LazyImages)


def in_memory(data: LongTailDataset) -> LongTailDataset:
  """The set with its images read, if they lie on disk: the largest centre square of each.

  Raises:
    ConfigError: if they would take more than 16 GiB.
  """
  parts = [f"{part}_images" for part in ("train", "holdout", "left_out", "test")]
  lazy = [part for part in parts if isinstance(getattr(data, part), LazyImages)]
  size = sum(math.prod(getattr(data, part).shape) for part in lazy)
  if size > _IN_MEMORY:
    raise ConfigError(
      f"The images of {data.name} would take {size / 2**30:.0f} GiB of memory, but may take"
      f" {_IN_MEMORY // 2**30}; lower config.dataset.image_size."
    )
  return dataclasses.replace(data, **{part: getattr(data, part).squares() for part in lazy})


def uncut(data: LongTailDataset) -> LongTailDataset:
  """The set before the long tail was cut: what was held out and left out trains as well."""
  parts = ("train", "holdout", "left_out")
  together = {
    kind: np.concatenate([getattr(data, f"{part}_{kind}") for part in parts])
    for kind in ("images", "labels")
  }
  fields = {f"train_{kind}": values for kind, values in together.items()}
  fields |= {f"{part}_{kind}": together[kind][:0] for part in parts[1:] for kind in together}
  return dataclasses.replace(data, train_captions=None, **fields)


def check(source: Source, name: str) -> None:
  """Raises DataError if a source breaks the rules that the rest of memdiff relies on."""
  num_classes = len(source.class_names)
  if num_classes < 2:
    raise DataError(f"Data set {name} has {num_classes} class; a classifier needs at least two.")
  splits = ("train", "test") if source.holdout_labels is None else ("train", "test", "holdout")
  for split in splits:
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
    if len(empty) and (split == "train" or (split == "test" and source.every_class_tested)):
      raise DataError(
        f"{where} has no image of class {source.class_names[empty[0]]!r}; every class needs at"
        " least one."
      )
    if images.shape[1:] != source.train_images.shape[1:]:
      raise DataError(
        f"The train and {split} images of {name} differ in shape: {source.train_images.shape[1:]}"
        f" and {images.shape[1:]}."
      )


def split(config: DatasetConfig, source: Source) -> tuple[np.ndarray, np.ndarray, float]:
  """(kept, left out) indices into the training set, and the imbalance of what is kept."""
  labels, names = source.train_labels, source.class_names
  if config.profile != "list":
    return long_tail.cut(labels, names, config.profile, config.imbalance, config.split_seed)
  kept = index_lists.read(config.list_path, labels, source.train_names)
  counts = np.bincount(labels[kept], minlength=len(names))
  if not counts.all():
    missing = np.flatnonzero(counts == 0)
    raise DataError(
      f"{len(missing)} classes have no image in {config.list_path}, the first is"
      f" {names[missing[0]]!r}; every class needs at least one."
    )
  left_out = np.setdiff1d(np.arange(len(labels)), kept)
  return kept, left_out, float(counts.max() / counts.min())


def hold_out(config: DatasetConfig, source: Source, kept: np.ndarray):
  """(indices that train, held-out images, their labels): the source's own, or a share of train."""
  labels = source.train_labels.astype(np.int32)
  if source.holdout_labels is None:
    train, held = long_tail.hold_out(kept, labels[kept], config.holdout, config.split_seed)
    return train, subset(source.train_images, held), labels[held]
  if config.holdout:
    raise ConfigError(
      f"config.dataset.holdout is {config.holdout:g}, but this {config.name} has held-out images of"
      " its own (val); set it to 0."
    )
  return kept, source.holdout_images, source.holdout_labels.astype(np.int32)


def load(config: DatasetConfig) -> LongTailDataset:
  """Loads a data set by name and cuts its long tail.

  Raises:
    ConfigError, DataError: with a sentence that says what to do.
  """
  source = SOURCES[config.name](config)
  check(source, config.name)
  kept, left_out, imbalance = split(config, source)
  labels = source.train_labels.astype(np.int32)
  train, holdout_images, holdout_labels = hold_out(config, source, kept)
  return LongTailDataset(
    name=config.name,
    class_names=source.class_names,
    profile=config.profile,
    imbalance=imbalance,
    train_images=subset(source.train_images, train),
    train_labels=labels[train],
    holdout_images=holdout_images,
    holdout_labels=holdout_labels,
    left_out_images=subset(source.train_images, left_out),
    left_out_labels=labels[left_out],
    test_images=source.test_images,
    test_labels=source.test_labels.astype(np.int32),
    split_sha256=long_tail.fingerprint(kept),
    train_captions=source.train_captions and tuple(source.train_captions[i] for i in train),
    test_captions=source.test_captions,
  )
