"""Long-tailed subsets of balanced training sets, exactly as LDAM-DRW builds them.

Cao et al., "Learning imbalanced datasets with label-distribution-aware margin loss", 2019, file
`imbalance_cifar.py`: one `RandomState(0)` shuffles the indices of each class, classes in ascending
order, and the first n_c of each class stay.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence

import numpy as np

from input_pipeline import identity
from memdiff.errors import DataError

PROFILES = ("exponential", "step")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongTailLabels:
  """What every long-tailed set has, of images or of embeddings: classes, labels, the split.

  The left-out examples are real, unseen members of the tail. Nothing trains on them but the oracle;
  they judge the hallucinations. The held-out examples are for selection, a part of the training set
  or a set of their own. Both may be empty.
  """

  name: str
  class_names: tuple[str, ...]
  profile: str
  imbalance: float  # training examples of the largest class / of the smallest, asked or counted
  train_labels: np.ndarray  # [N] int32
  holdout_labels: np.ndarray
  left_out_labels: np.ndarray
  test_labels: np.ndarray
  split_sha256: str  # of the training indices, those held out included

  @property
  def num_classes(self) -> int:
    return len(self.class_names)

  @property
  def train_counts(self) -> np.ndarray:
    """[C] training examples per class."""
    return np.bincount(self.train_labels, minlength=self.num_classes)

  @functools.cached_property
  def fingerprints(self) -> dict[str, str]:
    """SHA-256 of all that is in it, by field: every array and every tuple of names.

    Texts and numbers are left out: they follow from the config or from the arrays. So is what
    the set does not have.

    Raises:
      DataError: if a file is gone or cannot be read.
    """
    values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    return {
      name: identity.digest(value)
      for name, value in values.items()
      if value is not None and not isinstance(value, (str, int, float))
    }


def class_counts(n_max: int, num_classes: int, imbalance: float, profile: str) -> np.ndarray:
  """Training images per class.

  Args:
    n_max: images of the largest class.
    num_classes: C.
    imbalance: n_max / n_min, at least 1.
    profile: `exponential`, n_c = int(n_max imbalance^(-c / (C - 1))); or `step`, where the second
      half of the classes has int(n_max / imbalance).

  Returns:
    [C] int64.

  Raises:
    DataError: if a class would have no image.
  """
  ratio = 1 / imbalance
  if profile == "exponential":
    counts = [int(n_max * ratio ** (c / max(num_classes - 1, 1))) for c in range(num_classes)]
  else:
    counts = [n_max if c < num_classes // 2 else int(n_max * ratio) for c in range(num_classes)]
  if min(counts) < 1:
    raise DataError(
      f"An imbalance of {imbalance:g} leaves {counts.count(0)} of {num_classes} classes without a"
      f" training example; config.dataset.imbalance must be below {n_max}."
    )
  return np.asarray(counts)


def select(labels: np.ndarray, counts: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Indices that the long tail keeps, and those it leaves out.

  Args:
    labels: [N] int, in the official order of the training set.
    counts: [C] images to keep of each class.
    seed: of the one generator shared by all classes (0 for the standard splits).

  Returns:
    (kept, left_out): int64 indices into `labels`, grouped by ascending class.

  Raises:
    DataError: if a class has fewer images than its count.
  """
  generator = np.random.RandomState(seed)
  kept, left_out = [], []
  for label, count in enumerate(counts):
    indices = np.flatnonzero(labels == label)
    if len(indices) < count:
      raise DataError(
        f"Class {label} has {len(indices)} training images, but the long tail asks for {count};"
        " lower config.dataset.imbalance or choose another config.dataset.profile."
      )
    generator.shuffle(indices)
    kept.append(indices[:count])
    left_out.append(indices[count:])
  return np.concatenate(kept), np.concatenate(left_out)


def cut(
  labels: np.ndarray, class_names: Sequence[str], profile: str, imbalance: float, seed: int
) -> tuple[np.ndarray, np.ndarray, float]:
  """Makes a labelled set long-tailed.

  With the profiles exponential and step the largest class keeps as many examples as the smallest
  class of the set has, so that every class can follow; on balanced sets that is LDAM's rule.

  Args:
    labels: [N] int, every class with at least one example.
    class_names: C of them.
    profile: one of PROFILES, or natural, which keeps everything.
    imbalance: of the profiles other than natural.
    seed: of `select`.

  Returns:
    (kept, left out, imbalance of what is kept): indices grouped by ascending class.

  Raises:
    DataError: if a class would be left without an example.
  """
  counts = np.bincount(labels, minlength=len(class_names))
  if profile == "natural":
    kept = np.argsort(labels, kind="stable")
    return kept, kept[:0], float(counts.max() / counts.min())
  if counts.min() == 1 < imbalance:
    raise DataError(
      f"The class {class_names[counts.argmin()]!r} has only one training example, so that no long"
      " tail can be cut; set config.dataset.profile to natural."
    )
  counts = class_counts(int(counts.min()), len(class_names), imbalance, profile)
  return *select(labels, counts, seed), imbalance


def hold_out(
  kept: np.ndarray, labels: np.ndarray, share: float, seed: int, least: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """Splits training indices into those that train and those held out, for selection or as a test.

  Args:
    kept: [N] indices.
    labels: [N] of them.
    share: of each class that is held out, rounded down; at least one example always trains.
    seed: of a generator of its own, so that the same examples are kept whatever is held out.
    least: so many are held out at least, of classes that have more.

  Returns:
    (training, held out), each in the order of `kept`.
  """
  generator = np.random.RandomState(seed)
  held = np.zeros(len(kept), bool)
  for label in np.unique(labels):
    positions = np.flatnonzero(labels == label)
    number = min(max(int(share * len(positions)), least), len(positions) - 1)
    held[generator.permutation(positions)[:number]] = True
  return kept[~held], kept[held]


def fingerprint(*indices: np.ndarray) -> str:
  """SHA-256 of index lists, as little-endian int64, in order."""
  digest = hashlib.sha256()
  for array in indices:
    digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
  return digest.hexdigest()
