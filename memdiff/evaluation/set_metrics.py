"""How far a generated set of features is from a real one: distances, precision, recall, coverage.

Features are rows [N, D] of any network. A number says little without the name of the network, the
real set and the sizes of both. `frechet_distance` is the FID only with FID's own network. Every
metric goes through its rows in blocks, so that 50,000 features of 2,048 numbers need little more
memory than themselves.
"""

import math
from collections.abc import Iterable, Iterator

import numpy as np

from memdiff.errors import DataError
from memdiff.evaluation.feature_metrics import Gaussian, frechet

_BLOCK = 4096  # rows
_DISTANCES = 512  # MiB of distances at a time


def gaussian(blocks: Iterable[np.ndarray]) -> Gaussian:
  """Mean and covariance of features that come in blocks [n, D], in float64.

  Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
  variances", 1979, which loses no digits if means are large.

  Raises:
    DataError: for fewer than two rows, or a number that is not finite.
  """
  count, mean, scatter = 0, 0.0, 0.0
  for block in blocks:
    block = np.asarray(block, np.float64)
    if not np.isfinite(block).all():
      raise DataError("Features hold a NaN or an infinity; the network or its images are broken.")
    own_mean = block.mean(axis=0)
    centred, gap = block - own_mean, own_mean - mean
    share = len(block) / (count + len(block))
    scatter = scatter + centred.T @ centred + count * share * np.outer(gap, gap)
    mean, count = mean + share * gap, count + len(block)
  if count < 2:
    raise DataError(f"A covariance needs two rows of features or more, but there are {count}.")
  return Gaussian(mean, scatter / (count - 1), 0.0)


def frechet_distance(real: np.ndarray | Gaussian, generated: np.ndarray | Gaussian) -> float:
  """|mu_r - mu_g|^2 + tr(S_r + S_g - 2 (S_r S_g)^(1/2)), of features [N, D] or their Gaussians.

  Heusel et al., "GANs trained by a two time-scale update rule converge to a local Nash
  equilibrium", 2017, eq. 6. Biased upwards for small sets: compare sets of one size.

  Raises:
    DataError: as `gaussian`, or if the features differ in length.
  """
  both = [x if isinstance(x, Gaussian) else gaussian(_blocks(x)) for x in (real, generated)]
  if both[0].mean.shape != both[1].mean.shape:
    raise DataError(_of_one_length(*(len(g.mean) for g in both)))
  return frechet(*both)


def kernel_distance(
  real: np.ndarray, generated: np.ndarray, *, subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
  """KID: unbiased squared MMD with the kernel (x y / D + 1)^3. (mean, std) over random subsets.

  Binkowski et al., "Demystifying MMD GANs", 2018, section 4. May be slightly negative.

  Args:
    real, generated: [N, D] and [M, D].
    subsets: how many are drawn, without replacement within one.
    size: of each, on both sides.
    seed: of the draws.

  Raises:
    DataError: if a side has fewer rows than `size`.
  """
  smaller = _smaller(real, generated)
  if not 2 <= size <= smaller:
    raise DataError(
      f"The kernel distance draws subsets of {size} rows, but a set has only {smaller}; choose a"
      f" size from 2 to {smaller}."
    )
  generator = np.random.default_rng(seed)
  values = []
  for _ in range(subsets):
    x, y = (rows[generator.choice(len(rows), size, replace=False)] for rows in (real, generated))
    values.append(kernel_distance_of_all(x, y))
  return float(np.mean(values)), float(np.std(values))


def kernel_distance_of_all(x: np.ndarray, y: np.ndarray) -> float:
  """The same of all rows [n, D] and [m, D] at once, two or more each; for small sets."""
  x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)

  def kernel(a, b):
    return (a @ b.T / x.shape[1] + 1) ** 3

  def within(a):
    similar = kernel(a, a)
    return (similar.sum() - np.trace(similar)) / (len(a) * (len(a) - 1))

  return float(within(x) + within(y) - 2 * kernel(x, y).mean())


def inception_score(probabilities: np.ndarray, splits: int = 10) -> tuple[float, float]:
  """exp of the mean KL(p(y | x) || p(y)), in `splits` parts. (mean, std) over the parts.

  Salimans et al., "Improved techniques for training GANs", 2016, section 4. Only with the network
  that the score is named after is it the Inception score.

  Args:
    probabilities: [N, C] of generated images, in random order.
    splits: parts, of at least one image each.
  """
  if len(probabilities) < splits:
    raise DataError(f"There are {len(probabilities)} images, too few for {splits} parts.")
  values = []
  for part in np.array_split(np.asarray(probabilities, np.float64), splits):
    logs = np.log(np.maximum(part, 1e-300)) - np.log(np.maximum(part.mean(axis=0), 1e-300))
    values.append(math.exp(float((part * logs).sum(axis=1).mean())))
  return float(np.mean(values)), float(np.std(values))


def neighbourhood_metrics(
  real: np.ndarray, generated: np.ndarray, k: int = 3, wide: int = 5
) -> dict[str, float]:
  """What balls around features, up to a neighbour of the same set, say of the other set.

  - precision: share of generated features inside a ball of a real one; recall: the reverse
    (Kynkaanniemi et al., "Improved precision and recall metric for assessing generative models",
    2019, eq. 2 and 3);
  - density: mean number of real balls that a generated feature lies in, over `wide`; coverage:
    share of real balls with a generated feature inside (Naeem et al., "Reliable fidelity and
    diversity metrics for generative models", 2020, eq. 3 and 4).

  Args:
    real, generated: [N, D] and [M, D].
    k: the neighbour that gives the radius for precision and recall.
    wide: the same for density and coverage.

  Raises:
    DataError: if a set has too few rows for so many neighbours.
  """
  smaller, most = _smaller(real, generated), max(k, wide)
  if not 1 <= min(k, wide) <= most < smaller:
    raise DataError(
      f"Neighbourhoods of {most} features need more than {most} rows, but a set has {smaller};"
      " choose fewer neighbours, at least one."
    )
  (real_radii, wide_radii), (generated_radii,) = _radii(real, (k, wide)), _radii(generated, (k,))
  in_real = np.zeros(len(generated), bool)
  in_wide = np.zeros(len(generated), int)  # in how many wide balls
  in_generated, covered = np.zeros(len(real), bool), np.zeros(len(real), bool)
  start = 0
  for distances in distance_blocks(real, generated):
    rows = slice(start, start + len(distances))
    in_real |= (distances <= real_radii[rows, None]).any(axis=0)
    in_wide += (distances <= wide_radii[rows, None]).sum(axis=0)
    in_generated[rows] = (distances <= generated_radii[None]).any(axis=1)
    covered[rows] = distances.min(axis=1) <= wide_radii[rows]
    start = rows.stop
  return {
    "precision": float(in_real.mean()),
    "recall": float(in_generated.mean()),
    "density": float(in_wide.mean() / wide),
    "coverage": float(covered.mean()),
  }


def precision_recall_f(
  real: np.ndarray, generated: np.ndarray, *, clusters: int = 20, runs: int = 10, seed: int = 0
) -> tuple[float, float]:
  """(F_8, F_1/8) of the precision-recall curve of two distributions: recall and precision.

  Sajjadi et al., "Assessing generative models via precision and recall", 2018: both sets are
  clustered together, and histograms over the clusters are compared. Their means over several
  clusterings.

  Args:
    real, generated: [N, D] each, of one size.
    clusters: of the joint k-means.
    runs: clusterings.
    seed: of the first.

  Raises:
    DataError: if the sizes differ or there are fewer rows than clusters.
  """
  if len(real) != len(generated):
    raise DataError(
      f"The precision-recall curve compares sets of one size, not {len(real)} and"
      f" {len(generated)}; leave rows out of the larger one."
    )
  if _smaller(real, generated) < clusters:
    raise DataError(f"There are {len(real)} rows on a side, too few for {clusters} clusters.")
  from sklearn.cluster import MiniBatchKMeans  # takes a second to import

  both = np.concatenate([real, generated]).astype(np.float32)
  curves = []
  for run in range(runs):
    means = MiniBatchKMeans(clusters, n_init=10, random_state=seed + run).fit(both)
    counts = [
      np.bincount(part, minlength=clusters) / len(part) for part in np.split(means.labels_, 2)
    ]
    curves.append(_f_scores(*counts))
  return tuple(float(value) for value in np.mean(curves, axis=0))


def _f_scores(real: np.ndarray, generated: np.ndarray, beta: float = 8.0) -> tuple[float, float]:
  """The largest F_beta and F_1/beta on the curve of two histograms."""
  slopes = np.tan(np.linspace(1e-6, np.pi / 2 - 1e-6, 1001))[:, None]
  precision = np.minimum(slopes * real, generated).sum(axis=1)
  recall = precision / slopes[:, 0]

  def best(beta):
    above = (1 + beta**2) * precision * recall
    return (above / np.maximum(beta**2 * precision + recall, 1e-300)).max()

  return best(beta), best(1 / beta)


def _smaller(real: np.ndarray, generated: np.ndarray) -> int:
  """Rows of the smaller set; raises DataError if the two cannot be compared."""
  for name, rows in (("real", real), ("generated", generated)):
    if rows.ndim != 2:
      raise DataError(f"The {name} features have the shape {rows.shape}; they must be [N, D].")
    if not np.isfinite(rows).all():
      raise DataError(f"The {name} features hold a NaN or an infinity.")
  if real.shape[1] != generated.shape[1]:
    raise DataError(_of_one_length(real.shape[1], generated.shape[1]))
  return min(len(real), len(generated))


def _of_one_length(real: int, generated: int) -> str:
  return (
    f"Real features have {real} numbers and generated ones {generated}; they must come from one"
    " network."
  )


def _blocks(features: np.ndarray) -> Iterator[np.ndarray]:
  for start in range(0, len(features), _BLOCK):
    yield features[start : start + _BLOCK]


def distance_blocks(x: np.ndarray, y: np.ndarray) -> Iterator[np.ndarray]:
  """Euclidean distances from all rows of `y` [M, D] to some of `x`, block after block [n, M]."""
  from sklearn.metrics import pairwise_distances_chunked  # takes a second to import

  return pairwise_distances_chunked(x, y, working_memory=_DISTANCES)


def _radii(features: np.ndarray, neighbours: tuple[int, ...]) -> list[np.ndarray]:
  """Distances of every feature to these neighbours of it, [N] each."""
  ranks = list(neighbours)  # rank 0 is the feature itself
  blocks = distance_blocks(features, features)
  nearest = np.concatenate([np.partition(block, ranks, axis=1)[:, ranks] for block in blocks])
  return list(nearest.T)
