"""Quality of hallucinated features, judged against real ones of the same class.

All functions take NumPy arrays of one class in the standardised feature space, or what was made of
them: squared distances, Gaussians. "Left out" are the real features that the long tail removed and
that no method has seen: the truth of the truth test.
"""

import dataclasses
import functools

import numpy as np

MOST_ROWS = 1000  # of a set, in what compares all pairs
_PAIRS = 2**22  # whose distances are in memory at a time
_FLOOR = 1e-6  # added to a variance: a class whose features are all alike has none


def at_most(features: np.ndarray) -> np.ndarray:
  """MOST_ROWS of [N, D] if there are more, drawn without replacement, by the same seed always."""
  if len(features) <= MOST_ROWS:
    return features
  rows = np.random.default_rng(0).choice(len(features), MOST_ROWS, replace=False)
  return features[np.sort(rows)]


def squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Squared Euclidean distances of [n, D] and [m, D]. [n, m] float64."""
  if not min(len(x), len(y)):
    return np.zeros((len(x), len(y)))
  origin = y[0].astype(np.float64)  # features that are all alike are then at no distance
  x, y = x - origin, y - origin
  squares = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1)
  return np.maximum(squares - 2 * x @ y.T, 0.0)


def nearest_distances(
  points: np.ndarray, references: np.ndarray, *, itself: bool = True
) -> np.ndarray:
  """Euclidean distance of each point to the nearest reference. [n].

  Args:
    points: [n, D].
    references: [m, D], m > 0.
    itself: False: the points are the references, and none is its own neighbour; m > 1.
  """
  found, at_once = np.zeros(len(points)), max(_PAIRS // len(references), 1)
  for start in range(0, len(points), at_once):
    part = points[start : start + at_once]
    squared = squared_distances(part, references)
    if not itself:
      squared[np.arange(len(part)), start + np.arange(len(part))] = np.inf
    # Anew, since a copy is at no distance and rounding would leave one.
    nearest = references[squared.argmin(axis=1)].astype(np.float64)
    found[start : start + at_once] = np.linalg.norm(part - nearest, axis=1)
  return found


def _pairs(squared: np.ndarray) -> np.ndarray:
  """Of squared distances within a set [n, n]: each pair once."""
  return squared[np.triu_indices(len(squared), 1)]


def diversity(squared: np.ndarray) -> float:
  """Mean pairwise Euclidean distance, of squared ones [N, N]; NaN for fewer than two features."""
  return float(np.sqrt(_pairs(squared)).mean()) if len(squared) > 1 else float("nan")


@dataclasses.dataclass(frozen=True)
class Gaussian:
  """A normal distribution, with a Ledoit-Wolf covariance or, at shrinkage 0, that of the sample.

  Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", 2004:
  a handful of features in 64 dimensions has a singular sample covariance.
  """

  mean: np.ndarray  # [D]
  covariance: np.ndarray  # [D, D]
  shrinkage: float  # intensity, in [0, 1]

  @functools.cached_property
  def root(self) -> np.ndarray:
    """The symmetric root of the covariance. [D, D]."""
    values, vectors = np.linalg.eigh(self.covariance)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T

  @functools.cached_property
  def log_volume(self) -> float:
    """The log determinant of the covariance, which a floor keeps invertible."""
    return float(np.linalg.slogdet(self.covariance + _FLOOR * np.eye(len(self.mean)))[1])


def fit_gaussian(features: np.ndarray) -> Gaussian | None:
  """Of [N, D]; None for fewer than two features."""
  from sklearn.covariance import ledoit_wolf  # takes seconds

  if len(features) < 2:
    return None
  features = features.astype(np.float64)
  return Gaussian(features.mean(axis=0), *ledoit_wolf(features))


def gaussian_kl(real: Gaussian | None, synthetic: Gaussian | None) -> tuple[float, float]:
  """KL(real || synthetic) in nats.

  Returns:
    (KL, the larger of the two shrinkage intensities); NaN if one is not known.
  """
  if real is None or synthetic is None:
    return float("nan"), float("nan")
  dim = len(real.mean)
  floor = _FLOOR * np.eye(dim)
  gap = synthetic.mean - real.mean
  right = np.column_stack([real.covariance + floor, gap])
  solved = np.linalg.solve(synthetic.covariance + floor, right)
  log_ratio = synthetic.log_volume - real.log_volume
  kl = 0.5 * (np.trace(solved[:, :dim]) + gap @ solved[:, dim] - dim + log_ratio)
  return float(kl), float(max(real.shrinkage, synthetic.shrinkage))


def median_bandwidth(squared: np.ndarray) -> float:
  """Of an RBF kernel: the median squared distance within a set [n, n]; NaN below two features."""
  return float(np.median(_pairs(squared))) if len(squared) > 1 else float("nan")


def mmd(xx: np.ndarray, yy: np.ndarray, xy: np.ndarray, bandwidth: float) -> float:
  """Unbiased squared maximum mean discrepancy with an RBF kernel, exp(-d^2 / (2 bandwidth)).

  Gretton et al., "A kernel two-sample test", 2012, eq. 3. May be slightly negative.

  Args:
    xx, yy, xy: squared distances [n, n], [m, m], [n, m] within and between two sets.
    bandwidth: that of the real features which others are compared by, never of what is compared,
      so that values of different generators are on one scale.

  Returns:
    NaN for fewer than two features on a side, or if there is no bandwidth above 0.
  """
  n, m = xy.shape
  if min(n, m) < 2 or not bandwidth > 0:
    return float("nan")

  def kernel(squared):
    return np.exp(-squared / (2 * bandwidth))

  within_x = (kernel(xx).sum() - n) / (n * (n - 1))
  within_y = (kernel(yy).sum() - m) / (m * (m - 1))
  return float(within_x + within_y - 2 * kernel(xy).mean())


def frechet(x: Gaussian | None, y: Gaussian | None) -> float:
  """Frechet distance of two Gaussians; NaN if one is not known."""
  if x is None or y is None:
    return float("nan")
  # tr (cov_x cov_y)^(1/2) by two symmetric eigenproblems, which singular matrices do not upset.
  root = np.sqrt(np.maximum(np.linalg.eigvalsh(x.root @ y.covariance @ x.root), 0))
  gap = x.mean - y.mean
  return float(gap @ gap + np.trace(x.covariance) + np.trace(y.covariance) - 2 * root.sum())


def precision_recall(
  within_real: np.ndarray, within_synthetic: np.ndarray, between: np.ndarray, k: int = 3
) -> tuple[float, float]:
  """Improved precision and recall (Kynkaanniemi et al. 2019) with k-nearest-neighbour balls.

  Precision: share of synthetic features inside a ball around a real one; recall: share of real
  features inside a ball around a synthetic one. k shrinks to the set if it is small; NaN below
  two features.

  Args:
    within_real, within_synthetic: squared distances [n, n] and [m, m].
    between: [n, m].
    k: number of neighbours.
  """
  if min(between.shape) < 2:
    return float("nan"), float("nan")

  def radii(squared):
    nearest = min(k, len(squared) - 1)
    return np.partition(squared, nearest, axis=1)[:, nearest]

  precision = (between <= radii(within_real)[:, None]).any(axis=0).mean()
  recall = (between <= radii(within_synthetic)[None]).any(axis=1).mean()
  return float(precision), float(recall)


def memorization_ratio(copied: np.ndarray, unseen: np.ndarray) -> float:
  """Median distance of synthetic features to the nearest training one, over that of left-out ones.

  0 means copies, 1 as far from the exemplars as unseen real members of the class are.

  Args:
    copied: [M] distances of synthetic features.
    unseen: [L] distances of left-out features.

  Returns:
    NaN if there are none of either, or the left-out ones are copies.
  """
  if not min(len(copied), len(unseen)) or np.median(unseen) == 0:
    return float("nan")
  return float(np.median(copied) / np.median(unseen))


def separation(features: np.ndarray, labels: np.ndarray, centre: np.ndarray, num_classes: int):
  """Mean cosine within each class minus that to the other classes, after centring.

  Args:
    features: [M, D] of all classes.
    labels: [M].
    centre: [D], subtracted first.
    num_classes: C.

  Returns:
    [C] in [-2, 2], NaN for classes with fewer than two features or without others.
  """
  centred = features - centre
  unit = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
  result = np.full(num_classes, np.nan)
  total = unit.sum(axis=0)
  for label in range(num_classes):
    members = unit[labels == label]
    others = len(unit) - len(members)
    if len(members) < 2 or others == 0:
      continue
    summed = members.sum(axis=0)
    within = (summed @ summed - len(members)) / (len(members) * (len(members) - 1))
    across = summed @ (total - summed) / (len(members) * others)
    result[label] = within - across
  return result
