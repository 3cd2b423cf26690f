"""Which generated images are kept: filters by name, and what they look at.

A name may join several with &, as in `confident&new`; an image is kept if all of them keep it. At
its end may stand what a kept image weighs in the loss, as in `diffult@0.3`.
Limits are quantiles over held-out training images, every class alike, so that a filter lets most
real images pass that its classifier has not seen. To add a filter: a function of the signs, and a
row in FILTERS.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

JOINED, WEIGHING = "&", "@"


@dataclasses.dataclass(frozen=True)
class Signs:
  """What is known of images.

  Attributes:
    labels: [M] the classes that they are to show.
    confidence: [M] the classifier's probability of that class, without the class prior.
    predicted: [M] the class in which the classifier sees them.
    second: [M] the class in which a second classifier sees them; None if there is none.
    distance: [M] of their features to the mean of the class's training images, 1 - cosine.
    copied: [M] bool, whether they are copies of a training image.
  """

  labels: np.ndarray
  confidence: np.ndarray
  predicted: np.ndarray
  second: np.ndarray | None
  distance: np.ndarray
  copied: np.ndarray


@dataclasses.dataclass(frozen=True)
class Limits:
  """Of held-out training images: what a share of them, `PoolConfig.rejected`, does not reach."""

  confidence: float  # at least
  distance: float  # at most
  nearest: float  # at least: closer to the mean than nearly all real images


@dataclasses.dataclass(frozen=True)
class Filter:
  """A row of the table.

  Attributes:
    keep: (signs, limits) -> [M] bool.
    description: for reports, after "used:".
    needs_limits: whether it compares with held-out training images.
    needs_second: whether it asks the second classifier.
  """

  keep: Callable[[Signs, Limits | None], np.ndarray]
  description: str
  needs_limits: bool = False
  needs_second: bool = False


FILTERS = {
  "none": Filter(lambda signs, _: np.ones(len(signs.labels), bool), "all"),
  "confident": Filter(
    lambda signs, limits: signs.confidence >= limits.confidence,
    "those that a classifier of real images gives to their class as surely as real ones",
    needs_limits=True,
  ),
  "near": Filter(
    lambda signs, limits: signs.distance <= limits.distance,
    "those whose features are as near to the mean of their class as real ones",
    needs_limits=True,
  ),
  # DiffuLT (Shao et al. 2024) keeps what is approximately in distribution.
  "diffult": Filter(
    lambda signs, limits: (signs.distance <= limits.distance) & (signs.distance >= limits.nearest),
    "those whose features are near to the mean of their class, but not on it",
    needs_limits=True,
  ),
  "agreeing": Filter(
    lambda signs, _: (signs.predicted == signs.labels) & (signs.second == signs.labels),
    "those in which two classifiers of real images see their class",
    needs_second=True,
  ),
  "new": Filter(lambda signs, _: ~signs.copied, "those that are no copies of training images"),
}


def is_known(name: str) -> bool:
  try:
    weight = weight_of(name)
  except ValueError:
    return False
  parts = _names(name)
  return (
    0 < weight < float("inf")
    and all(part in FILTERS for part in parts)
    and len(set(parts)) == len(parts)
  )


def _names(name: str) -> list[str]:
  return name.partition(WEIGHING)[0].split(JOINED)


def weight_of(name: str) -> float:
  """What an image that a filter keeps weighs in the loss, times what the config says."""
  _, sign, number = name.partition(WEIGHING)
  return float(number) if sign else 1.0


def parts_of(name: str) -> list[Filter]:
  return [FILTERS[part] for part in _names(name)]


def keep(name: str, signs: Signs, limits: Limits | None) -> np.ndarray:
  """[M] bool, the images that pass all of a name's filters."""
  return np.logical_and.reduce([part.keep(signs, limits) for part in parts_of(name)])


def describe(name: str) -> str:
  words, weight = ", of these ".join(part.description for part in parts_of(name)), weight_of(name)
  return words if weight == 1 else f"{words}; each weighs {weight:g}"


def limits(
  confidence: np.ndarray, distance: np.ndarray, labels: np.ndarray, rejected: float
) -> Limits:
  """Of held-out training images [B], so that each limit rejects a share of them.

  Args:
    confidence, distance: as in Signs.
    labels: [B].
    rejected: in (0, 0.5).
  """
  weights = 1 / np.bincount(labels)[labels]  # every class alike

  def quantile(values, share):
    return float(np.quantile(values, share, method="inverted_cdf", weights=weights))

  return Limits(
    confidence=quantile(confidence, rejected),
    distance=quantile(distance, 1 - rejected),
    nearest=quantile(distance, rejected),
  )
