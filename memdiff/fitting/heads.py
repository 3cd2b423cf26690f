"""Heads that are fitted, not trained by steps: closed forms and convex problems.

They are fitted on the host in NumPy, in seconds. A family fits all of its settings at once, since
settings share most of the work. Features are those of `Training`, in which every column should have
mean 0 and deviation 1. Logits are meant for classes that come as often as `Training.shares` says;
heads compute them of arrays of NumPy and of JAX.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memdiff.classifier.priors import log_shares

_ITERATIONS = 200  # of L-BFGS, at most
_FLATTER, _BETTER = 1e-3, 1e-5  # it ends if its gradient or its progress is smaller, relatively
_ROWS = 2**16  # features at a time
_AT_ONCE = 2**26  # logits
_LEAST = 1e-6  # of a variance, relative to the mean of all


@dataclasses.dataclass(frozen=True, eq=False)
class Training:
  """What heads are fitted to.

  Attributes:
    features: [N, D] float32.
    labels: [N] int.
    shares: [C] of the classes where the head is used, of sum 1; for balanced accuracy all alike.
      Classes without features are never predicted.
    weights: [N] float32 of the examples, above 0 and 1 in the mean; None: all count alike.
  """

  features: np.ndarray
  labels: np.ndarray
  shares: np.ndarray
  weights: np.ndarray | None = None

  @functools.cached_property
  def totals(self) -> np.ndarray:
    """Sums of the weights of each class. [C]."""
    return np.bincount(self.labels, self.weights, minlength=len(self.shares))

  @functools.cached_property
  def counts(self) -> np.ndarray:
    """How many examples each class has; if they are weighted, Kish's effective number. [C].

    That is (sum w)^2 / sum w^2 (Kish 1965, section 11.7). The mean of that many equally weighted
    examples would be known just as precisely.
    """
    if self.weights is None:
      return self.totals
    squares = np.bincount(
      self.labels, np.square(self.weights, dtype=np.float64), minlength=len(self.shares)
    )
    return np.square(self.totals) * _inverse(squares)

  @functools.cached_property
  def importance(self) -> np.ndarray:
    """The weights, 1 if there are none. [N] float32."""
    return np.ones(len(self.labels), np.float32) if self.weights is None else self.weights

  @functools.cached_property
  def log_shares(self) -> np.ndarray:
    """[C] float32, minus infinity for classes without features."""
    return np.where(self.counts > 0, log_shares(self.shares), -np.inf).astype(np.float32)

  @functools.cached_property
  def means(self) -> np.ndarray:
    """Of the classes, 0 for one without features. [C, D]."""
    return self.means_of(lambda rows: rows)

  def means_of(self, transform: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Class means [C, D] of what `transform` makes of rows [n, D], some at a time."""
    from scipy import sparse  # takes a fifth of a second

    weight = (self.importance * _inverse(self.totals)[self.labels]).astype(np.float32)
    means = np.zeros((len(self.counts), self.features.shape[1]), np.float32)
    for start in range(0, len(self.labels), _ROWS):
      rows = slice(start, start + _ROWS)
      number = len(self.labels[rows])
      places = self.labels[rows], np.arange(number)
      of_class = sparse.csr_array((weight[rows], places), (len(means), number))
      means += of_class @ transform(self.features[rows])
    return means

  @functools.cached_property
  def within(self) -> tuple[np.ndarray, np.ndarray]:
    """The covariance around class means: eigenvectors [D, D] in columns, values [D]."""
    total, freedom = self.totals.sum(), (self.totals * (1 - _inverse(self.counts))).sum()
    freedom = float(freedom) if freedom > 1e-9 * total else 1.0
    scatter = self._products()
    scatter -= (self.means * self.totals[:, None].astype(np.float32)).T @ self.means
    values, vectors = np.linalg.eigh(scatter / freedom)
    return vectors, np.maximum(values, 0)

  def _products(self) -> np.ndarray:
    """Sum of w x x^T over the examples. [D, D]."""
    if self.weights is None:
      return self.features.T @ self.features
    starts = range(0, len(self.labels), _ROWS)
    parts = [slice(start, start + _ROWS) for start in starts]
    return sum(
      (self.features[rows] * self.weights[rows, None]).T @ self.features[rows] for rows in parts
    )

  def shrunk(self, share: float) -> np.ndarray:
    """The eigenvalues, drawn towards their mean by `share`. [D]."""
    _, values = self.within
    mean = values.mean() or 1.0
    return np.maximum((1 - share) * values + share * mean, _LEAST * mean)


def _inverse(numbers: np.ndarray) -> np.ndarray:
  """1 / x, 0 for 0."""
  return np.where(numbers > 0, 1 / np.where(numbers > 0, numbers, 1), 0)


@dataclasses.dataclass(frozen=True, eq=False)
class Linear:
  """A kernel [D, C] and a bias [C]."""

  kernel: np.ndarray
  bias: np.ndarray

  def logits(self, features: np.ndarray) -> np.ndarray:
    """[N, D] -> [N, C]."""
    return features @ self.kernel + self.bias[None]


@dataclasses.dataclass(frozen=True, eq=False)
class Gaussians:
  """Log densities of Gaussians with diagonal covariances behind a linear map, and a bias.

  Attributes:
    kernel: [D, K] of the map.
    means: [C, K].
    variances: [C, K].
    bias: [C].
  """

  kernel: np.ndarray
  means: np.ndarray
  variances: np.ndarray
  bias: np.ndarray

  def logits(self, features: np.ndarray) -> np.ndarray:
    """[N, D] -> [N, C]."""
    mapped, precision = features @ self.kernel, 1 / self.variances
    logarithms = _library(self.variances).log(self.variances)
    constant = (self.means**2 * precision + logarithms).sum(axis=1)
    linear = mapped @ (self.means * precision).T
    return linear - 0.5 * (mapped**2 @ precision.T + constant[None]) + self.bias[None]


@dataclasses.dataclass(frozen=True, eq=False)
class Cosines:
  """Cosines of powers of features to class means [C, D], times `scale`, and a bias [C]."""

  power: np.ndarray  # []
  means: np.ndarray
  bias: np.ndarray
  scale: float = 20.0  # of cosines, so that a softmax of them is not flat

  def logits(self, features: np.ndarray) -> np.ndarray:
    """[N, D] -> [N, C]."""
    return self.scale * _powers(features, self.power) @ self.means.T + self.bias[None]


Head = Linear | Gaussians | Cosines
KINDS = {kind.__name__: kind for kind in (Linear, Gaussians, Cosines)}


def _library(array: Any) -> Any:
  return jnp if isinstance(array, jax.Array) else np


def discriminants(training: Training, settings: Sequence[float]) -> list[Head]:
  """Linear discriminant analysis with a shrunk covariance (Friedman 1989, equation 18).

  Args:
    training: see there.
    settings: shares by which the pooled covariance is drawn towards a multiple of the identity.
  """
  vectors, _ = training.within
  mapped, found = training.means @ vectors, []
  for share in settings:
    scaled = mapped / training.shrunk(share)[None]
    bias = training.log_shares - 0.5 * (mapped * scaled).sum(axis=1)
    found.append(Linear(vectors @ scaled.T, bias))
  return found


def probabilistic_discriminants(training: Training, settings: Sequence[float]) -> list[Head]:
  """Probabilistic linear discriminant analysis (Ioffe 2006): class means are uncertain.

  They are drawn from a Gaussian, whose covariance is estimated from the means that are there. The
  mean of a class with few features is drawn towards the mean of all, and its density is wider.

  Args:
    training: see there.
    settings: as of `discriminants`.
  """
  vectors, _ = training.within
  counts, found = training.counts, []
  present = counts > 0
  noise = (1 / counts[present]).mean()  # of a mean, in units of the covariance within classes
  for share in settings:
    whitened = vectors / np.sqrt(training.shrunk(share))[None]
    means = training.means @ whitened
    centre = means[present].mean(axis=0)
    _, lengths, rows = np.linalg.svd((means - centre[None])[present], full_matrices=False)
    between = lengths**2 / max(int(present.sum()) - 1, 1) - noise
    told = between > 0  # along the others, classes do not differ
    kernel, between = whitened @ rows[told].T, between[told]
    evidence = counts[:, None] * between[None]
    trust = (evidence / (evidence + 1)).astype(np.float32)
    shift = centre @ rows[told].T
    variances = (1 + between[None] / (evidence + 1)).astype(np.float32)
    means = trust * (means @ rows[told].T - shift[None]) + shift[None]
    found.append(Gaussians(kernel, means, variances, training.log_shares))
  return found


def centroids(training: Training, settings: Sequence[float]) -> list[Head]:
  """The class mean that is nearest by cosine, after a power transform (Yang et al. 2021).

  Args:
    training: see there.
    settings: powers; 1 leaves features as they are.
  """
  found = []
  for power in settings:
    means = _unit(training.means_of(functools.partial(_powers, power=power)))
    found.append(Cosines(np.float32(power), means, training.log_shares))
  return found


def _powers(features: np.ndarray, power: float | np.ndarray) -> np.ndarray:
  """sign(x) |x|^power, rows of length one."""
  library = _library(features)
  return _unit(library.sign(features) * library.abs(features) ** power)


def _unit(rows: np.ndarray) -> np.ndarray:
  library = _library(rows)
  return rows / library.maximum(library.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def weighted_regressions(training: Training, settings: Sequence[float]) -> list[Head]:
  """Logistic regressions in which classes weigh as their shares.

  Args:
    training: see there.
    settings: l2, of the penalty l2 / 2 |W|^2 beside the mean loss.
  """
  weights = (training.shares * _inverse(training.totals))[training.labels]
  nothing = np.zeros(len(training.shares))
  return _regressions(training, settings, training.importance * weights, nothing)


def balanced_regressions(training: Training, settings: Sequence[float]) -> list[Head]:
  """Regressions with balanced softmax (Ren et al. 2020, equation 4).

  Args:
    training: see there.
    settings: as of `weighted_regressions`.
  """
  shares = training.totals / training.totals.sum()
  offset = log_shares(shares) - log_shares(training.shares)
  return _regressions(training, settings, training.importance, offset)


def plain_regressions(training: Training, settings: Sequence[float]) -> list[Head]:
  """Logistic regressions on the data as they are, whatever the shares; `settings` as above."""
  return _regressions(training, settings, training.importance, np.zeros(len(training.shares)))


def _regressions(
  training: Training, settings: Sequence[float], weights: np.ndarray, offset: np.ndarray
) -> list[Head]:
  """Minimise mean(weights cross-entropy(logits + offset)) + l2 / 2 |W|^2."""
  from scipy import optimize  # takes half a second

  features, (number, dim) = training.features, training.features.shape
  present = np.flatnonzero(training.counts)
  place = np.searchsorted(present, training.labels)
  weights = (weights / weights.sum()).astype(np.float32)
  offset = offset[present].astype(np.float32)

  size = max(_AT_ONCE // len(present), 1)
  parts = [slice(start, start + size) for start in range(0, number, size)]

  def loss(flat: np.ndarray, l2: float) -> tuple[float, np.ndarray]:
    params = flat.astype(np.float32).reshape(dim + 1, len(present))
    value, gradient = l2 / 2 * float(np.square(params[:-1]).sum()), np.zeros_like(params)
    gradient[:-1] = l2 * params[:-1]
    for part in parts:
      rows, own_class = np.arange(len(place[part])), place[part]
      logits = features[part] @ params[:-1] + (params[-1] + offset)[None]
      logits -= logits.max(axis=1, keepdims=True)
      own = logits[rows, own_class]
      np.exp(logits, out=logits)
      total = logits.sum(axis=1)
      value += float(weights[part] @ (np.log(total) - own))
      logits *= (weights[part] / total)[:, None]
      logits[rows, own_class] -= weights[part]
      gradient[:-1] += features[part].T @ logits
      gradient[-1] += logits.sum(axis=0)
    return value, gradient.ravel().astype(np.float64)

  flat, found = np.zeros((dim + 1) * len(present)), {}
  steepest = np.abs(loss(flat, 0.0)[1]).max()
  options = {"maxiter": _ITERATIONS, "gtol": _FLATTER * steepest, "ftol": _BETTER}
  for l2 in sorted(settings, reverse=True):  # each begins where a stronger penalty ended
    flat = optimize.minimize(loss, flat, (l2,), "L-BFGS-B", jac=True, options=options).x
    params = flat.astype(np.float32).reshape(dim + 1, len(present))
    kernel = np.zeros((dim, len(training.shares)), np.float32)
    bias = np.full(len(training.shares), -np.inf, np.float32)
    kernel[:, present], bias[present] = params[:-1], params[-1]
    found[l2] = Linear(kernel, bias)
  return [found[l2] for l2 in settings]


@dataclasses.dataclass(frozen=True)
class Family:
  """Heads of one kind: what they are, what is set, to which values, and how they are fitted."""

  description: str
  setting: str
  settings: tuple[float, ...]
  fit: Callable[[Training, Sequence[float]], list[Head]]


_SHARES = (0.3, 0.1, 0.03, 0.01, 0.0, 0.5, 0.8)
_PENALTIES = (1e-2, 3e-2, 1e-1, 3e-1, 3e-3, 1e-3, 3e-4)
PLAIN = "plain_logistic"
REGRESSIONS = (PLAIN, "balanced_logistic", "weighted_logistic")  # one, if shares are the counts'
FAMILIES: Mapping[str, Family] = {
  "balanced_logistic": Family(
    "logistic regression with balanced softmax", "L2", _PENALTIES, balanced_regressions
  ),
  "weighted_logistic": Family(
    "logistic regression, every class weighing the same", "L2", _PENALTIES, weighted_regressions
  ),
  "plda": Family(
    "Gaussian classes whose means are uncertain", "shrinkage", _SHARES, probabilistic_discriminants
  ),
  "lda": Family("Gaussian classes with one covariance", "shrinkage", _SHARES, discriminants),
  "centroid": Family("the nearest class mean by cosine", "power", (1.0, 0.5), centroids),
  PLAIN: Family("logistic regression on the data as they are", "L2", _PENALTIES, plain_regressions),
}
