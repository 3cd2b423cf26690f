"""Generated images against real ones: all together, by group of classes, class by class.

Arrays in, numbers out. Features are those of one network; distances to training images are
Euclidean, in pixels.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from memdiff.evaluation import set_metrics
from memdiff.evaluation.feature_metrics import at_most, diversity, squared_distances
from memdiff.evaluation.scores import Group

COPY = 1 / 3  # of the distance to the second nearest training image
_BLOCK = 5000  # images in float at a time


@dataclasses.dataclass(frozen=True)
class Labelled:
  """Features of images, with their classes."""

  features: np.ndarray  # [N, D]
  labels: np.ndarray  # [N] int

  def of(self, classes: Sequence[int]) -> np.ndarray:
    """The features of some classes. [n, D]."""
    return self.features[np.isin(self.labels, classes)]


def compare_sets(
  real: np.ndarray, generated: np.ndarray, *, kid_size: int, k: int, seed: int
) -> dict[str, float]:
  """All metrics of two sets of features.

  Args:
    real, generated: [N, D] and [M, D].
    kid_size: rows of a subset of the kernel distance.
    k: neighbours of precision and recall; density and coverage take 5, as published.
    seed: of subsets and clusterings.

  Raises:
    DataError: if the sets are too small, or differ in the length of their features.
  """
  distance = set_metrics.frechet_distance(real, generated)
  kid, kid_std = set_metrics.kernel_distance(real, generated, size=kid_size, seed=seed)
  near = set_metrics.neighbourhood_metrics(real, generated, k)
  smaller, generator = min(len(real), len(generated)), np.random.default_rng(seed)
  f8, f1_8 = set_metrics.precision_recall_f(
    *(rows[generator.permutation(len(rows))[:smaller]] for rows in (real, generated)), seed=seed
  )
  return {"fd": distance, "kid": kid, "kid_std": kid_std, **near, "f8": f8, "f1_8": f1_8}


def by_group(real: Labelled, generated: Labelled, groups: Sequence[Group]) -> dict[str, float]:
  """{"fd_<group>", "kid_<group>"}; NaN if a group has fewer than two images on a side."""
  found = {}
  for group in groups:
    sides = real.of(group.classes), generated.of(group.classes)
    found[f"fd_{group.name}"] = _if_two(set_metrics.frechet_distance, *sides)
    found[f"kid_{group.name}"] = _if_two(set_metrics.kernel_distance_of_all, *map(at_most, sides))
  return found


def by_class(real: Labelled, generated: Labelled, num_classes: int) -> dict[str, np.ndarray]:
  """Kernel distance and diversity of every class. [C] each, NaN without two images on a side.

  Diversity is the mean distance of two generated images over that of two real ones.
  """
  kid, spread = np.full(num_classes, np.nan), np.full(num_classes, np.nan)
  for c in range(num_classes):
    sides = at_most(real.of([c])), at_most(generated.of([c]))
    kid[c] = _if_two(set_metrics.kernel_distance_of_all, *sides)
    within = [diversity(squared_distances(x, x)) for x in sides]
    spread[c] = within[1] / within[0] if within[0] > 0 else np.nan
  return {"kid": kid, "diversity": spread}


def _if_two(metric: Callable, real: np.ndarray, generated: np.ndarray):
  return metric(real, generated) if min(len(real), len(generated)) > 1 else np.nan


@dataclasses.dataclass(frozen=True)
class Neighbours:
  """The training image nearest to each generated one.

  Attributes:
    index: [M] of the training image.
    distance: [M] to it.
    copied: [M] bool, whether it is less than a third as far as the second nearest one (Yoon et al.,
      "Diffusion probabilistic models generalize when they fail to memorize", 2023).
  """

  index: np.ndarray
  distance: np.ndarray
  copied: np.ndarray


def nearest(images: np.ndarray, train_images: np.ndarray) -> Neighbours:
  """Of images or features [M, ...] among those of training [N, ...], N at least 2."""
  from sklearn.neighbors import NearestNeighbors  # takes a second to import

  search = NearestNeighbors(n_neighbors=2, algorithm="brute").fit(_points(train_images))
  found = [
    search.kneighbors(_points(images[start : start + _BLOCK]))
    for start in range(0, len(images), _BLOCK)
  ]
  distance, index = (np.concatenate(parts) for parts in zip(*found, strict=True))
  return Neighbours(index[:, 0], distance[:, 0], distance[:, 0] < COPY * distance[:, 1])


def _points(images: np.ndarray) -> np.ndarray:
  return images.reshape(len(images), -1).astype(np.float32)
