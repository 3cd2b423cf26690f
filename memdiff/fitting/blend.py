"""A blend of classifiers: a weighted sum of their log probabilities.

The weights make held-out examples most likely (a logarithmic opinion pool; Heskes 1998). Since they
need not sum to one, they also set the temperature: what comes out is calibrated.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

_LEAST = -30.0  # of a log probability, so that no classifier alone rules a class out


def log_probabilities(logits: np.ndarray) -> np.ndarray:
  """Logits [N, C] -> log of their softmax, at least -30. [N, C]."""
  library = jnp if isinstance(logits, jax.Array) else np
  shifted = logits - logits.max(axis=1, keepdims=True)
  total = library.exp(shifted).sum(axis=1, keepdims=True)
  return library.maximum(shifted - library.log(total), _LEAST)


def blended(weights: Sequence[float] | np.ndarray, parts: Sequence[np.ndarray]) -> np.ndarray:
  """The logits of a blend of F classifiers: weights [F], log probabilities F x [N, C]. [N, C]."""
  total = np.zeros_like(parts[0])
  for weight, part in zip(weights, parts, strict=True):
    if weight:
      total += np.float32(weight) * part
  return total


def fit_weights(
  parts: Sequence[np.ndarray], labels: np.ndarray, importance: np.ndarray
) -> np.ndarray:
  """The weights, none below 0, that make the labels most likely.

  Args:
    parts: log probabilities [E, C] of F classifiers for examples that none of them was fitted to.
    labels: [E].
    importance: [E] how much each example counts.

  Returns:
    [F].
  """
  from scipy import optimize  # takes half a second

  rows, importance = np.arange(len(labels)), importance / importance.sum()

  def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
    logits = blended(weights, parts)
    logits -= logits.max(axis=1, keepdims=True)
    own = logits[rows, labels]
    share = np.exp(logits)
    total = share.sum(axis=1)
    value = importance @ (np.log(total) - own)
    share *= (importance / total)[:, None]
    gradient = [(share * part).sum() - importance @ part[rows, labels] for part in parts]
    return float(value), np.array(gradient, np.float64)

  begin = np.full(len(parts), 1 / len(parts))
  bounds = [(0, None)] * len(parts)
  return optimize.minimize(loss, begin, method="L-BFGS-B", jac=True, bounds=bounds).x
