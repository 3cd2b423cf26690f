"""Long-tailed subsets of balanced training sets, exactly as LDAM-DRW builds them.

Cao et al., "Learning imbalanced datasets with label-distribution-aware margin loss", 2019, file
`imbalance_cifar.py`: one `RandomState(0)` shuffles the indices of each class, classes in ascending
order, and the first n_c of each class stay.
"""

import hashlib

import numpy as np

from memdiff.errors import DataError

PROFILES = ("exponential", "step")


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
    DataError: where a class would have no image.
  """
  ratio = 1 / imbalance
  if profile == "exponential":
    counts = [int(n_max * ratio ** (c / max(num_classes - 1, 1))) for c in range(num_classes)]
  else:
    counts = [n_max if c < num_classes // 2 else int(n_max * ratio) for c in range(num_classes)]
  if min(counts) < 1:
    raise DataError(
      f"An imbalance of {imbalance:g} leaves {counts.count(0)} of {num_classes} classes without a"
      f" training image; config.dataset.imbalance must be below {n_max}."
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
    DataError: where a class has fewer images than its count.
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


def hold_out(
  kept: np.ndarray, labels: np.ndarray, share: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """Splits training indices into those that train and those held out for selection.

  Args:
    kept: [N] indices.
    labels: [N] of them.
    share: of each class that is held out, rounded down; at least one example always trains.
    seed: of a generator of its own, so that the same examples are kept whatever is held out.

  Returns:
    (training, held out), each in the order of `kept`.
  """
  generator = np.random.RandomState(seed)
  held = np.zeros(len(kept), bool)
  for label in np.unique(labels):
    positions = np.flatnonzero(labels == label)
    number = int(share * len(positions))
    held[generator.permutation(positions)[:number]] = True
  return kept[~held], kept[held]


def fingerprint(*indices: np.ndarray) -> str:
  """SHA-256 of index lists, as little-endian int64, in order."""
  digest = hashlib.sha256()
  for array in indices:
    digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
  return digest.hexdigest()
