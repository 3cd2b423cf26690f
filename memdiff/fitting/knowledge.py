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
  like = FAMILIES["plda"]

  def fit(training: Training, settings: Sequence[float]) -> list[Head]:
    return [_discriminant(training, embeddings, share) for share in settings]

  description = f"{like.description}, and expected from what is known of the class"
  return Family(description, like.setting, like.settings, fit)


def zero_shot(embeddings: np.ndarray) -> Family:
  """The same without the examples of a class: its mean is what those of all others let expect.

  What embeddings of classes tell by themselves.

  Args:
    embeddings: [C, E] of the classes.
  """
  like = FAMILIES["plda"]

  def fit(training: Training, settings: Sequence[float]) -> list[Head]:
    return [_discriminant(training, embeddings, share, unseen=True) for share in settings]

  description = "every class as if it had no examples, expected from what is known of it"
  return Family(description, like.setting, like.settings, fit)


def _discriminant(
  training: Training, embeddings: np.ndarray, share: float, unseen: bool = False
) -> Gaussians:
  """Of all classes as they are, or each as if it had no examples."""
  vectors, _ = training.within
  whitened = vectors / np.sqrt(training.shrunk(share))[None]
  means, counts = training.means @ whitened, training.counts
  known = counts > 0
  told = _map(embeddings, means, counts)
  _, lengths, rows = np.linalg.svd(told.missed, full_matrices=False)
  noise = (1 / counts[known]).mean()  # of a mean, in units of the covariance within classes
  between = np.maximum(lengths**2 / max(int(known.sum()) - 1, 1) - noise, _LEAST)
  evidence = np.where(unseen, 0, counts)[:, None] * between[None]
  trust = evidence / (evidence + 1)
  expected = told.expected.copy()
  if unseen:
    expected[known] = means[known] - told.missed
  expected = expected @ rows.T
  found = trust * (means @ rows.T) + (1 - trust) * expected
  variances = 1 + between[None] / (evidence + 1)
  arrays = (whitened @ rows.T, found, variances)
  return Gaussians(*(x.astype(np.float32) for x in arrays), training.log_shares)


def _map(embeddings: np.ndarray, means: np.ndarray, counts: np.ndarray) -> _Map:
  """Ridge regression in its dual form; the penalty with the least leave-one-out error.

  Args:
    embeddings: [C, E].
    means: [C, D], in units of the covariance within classes.
    counts: [C] examples; a class without any is told, but teaches nothing.
  """
  known = counts > 0
  weights = counts[known] / (counts[known] + 1.0)  # a mean of one example is half noise
  weights = weights / weights.mean()
  centre = np.average(embeddings[known], axis=0, weights=weights)
  away = (embeddings - centre[None]).astype(np.float64)
  middle = np.average(means[known], axis=0, weights=weights)
  targets = means[known] - middle[None]
  products = away[known] @ away[known].T
  size = max(np.trace(products) / len(products), 1e-12)
  best, error = None, np.inf
  for ridge in _RIDGES:
    inverse = np.linalg.inv(products + np.diag(ridge * size / weights))
    hat = products @ inverse
    missed = (targets - hat @ targets) / np.maximum(1 - np.diag(hat), 1e-6)[:, None]
    found = weights @ np.square(missed).sum(axis=1)
    if found < error:
      expected = middle[None] + away @ (away[known].T @ (inverse @ targets))
      best, error = _Map(expected, missed), found
  return best
