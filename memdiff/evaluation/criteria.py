"""What a classifier is judged by: accuracy, balanced accuracy or macro-F1, and paired differences.

A difference between two classifiers on the same examples comes with a Student interval. Its
standard error is that of a stratified sample: examples are drawn anew within their classes.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

CRITERIA = ("balanced_accuracy", "accuracy", "macro_f1")
CONFIDENCE = 0.95
_DRAWS = 1000  # bootstrap samples
_PRIOR_FREEDOM = 4.0  # degrees of freedom that the pooled variance is worth in each class


def _counts(values: np.ndarray, num_classes: int) -> np.ndarray:
  """How often each class occurs along the last axis. [..., E] int -> [..., C]."""
  rows = values.reshape(-1, values.shape[-1])
  shifted = rows + num_classes * np.arange(len(rows))[:, None]
  counts = np.bincount(shifted.ravel(), minlength=num_classes * len(rows))
  return counts.reshape(*values.shape[:-1], num_classes)


def example_weights(
  labels: np.ndarray, criterion: str, classes: Sequence[int] | None = None
) -> np.ndarray:
  """The weight of each example in the mean that the criterion is. [E], of sum 1.

  Args:
    labels: [E] int.
    criterion: out of CRITERIA.
    classes: those that count; None: all that occur in `labels`.
  """
  inside = np.ones(len(labels), bool) if classes is None else np.isin(labels, classes)
  if criterion == "accuracy":
    return inside / inside.sum()
  present, inverse, counts = np.unique(labels[inside], return_inverse=True, return_counts=True)
  weights = np.zeros(len(labels))
  weights[inside] = 1 / (len(present) * counts[inverse])
  return weights


def _f1_parts(predictions: np.ndarray, labels: np.ndarray, num_classes: int):
  """Hits [..., C], examples [C] and predictions [..., C] of each class."""
  # A miss counts for a class of its own, behind the others.
  hits = np.where(predictions == labels, labels, num_classes)
  return (
    _counts(hits, num_classes + 1)[..., :-1],
    _counts(labels, num_classes),
    _counts(predictions, num_classes),
  )


def score(
  predictions: np.ndarray,
  labels: np.ndarray,
  criterion: str,
  num_classes: int,
  classes: Sequence[int] | None = None,
) -> np.ndarray:
  """The criterion, in [0, 1]. Classes without examples are left out of means over classes.

  Args:
    predictions: [..., E] int.
    labels: [E] int.
    criterion: out of CRITERIA.
    num_classes: C.
    classes: those whose examples count; None: all.

  Returns:
    [...].
  """
  if criterion != "macro_f1":
    return (predictions == labels) @ example_weights(labels, criterion, classes)
  hits, present, predicted = _f1_parts(predictions, labels, num_classes)
  f1 = 2 * hits / np.maximum(present + predicted, 1)
  counted = present > 0 if classes is None else np.isin(np.arange(num_classes), classes)
  return f1[..., counted & (present > 0)].mean(axis=-1)


def contributions(
  predictions: np.ndarray,
  labels: np.ndarray,
  criterion: str,
  num_classes: int,
  classes: Sequence[int] | None = None,
) -> np.ndarray:
  """What each example adds to the criterion, to first order and up to a constant per class.

  For accuracies this is exact: weight times hit. For macro-F1, with n_c examples and p_c
  predictions of class c, an example of class y that is predicted as k adds
  (2 [k = y] / (n_y + p_y) - F1_k / (n_k + p_k)) / C; k without examples has no F1 of its own.

  Args and shapes: of `score`.

  Returns:
    [..., E].
  """
  if criterion != "macro_f1":
    return (predictions == labels) * example_weights(labels, criterion, classes)
  hits, present, predicted = _f1_parts(predictions, labels, num_classes)
  counted = (present > 0) & (
    np.ones(num_classes, bool) if classes is None else np.isin(np.arange(num_classes), classes)
  )
  total = np.maximum(present + predicted, 1)
  loss = np.where(counted, 2 * hits / total**2, 0.0)
  right = np.where(counted, 2 / total, 0.0)
  of_prediction = np.take_along_axis(loss, predictions, axis=-1)
  of_hit = np.take_along_axis(right, np.broadcast_to(labels, predictions.shape), axis=-1)
  return ((predictions == labels) * of_hit - of_prediction) / counted.sum()


# --- paired differences ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A mean with its standard error and degrees of freedom."""

  mean: float
  error: float
  freedom: float

  def interval(self, comparisons: int = 1) -> list[float]:
    """The 95 % Student interval; of several, all hold at once (Bonferroni)."""
    from scipy.stats import t as student  # takes a second to import

    tail = (1 - CONFIDENCE) / 2 / comparisons
    half = float(student.ppf(1 - tail, self.freedom)) * self.error if self.error else 0.0
    return [self.mean - half, self.mean + half]


def stratified_error(
  differences: np.ndarray, weights: np.ndarray, labels: np.ndarray
) -> tuple[float, float]:
  """Standard error and degrees of freedom of a sum of differences.

  Classes of a handful of examples tell little of their own variance: often all differences are 0.
  Each class's variance is therefore moderated, (f s_c^2 + 4 s^2) / (f + 4) with f = n_c - 1 and
  s^2 the mean over classes (as Smyth, "Linear models and empirical Bayes methods", 2004, eq. 6,
  has it, with fixed prior degrees of freedom). Degrees of freedom after Satterthwaite (1946).

  Args:
    differences: [E] contributions of one classifier minus those of the other.
    weights: [E] of the examples, the same within a class.
    labels: [E] int, the strata.
  """
  inside = weights > 0
  differences, weights, labels = differences[inside], weights[inside], labels[inside]
  _, first, inverse, counts = np.unique(
    labels, return_index=True, return_inverse=True, return_counts=True
  )
  units = differences / weights
  centred = units - (np.bincount(inverse, units) / counts)[inverse]
  squares, freedom = np.bincount(inverse, np.square(centred)), counts - 1
  several = freedom > 0
  pooled = np.square(units).mean()
  if several.any():
    pooled = (squares[several] / freedom[several]).mean()
  variance = (squares + _PRIOR_FREEDOM * pooled) / (freedom + _PRIOR_FREEDOM)
  parts = np.square(weights[first]) * counts * variance
  total = parts.sum()
  if total == 0:
    return 0.0, float(freedom.sum() + _PRIOR_FREEDOM)
  satterthwaite = total**2 / (np.square(parts) / (freedom + _PRIOR_FREEDOM)).sum()
  return float(np.sqrt(total)), float(satterthwaite)


def over_seeds_and_examples(
  ours: np.ndarray,
  theirs: np.ndarray,
  labels: np.ndarray,
  criterion: str,
  num_classes: int,
  classes: Sequence[int] | None = None,
) -> dict[str, Any]:
  """How much better one classifier does than another on the same test examples, seed by seed.

  Args:
    ours, theirs: [S, T] int predictions.
    labels: [T] int.
    criterion, num_classes, classes: of `score`.

  Returns:
    {"mean", "interval", "std", "ours", "theirs"} in fractions; the interval covers both the choice
    of seeds and that of test examples, `std` is the deviation between seeds.
  """
  scores = [score(p, labels, criterion, num_classes, classes) for p in (ours, theirs)]
  gains = scores[0] - scores[1]
  parts = [contributions(p, labels, criterion, num_classes, classes) for p in (ours, theirs)]
  # The F1 of a class also depends on the examples of others that are taken for it.
  strata = None if criterion == "macro_f1" else classes
  weights = example_weights(labels, linear(criterion), strata)
  error, freedom = stratified_error((parts[0] - parts[1]).mean(axis=0), weights, labels)
  spread = float(gains.std(ddof=1)) if len(gains) > 1 else 0.0
  of_seeds, of_examples = spread**2 / len(gains), error**2
  total = of_seeds + of_examples
  if total:
    freedom = total**2 / (of_seeds**2 / max(len(gains) - 1, 1) + of_examples**2 / freedom)
  estimate = Estimate(float(gains.mean()), float(np.sqrt(total)), float(freedom))
  return {
    "mean": estimate.mean,
    "interval": estimate.interval(),
    "std": spread,
    "ours": float(scores[0].mean()),
    "theirs": float(scores[1].mean()),
  }


def shares_of_room(
  ours: Sequence[np.ndarray],
  control: np.ndarray,
  reference: np.ndarray,
  labels: np.ndarray,
  criterion: str,
  num_classes: int,
) -> list[dict[str, Any]]:
  """Each one's share of the way from control to reference: ratios of means, with intervals.

  The bootstrap draws seeds, and test examples within their classes, and is paired: all classifiers
  meet the same ones. It is meant for a room that is clearly above zero.

  Args:
    ours: [S, T] int predictions of each of the classifiers.
    control, reference: [S, T] int predictions.
    labels: [T] int.
    criterion, num_classes: of `score`.

  Returns:
    {"mean", "interval"} of each; the interval is one of 95 %.
  """
  predictions = np.stack([*ours, reference])
  scores = [score(p, labels, criterion, num_classes).mean() for p in (*predictions, control)]
  exact = np.array(scores[:-1]) - scores[-1]
  parts = contributions(predictions, labels, criterion, num_classes)
  differences = parts - contributions(control, labels, criterion, num_classes)
  drawn = _bootstrap_means(differences, labels) - differences.sum(axis=2).mean(axis=1)
  gains = exact + drawn
  ratios = gains[:, :-1] / gains[:, -1:]
  tails = 100 * np.array([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
  intervals = np.percentile(ratios, tails, axis=0).T
  return [
    {"mean": float(gain / exact[-1]), "interval": interval.tolist()}
    for gain, interval in zip(exact[:-1], intervals, strict=True)
  ]


def _bootstrap_means(differences: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Sums over examples, averaged over seeds, in bootstrap samples. [K, S, T] -> [draws, K]."""
  generator, (_, num_seeds, _) = np.random.default_rng(0), differences.shape
  seeds = generator.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), _DRAWS) / num_seeds
  total = np.zeros((_DRAWS, *differences.shape[:2]))
  for label in np.unique(labels):
    of_class = differences[:, :, labels == label]
    size = of_class.shape[2]
    times = generator.multinomial(size, np.full(size, 1 / size), _DRAWS)
    total += np.tensordot(times, of_class, axes=(1, 2))
  return np.einsum("bs,bks->bk", seeds, total)


def linear(criterion: str) -> str:
  """The accuracy whose example weights a criterion's contributions scale with."""
  return "accuracy" if criterion == "accuracy" else "balanced_accuracy"
