"""Which method to use, decided on training data alone: repeated stratified cross-validation.

A *method* is a generator with a loss; a *setting* of it is how much it adds and how classes are
drawn. Every setting is scored on examples that its generator and head have not seen. The score is
the mean over classes of the class's accuracy, which estimates top-1 accuracy on balanced test data.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from memdiff.config import at_least, one_of

Z95 = 1.959964  # half-width of a 95 % interval, in standard errors
ENCODERS = ("frozen", "retrained")


@dataclasses.dataclass(frozen=True)
class SelectionConfig:
  folds: int = at_least(0)
  repeats: int = at_least(1)
  encoder: str = one_of(ENCODERS)

  def __post_init__(self):
    if self.folds == 1:
      raise ValueError("folds is 1, but cross-validation needs two or more, or 0 for none.")

  @property
  def num_runs(self) -> int:
    return self.folds * self.repeats


def deal(labels: np.ndarray, num_folds: int, seed: int) -> np.ndarray:
  """Deals examples to folds, class after class, so that each class is spread as evenly as can be.

  Args:
    labels: [N] int.
    num_folds: K.
    seed: of the shuffle within classes.

  Returns:
    [N] int, the fold in which an example is held out; -1 for the only member of a class, which
    always trains.
  """
  generator = np.random.RandomState(seed)
  fold, dealt = np.full(len(labels), -1), 0
  for label in np.unique(labels):
    members = generator.permutation(np.flatnonzero(labels == label))
    if len(members) > 1:
      fold[members] = (dealt + np.arange(len(members))) % num_folds
      dealt += len(members)
  return fold


def fold_rows(labels: np.ndarray, config: SelectionConfig) -> tuple[np.ndarray, np.ndarray]:
  """Training and held-out rows of every run: run r is fold r % K of repeat r // K.

  Returns:
    (train [R, A], held out [R, B]): row numbers, padded with -1 to the largest run.
  """
  runs = []
  for repeat in range(config.repeats):
    fold = deal(labels, config.folds, seed=repeat)
    runs += [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(config.folds)]
  return padded([train for train, _ in runs]), padded([held for _, held in runs])


def padded(rows: Sequence[np.ndarray]) -> np.ndarray:
  """Row numbers of different length as one array, filled up with -1."""
  width = max(map(len, rows))
  return np.stack([np.pad(row, (0, width - len(row)), constant_values=-1) for row in rows])


@dataclasses.dataclass(frozen=True)
class Judged:
  """The held-out examples of all runs in a row.

  Attributes:
    label: [E] int.
    example: [E] row of the training set; an example comes once per repeat.
    fold: [E] the run's number within its repeat.
  """

  label: np.ndarray
  example: np.ndarray
  fold: np.ndarray


def judged_examples(held_out: np.ndarray, labels: np.ndarray, num_folds: int) -> Judged:
  """Of held-out rows [R, B], -1 where there is none."""
  run, position = np.nonzero(held_out >= 0)
  example = held_out[run, position]
  return Judged(label=labels[example], example=example, fold=run % num_folds)


def class_average_weights(label: np.ndarray) -> np.ndarray:
  """Weights [E] of a mean over classes of means within classes; they sum to 1."""
  classes, inverse, counts = np.unique(label, return_inverse=True, return_counts=True)
  return 1 / (len(classes) * counts[inverse])


def score(hits: np.ndarray, label: np.ndarray) -> np.ndarray:
  """Mean over classes of the accuracy within classes. hits [..., E] -> [...]."""
  return hits @ class_average_weights(label)


def choose(hits: np.ndarray, label: np.ndarray) -> int:
  """The setting with the best score; the first of equals. hits [J, E]."""
  return int(np.argmax(np.round(score(hits, label), 9)))


def cross_fitted(hits: np.ndarray, judged: Judged) -> np.ndarray:
  """Hits [E] of choosing among settings without looking: for each fold, by the other folds.

  Args:
    hits: [J, E] of J settings.
    judged: the examples.
  """
  outcome = np.zeros(hits.shape[1])
  for fold in np.unique(judged.fold):
    inside = judged.fold == fold
    chosen = choose(hits[:, ~inside], judged.label[~inside])
    outcome[inside] = hits[chosen, inside]
  return outcome


def paired_gain(hits: np.ndarray, control: np.ndarray, judged: Judged) -> dict[str, Any]:
  """How much better `hits` [E] score than those of `control`, with a 95 % interval.

  The standard error is that of a mean over classes of means over their examples, the repeats of an
  example averaged first. It does not know that folds share training examples.

  Returns:
    {"mean", "standard_error", "interval"}, fractions.
  """
  difference = hits - control
  examples, inverse = np.unique(judged.example, return_inverse=True)
  of_example = np.bincount(inverse, difference) / np.bincount(inverse)
  label = np.zeros(len(examples), int)
  label[inverse] = judged.label
  variance, classes = 0.0, np.unique(label)
  pooled = _pooled_variance(of_example, label)
  for c in classes:
    own = of_example[label == c]
    spread = own.var(ddof=1) if len(own) > 1 else pooled
    variance += spread / len(own) / len(classes) ** 2
  mean, error = float(score(difference, judged.label)), float(np.sqrt(variance))
  return {
    "mean": mean,
    "standard_error": error,
    "interval": [mean - Z95 * error, mean + Z95 * error],
  }


def _pooled_variance(values: np.ndarray, label: np.ndarray) -> float:
  """Variance within classes, for classes of one example."""
  _, inverse, counts = np.unique(label, return_inverse=True, return_counts=True)
  centred = values - (np.bincount(inverse, values) / counts)[inverse]
  freedom = len(values) - len(counts)
  return float(np.square(centred).sum() / freedom) if freedom else 0.25


def recommend(
  hits: Mapping[str, np.ndarray], judged: Judged, controls: Sequence[str]
) -> dict[str, Any]:
  """Which method to use.

  The best method if its gain over the best control is above zero with 95 % confidence, otherwise
  that control: what adds nothing for certain is not worth its trouble.

  Args:
    hits: method -> [E] cross-fitted hits.
    judged: the examples.
    controls: the methods that use real features only.

  Returns:
    {"method", "control", "best", "expected_gain", "interval", "standard_error", "scores":
    {method: {"score", "gain", "interval"}}}; gains are over the control, of the best method.
  """
  scores = {method: float(score(values, judged.label)) for method, values in hits.items()}
  control = max(controls, key=scores.__getitem__)
  gains = {method: paired_gain(values, hits[control], judged) for method, values in hits.items()}
  best = max(scores, key=scores.__getitem__)
  worth_it = best not in controls and gains[best]["interval"][0] > 0
  return {
    "method": best if worth_it else control,
    "control": control,
    "best": best,
    "expected_gain": gains[best]["mean"],
    "standard_error": gains[best]["standard_error"],
    "interval": gains[best]["interval"],
    "scores": {
      method: {
        "score": scores[method],
        "gain": gains[method]["mean"],
        "interval": gains[method]["interval"],
      }
      for method in hits
    },
  }


def rank_agreement(ours: Sequence[float], test: Sequence[float]) -> dict[str, float]:
  """How far the ranking by cross-validation is that of the test set.

  Returns:
    {"kendall_tau" in [-1, 1], "pairs": share of pairs of methods in the same order, ties as half,
    "regret": test accuracy of the best method on test minus that of the one ranked first}.
  """
  ours, test = np.asarray(ours, float), np.asarray(test, float)
  i, j = np.triu_indices(len(ours), 1)
  products = np.sign(ours[i] - ours[j]) * np.sign(test[i] - test[j])
  untied = np.sqrt(float((ours[i] != ours[j]).sum()) * float((test[i] != test[j]).sum()))
  return {
    "kendall_tau": float(products.sum() / untied) if untied else 0.0,
    "pairs": float((products > 0).mean() + 0.5 * (products == 0).mean()) if len(i) else 1.0,
    "regret": float(test.max() - test[np.argmax(ours)]),
  }
