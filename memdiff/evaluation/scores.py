"""Accuracy and F1, per class and for the groups many, medium and few.

A class without test examples has no score of its own and is left out of every mean over classes.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from memdiff.evaluation import criteria

MANY_ABOVE, FEW_BELOW = 100, 20  # training images; Liu et al. 2019 (OLTR), kept in writing here


NOTHING = {"mean": None, "std": None}  # the score of no class at all


@dataclasses.dataclass(frozen=True)
class Group:
  name: str
  rule: str
  classes: tuple[int, ...]


def make_groups(train_counts: np.ndarray) -> tuple[Group, ...]:
  """Many (> 100 training images), medium (20 to 100), few (< 20); thirds if one would be empty.

  Thirds rank the classes by training images, ties by class index; the first third is the largest.
  Of two classes the larger one is "many" and the smaller one "few".
  """
  counts = np.asarray(train_counts)
  rules = (
    ("many", f"more than {MANY_ABOVE} training images", counts > MANY_ABOVE),
    ("medium", f"{FEW_BELOW} to {MANY_ABOVE} training images",
     (counts >= FEW_BELOW) & (counts <= MANY_ABOVE)),
    ("few", f"fewer than {FEW_BELOW} training images", counts < FEW_BELOW),
  )  # fmt: skip
  if all(members.any() for _, _, members in rules):
    return tuple(Group(n, r, tuple(np.flatnonzero(m).tolist())) for n, r, m in rules)
  ranked = np.argsort(-counts, kind="stable")
  names = ("many", "medium", "few")
  thirds = ("the largest third of the classes", "the middle third", "the smallest third")
  parts = np.array_split(ranked, 3)
  if len(counts) == 2:
    thirds, parts = ("the larger class", "no class", "the smaller class"), np.split(ranked, (1, 1))
  return tuple(
    Group(name, rule, tuple(sorted(part.tolist())))
    for name, rule, part in zip(names, thirds, parts, strict=True)
  )


def per_class_scores(predictions: np.ndarray, labels: np.ndarray, num_classes: int):
  """Accuracy (recall) and F1 of each class.

  Args:
    predictions: [T] int.
    labels: [T] int.
    num_classes: C.

  Returns:
    (accuracy [C], F1 [C]) in [0, 1]; NaN for a class without test images.
  """
  confusion = np.zeros((num_classes, num_classes))
  np.add.at(confusion, (labels, predictions), 1)
  hits, present, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
  with np.errstate(invalid="ignore"):
    accuracy = hits / present
  f1 = 2 * hits / np.maximum(present + predicted, 1)
  return accuracy, np.where(present > 0, f1, np.nan)


def mean_std(values: np.ndarray) -> dict:
  """Mean and sample deviation over the leading axis of seeds, as plain numbers or lists."""
  values = np.asarray(values, float)
  spread = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1:])
  return {"mean": plain(values.mean(axis=0)), "std": plain(spread)}


def plain(value):
  """Numbers for JSON: nested lists of floats, NaN and infinity as None."""
  if isinstance(value, (list, tuple)) or np.ndim(value):
    return [plain(item) for item in value]
  return float(value) if np.isfinite(value) else None


@dataclasses.dataclass(frozen=True)
class Metric:
  """A score of predictions on the test set.

  Attributes:
    title: of its column in the table of methods.
    score: (predictions [S, T], labels [T], number of classes) -> [S].
  """

  title: str
  score: Callable[[np.ndarray, np.ndarray, int], np.ndarray]


def _criterion(title: str, name: str) -> Metric:
  return Metric(title, lambda predictions, labels, c: criteria.score(predictions, labels, name, c))


# What every row of a report has beside the groups; a further row here is a further column there.
METRICS = {
  "balanced_accuracy": _criterion("balanced", "balanced_accuracy"),
  "top1": _criterion("top-1", "accuracy"),
  "macro_f1": _criterion("macro-F1", "macro_f1"),
}


def score_method(
  method: str,
  description: str,
  predictions: np.ndarray,
  labels: np.ndarray,
  groups: Sequence[Group],
  seeds: Sequence[int],
  num_classes: int,
) -> dict:
  """One row of the table.

  Args:
    method, description: the row's name and what it is.
    predictions: [S, T] int, per seed.
    labels: [T] int.
    groups: of `make_groups`.
    seeds: S of them.
    num_classes: C.

  Returns:
    {method, description, seeds, many, medium, few, per_class_top1, per_class_f1} and every name in
    METRICS, each score as {mean, std} of fractions.
  """
  scores = [per_class_scores(p, labels, num_classes) for p in predictions]
  accuracy = np.stack([a for a, _ in scores])
  f1 = np.stack([f for _, f in scores])
  row = {"method": method, "description": description, "seeds": list(seeds)}
  for name, metric in METRICS.items():
    row[name] = mean_std(metric.score(predictions, labels, num_classes))
  for group in groups:
    scored = [c for c in group.classes if np.isfinite(accuracy[:, c]).all()]
    row[group.name] = mean_std(accuracy[:, scored].mean(axis=1)) if scored else dict(NOTHING)
  row["per_class_top1"] = mean_std(accuracy)
  row["per_class_f1"] = mean_std(f1)
  return row
