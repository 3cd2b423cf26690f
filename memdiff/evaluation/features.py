"""Quality of hallucinated features, judged against real ones of the same class.

All functions take NumPy arrays of one class in the standardised feature space. "Left out" are the
real features that the long tail removed and that no method has seen: the truth of the truth test.
"""

import numpy as np
from scipy.spatial.distance import cdist, pdist


def diversity(features: np.ndarray) -> float:
  """Mean pairwise Euclidean distance within [N, D]; NaN for fewer than two features."""
  return float(pdist(features).mean()) if len(features) > 1 else float("nan")


def gaussian_kl(real: np.ndarray, synthetic: np.ndarray) -> tuple[float, float]:
  """KL(N(real) || N(synthetic)) in nats, with Ledoit-Wolf covariances.

  Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", 2004:
  a handful of features in 64 dimensions has a singular sample covariance.

  Returns:
    (KL, the larger of the two shrinkage intensities in [0, 1]); NaN for fewer than two features.
  """
  from sklearn.covariance import ledoit_wolf  # takes seconds

  if min(len(real), len(synthetic)) < 2:
    return float("nan"), float("nan")
  (cov_r, shrink_r), (cov_s, shrink_s) = ledoit_wolf(real), ledoit_wolf(synthetic)
  dim = real.shape[1]
  # A class whose features are all alike has a zero covariance; a floor keeps it invertible.
  floor = 1e-6 * np.eye(dim)
  cov_r, cov_s = cov_r + floor, cov_s + floor
  gap = synthetic.mean(axis=0) - real.mean(axis=0)
  solved = np.linalg.solve(cov_s, np.column_stack([cov_r, gap]))
  log_ratio = np.linalg.slogdet(cov_s)[1] - np.linalg.slogdet(cov_r)[1]
  kl = 0.5 * (np.trace(solved[:, :dim]) + gap @ solved[:, dim] - dim + log_ratio)
  return float(kl), float(max(shrink_r, shrink_s))


def mmd(x: np.ndarray, y: np.ndarray) -> float:
  """Unbiased squared maximum mean discrepancy with an RBF kernel.

  Gretton et al., "A kernel two-sample test", 2012, eq. 3; bandwidth: median pairwise distance of
  the pooled set. May be slightly negative; NaN for fewer than two features on a side.
  """
  n, m = len(x), len(y)
  if min(n, m) < 2:
    return float("nan")
  squared = cdist(np.concatenate([x, y]), np.concatenate([x, y]), "sqeuclidean")
  median = np.median(squared[np.triu_indices(n + m, 1)])
  kernel = np.exp(-squared / (2 * median)) if median > 0 else np.ones_like(squared)
  xx, yy, xy = kernel[:n, :n], kernel[n:, n:], kernel[:n, n:]
  within_x = (xx.sum() - np.trace(xx)) / (n * (n - 1))
  within_y = (yy.sum() - np.trace(yy)) / (m * (m - 1))
  return float(within_x + within_y - 2 * xy.mean())


def frechet(x: np.ndarray, y: np.ndarray) -> float:
  """Frechet distance of the two Gaussians, Ledoit-Wolf covariances; NaN below two features."""
  from sklearn.covariance import ledoit_wolf  # takes seconds

  if min(len(x), len(y)) < 2:
    return float("nan")
  cov_x, cov_y = ledoit_wolf(x)[0], ledoit_wolf(y)[0]
  # tr (cov_x cov_y)^(1/2) by two symmetric eigenproblems, which singular matrices do not upset.
  values, vectors = np.linalg.eigh(cov_x)
  half = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
  root = np.sqrt(np.maximum(np.linalg.eigvalsh(half @ cov_y @ half), 0))
  gap = x.mean(axis=0) - y.mean(axis=0)
  return float(gap @ gap + np.trace(cov_x) + np.trace(cov_y) - 2 * root.sum())


def precision_recall(real: np.ndarray, synthetic: np.ndarray, k: int = 3) -> tuple[float, float]:
  """Improved precision and recall (Kynkaanniemi et al. 2019) with k-nearest-neighbour balls.

  Precision: share of synthetic features inside a ball around a real one; recall: share of real
  features inside a ball around a synthetic one. k shrinks to the set where it is small; NaN below
  two features.
  """
  if min(len(real), len(synthetic)) < 2:
    return float("nan"), float("nan")

  def radii(points):
    return np.sort(cdist(points, points), axis=1)[:, min(k, len(points) - 1)]

  between = cdist(real, synthetic)
  precision = (between <= radii(real)[:, None]).any(axis=0).mean()
  recall = (between <= radii(synthetic)[None, :]).any(axis=1).mean()
  return float(precision), float(recall)


def memorization_ratio(train: np.ndarray, left_out: np.ndarray, synthetic: np.ndarray) -> float:
  """Median distance of synthetic features to the nearest training one, over that of left-out ones.

  0 means copies, 1 as far from the exemplars as unseen real members of the class are.
  """
  if min(len(train), len(left_out), len(synthetic)) == 0:
    return float("nan")
  copied = np.median(cdist(synthetic, train).min(axis=1))
  unseen = np.median(cdist(left_out, train).min(axis=1))
  return float(copied / unseen) if unseen > 0 else float("nan")


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
    own = unit[labels == label]
    others = len(unit) - len(own)
    if len(own) < 2 or others == 0:
      continue
    summed = own.sum(axis=0)
    within = (summed @ summed - len(own)) / (len(own) * (len(own) - 1))
    across = summed @ (total - summed) / (len(own) * others)
    result[label] = within - across
  return result
