"""Which method to use, decided on training data alone: repeated stratified cross-validation.

A *method* is a generator with a loss; a *setting* of it is how much it adds, how classes are drawn
and how strongly weights are decayed. Every setting is scored on examples that its generator and
head have not seen, by the criterion that the user chooses (`memdiff.evaluation.criteria`).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from memdiff.config import at_least, one_of, setting
from memdiff.evaluation import criteria

ENCODERS = ("frozen", "retrained")


@dataclasses.dataclass(frozen=True)
class SelectionConfig:
  folds: int = setting(
    5, "of cross-validation on training data; 0: none, the first candidates are used", at_least(0)
  )
  repeats: int = setting(1, "repetitions, each with new folds", at_least(1))
  encoder: str = setting(
    "frozen", "retrained trains one encoder per fold, without its images", one_of(ENCODERS)
  )
  criterion: str = setting(
    "balanced_accuracy", "by which the best method is chosen", one_of(criteria.CRITERIA)
  )

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
    (train [R, N], held out [R, B]): row numbers, padded with -1; the training rows to the size of
    the whole set, so that programs compiled for it serve folds as well.
  """
  runs = []
  for repeat in range(config.repeats):
    fold = deal(labels, config.folds, seed=repeat)
    runs += [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(config.folds)]
  return padded([train for train, _ in runs], len(labels)), padded([held for _, held in runs])


def padded(rows: Sequence[np.ndarray], width: int | None = None) -> np.ndarray:
  """Row numbers of different length as one array, filled up with -1 to `width` or the longest."""
  width = max(map(len, rows)) if width is None else width
  return np.stack([np.pad(row, (0, width - len(row)), constant_values=-1) for row in rows])


@dataclasses.dataclass(frozen=True)
class Judged:
  """The held-out examples of all runs in a row.

  Attributes:
    label: [E] int.
    example: [E] row of the training set; an example comes once per repeat.
    run: [E] the run that held it out.
    criterion: by which classifiers are compared.
    num_classes: C.
  """

  label: np.ndarray
  example: np.ndarray
  run: np.ndarray
  criterion: str
  num_classes: int

  def only(self, rows: np.ndarray) -> "Judged":
    """Some of the examples; `rows` is a mask [E]."""
    return dataclasses.replace(
      self, label=self.label[rows], example=self.example[rows], run=self.run[rows]
    )

  def score(self, predictions: np.ndarray) -> np.ndarray:
    """The criterion of predictions [..., E]. [...]."""
    return criteria.score(predictions, self.label, self.criterion, self.num_classes)


def judged_examples(
  held_out: np.ndarray, labels: np.ndarray, criterion: str, num_classes: int
) -> Judged:
  """Of held-out rows [R, B], -1 if there is none."""
  run, position = np.nonzero(held_out >= 0)
  example = held_out[run, position]
  return Judged(labels[example], example, run, criterion, num_classes)


def choose(predictions: np.ndarray, judged: Judged) -> int:
  """The first setting that scores within one standard error of the best.

  Rare classes have a handful of judged examples, so the best of many settings is often the best by
  luck. Settings come in order of preference, and an earlier one gives way only to evidence: the
  one-standard-error rule of Breiman et al., "Classification and regression trees", 1984, section
  3.4.3. The error is that of a paired difference if both settings are equally good, as in
  McNemar's test: each example that tells them apart could as well have spoken for the other.

  Args:
    predictions: [J, E] of J settings, the one to take without cross-validation first.
    judged: the examples.
  """
  return int(np.argmax(contenders(predictions, judged, margin=1.0)))


def contenders(predictions: np.ndarray, judged: Judged, margin: float) -> np.ndarray:
  """Which of J settings score within `margin` standard errors of the best, as in `choose`. [J]."""
  scores = judged.score(predictions)
  best = int(np.argmax(np.round(scores, 9)))
  parts = _by_example(predictions, judged)
  errors = np.sqrt(np.square(parts[best] - parts).sum(axis=1))
  return np.round(scores + margin * errors, 9) >= np.round(scores[best], 9)


def cross_fitted(predictions: np.ndarray, judged: Judged) -> np.ndarray:
  """Predictions [E] of choosing among settings without looking at the examples that are judged.

  For the examples that a run holds out, the setting is chosen by all other examples; with several
  repeats, an example is left out of the choice in each of them.

  Args:
    predictions: [J, E] of J settings.
    judged: the examples.
  """
  outcome = np.zeros(predictions.shape[1], predictions.dtype)
  for run in np.unique(judged.run):
    inside = judged.run == run
    others = ~np.isin(judged.example, judged.example[inside])
    chosen = choose(predictions[:, others], judged.only(others))
    outcome[inside] = predictions[chosen, inside]
  return outcome


def paired_gain(predictions: np.ndarray, control: np.ndarray, judged: Judged) -> criteria.Estimate:
  """How much better `predictions` [E] score than those of `control`.

  The standard error is that of a stratified sample of examples, the repeats of an example taken
  together. It does not know that folds share training examples.
  """
  mean = judged.score(predictions) - judged.score(control)
  _, first = np.unique(judged.example, return_index=True)
  label = judged.label[first]
  weights = criteria.example_weights(label, criteria.linear(judged.criterion))
  difference = np.subtract(*_by_example(np.stack([predictions, control]), judged))
  return criteria.Estimate(float(mean), *criteria.stratified_error(difference, weights, label))


def _by_example(predictions: np.ndarray, judged: Judged) -> np.ndarray:
  """What each example, its repeats together, adds to the score of predictions [J, E]. [J, X]."""
  _, inverse = np.unique(judged.example, return_inverse=True)
  parts = criteria.contributions(predictions, judged.label, judged.criterion, judged.num_classes)
  return np.stack([np.bincount(inverse, part) for part in parts])


def recommend(
  predictions: Mapping[str, np.ndarray],
  judged: Judged,
  controls: Sequence[str],
  preferred: str | None = None,
) -> dict[str, Any]:
  """Which method to use.

  The best method if its gain over the best control is above zero with 95 % confidence, otherwise
  that control: what adds nothing for certain is not worth its trouble. The intervals hold for all
  methods beside the controls at once (Bonferroni), since the best of many is looked at.

  Args:
    predictions: method -> [E], cross-fitted.
    judged: the examples.
    controls: the methods that use real features only. The best of them is the control.
    preferred: one that is the control unless another is better with 95 % confidence: with rare
      classes of a few examples, the best of many is often the best by luck.

  Returns:
    {"method", "control", "best", "criterion", "expected_gain", "interval", "standard_error",
    "scores": {method: {"score", "gain", "interval"}}}; gains are over the control, of the best
    method.
  """
  scores = {method: float(judged.score(values)) for method, values in predictions.items()}
  control = max(controls, key=scores.__getitem__)
  if preferred in controls:
    gain = paired_gain(predictions[control], predictions[preferred], judged)
    control = control if gain.interval()[0] > 0 else preferred
  comparisons = max(len(predictions) - len(controls), 1)
  gains = {
    method: paired_gain(values, predictions[control], judged)
    for method, values in predictions.items()
  }
  intervals = {method: gain.interval(comparisons) for method, gain in gains.items()}
  others = [method for method in predictions if method not in controls]
  best = max([control, *others], key=scores.__getitem__)
  worth_it = best not in controls and intervals[best][0] > 0
  return {
    "method": best if worth_it else control,
    "control": control,
    "best": best,
    "criterion": judged.criterion,
    "expected_gain": gains[best].mean,
    "standard_error": gains[best].error,
    "interval": intervals[best],
    "scores": {
      method: {
        "score": scores[method],
        "gain": gains[method].mean,
        "interval": intervals[method],
      }
      for method in predictions
    },
  }


def rank_agreement(ours: Sequence[float], test: Sequence[float]) -> dict[str, float]:
  """How far the ranking by cross-validation is that of the test set.

  Returns:
    {"kendall_tau" in [-1, 1], "pairs": share of pairs of methods in the same order, ties as half,
    "regret": score on test of the best method there minus that of the one ranked first}.
  """
  from scipy.stats import kendalltau  # takes a second to import

  ours, test = np.asarray(ours, float), np.asarray(test, float)
  i, j = np.triu_indices(len(ours), 1)
  products = np.sign(ours[i] - ours[j]) * np.sign(test[i] - test[j])
  tau = float(kendalltau(ours, test).statistic) if len(i) else math.nan
  return {
    "kendall_tau": 0.0 if math.isnan(tau) else tau,  # undefined if all are tied
    "pairs": float((products > 0).mean() + 0.5 * (products == 0).mean()) if len(i) else 1.0,
    "regret": float(test.max() - test[np.argmax(ours)]),
  }
