"""What is known of classes beside their examples: embeddings of their names or descriptions.

The mean of a class with few examples is hardly known. If classes with similar embeddings have
similar features, a map from embeddings to means says where to expect it.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from memdiff.fitting.heads import FAMILIES, Family, Gaussians, Head, Training

NAME = "class_knowledge"
ZERO_SHOT = "zero_shot"
_RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # of the map, in units of the embeddings' mean square
_LEAST = 1e-3  # of a variance between classes, in units of that within


@dataclasses.dataclass(frozen=True, eq=False)
class _Map:
  """From embeddings to means.

  Attributes:
    expected: [C, D] means that the map tells.
    missed: [P, D] how far the means of the P classes with examples lie from what the map tells
      without them.
  """

  expected: np.ndarray
  missed: np.ndarray


def families(embeddings: np.ndarray) -> dict[str, Family]:
  """What heads make of embeddings of classes [C, E]: with examples of a class, and without."""
  return {NAME: family(embeddings), ZERO_SHOT: zero_shot(embeddings)}


def family(embeddings: np.ndarray) -> Family:
  """Probabilistic discriminants whose class means are expected where a map of embeddings says.

  Otherwise as `heads.probabilistic_discriminants`, where all means are expected at their centre.

  Args:
    embeddings: [C, E] of the classes.
  """
  like = FAMILIES["plda"].description
  return _family(embeddings, f"{like}, and expected from what is known of the class", unseen=False)


def zero_shot(embeddings: np.ndarray) -> Family:
  """The same without the examples of a class: its mean is predicted from the other classes.

  It measures how well embeddings of classes do on their own.

  Args:
    embeddings: [C, E] of the classes.
  """
  words = "every class as if it had no examples, expected from what is known of it"
  return _family(embeddings, words, unseen=True)


def _family(embeddings: np.ndarray, description: str, unseen: bool) -> Family:
  def fit(training: Training, settings: Sequence[float]) -> list[Head]:
    regression = _Regression.of(embeddings, training.counts)
    return [_discriminant(training, regression, share, unseen) for share in settings]

  like = FAMILIES["plda"]
  return Family(description, like.setting, like.settings, fit)


def _discriminant(
  training: Training, regression: "_Regression", share: float, unseen: bool
) -> Gaussians:
  """Of all classes as they are, or each as if it had no examples."""
  vectors, _ = training.within
  whitened = vectors / np.sqrt(training.shrunk(share))[None]
  means, counts, known = training.means @ whitened, training.counts, regression.known
  told = regression.map(means)
  _, lengths, rows = np.linalg.svd(told.missed, full_matrices=False)
  noise = (1 / counts[known]).mean()  # of a mean, in units of the covariance within classes
  between = np.maximum(lengths**2 / max(int(known.sum()) - 1, 1) - noise, _LEAST)
  evidence = np.where(unseen, 0, counts)[:, None] * between[None]
  trust = evidence / (evidence + 1)
  expected = told.expected.copy()
  if unseen:
    expected[known] = means[known] - told.missed
  found = trust * (means @ rows.T) + (1 - trust) * (expected @ rows.T)
  variances = 1 + between[None] / (evidence + 1)
  arrays = (whitened @ rows.T, found, variances)
  return Gaussians(*(x.astype(np.float32) for x in arrays), training.log_shares)


@dataclasses.dataclass(frozen=True, eq=False)
class _Regression:
  """Weighted ridge regression on embeddings of C classes, in its dual form.

  A class without examples is told, but teaches nothing; P classes have some.

  Attributes:
    known: [C] bool, classes with examples.
    weights: [P] of these, 1 in the mean.
    products: [C, P] of the embeddings about their centre.
    vectors: [P, P] eigenvectors of the weighted products of the P classes.
    values: [P] their eigenvalues.
  """

  known: np.ndarray
  weights: np.ndarray
  products: np.ndarray
  vectors: np.ndarray
  values: np.ndarray

  @classmethod
  def of(cls, embeddings: np.ndarray, counts: np.ndarray) -> "_Regression":
    """Of embeddings [C, E] and numbers of examples [C]."""
    known = counts > 0
    weights = counts[known] / (counts[known] + 1.0)  # a mean of one example is half noise
    weights = weights / weights.mean()
    centre = np.average(embeddings[known], axis=0, weights=weights)
    away = (embeddings - centre[None]).astype(np.float64)
    products, roots = away @ away[known].T, np.sqrt(weights)
    values, vectors = np.linalg.eigh(roots[:, None] * products[known] * roots[None])
    return cls(known, weights, products, vectors, np.maximum(values, 0))

  def map(self, means: np.ndarray) -> _Map:
    """To means [C, D] in units of the covariance within classes.

    The penalty is the one with the least leave-one-out error.
    """
    middle = np.average(means[self.known], axis=0, weights=self.weights)
    targets, roots = means[self.known] - middle[None], np.sqrt(self.weights)
    inside = self.products[self.known]
    size = max(np.trace(inside) / len(inside), 1e-12)
    turned = self.vectors.T @ (roots[:, None] * targets)
    of_middle = self.weights / self.weights.sum()  # what a class adds to the mean of all
    best, error = None, np.inf
    for ridge in _RIDGES:
      damped = self.values + ridge * size
      coefficients = roots[:, None] * (self.vectors @ (turned / damped[:, None]))
      of_itself = self.vectors**2 @ (self.values / damped)
      others = np.maximum(1 - of_middle - of_itself, 1e-6)
      missed = (targets - inside @ coefficients) / others[:, None]
      found = self.weights @ np.square(missed).sum(axis=1)
      if found < error:
        best, error = _Map(middle[None] + self.products @ coefficients, missed), found
    return best
