"""Methods scored on the test set and held against each other, for every kind of experiment."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from memdiff.evaluation import criteria, cross_validation, scores
from memdiff.evaluation.method import Method


@dataclasses.dataclass(frozen=True)
class Scored:
  """The table.

  Attributes:
    rows: of the report.
    predictions: method -> [S, T] classes of the test examples.
    heads: method -> {"kernel" [S, D, C], "bias" [S, C]} on standardised features.
    labels: [T] of the test examples.
    criterion: by which methods are compared.
    groups: many, medium and few.
  """

  rows: list[dict]
  predictions: dict[str, np.ndarray]
  heads: dict[str, dict[str, jax.Array]]
  labels: np.ndarray
  criterion: str
  groups: tuple[scores.Group, ...]

  def score(self, method: str) -> float:
    """The criterion on the test set, mean over seeds."""
    return float(self._measure(criteria.score, method).mean())

  def gain(self, method: str, control: str, group: str | None = None) -> dict | None:
    """How much better a method does than another, by the criterion or on a group of classes.

    {mean, interval, std, ours, theirs}; None for a group without test examples.
    """
    if group is None:
      return self._measure(criteria.over_seeds_and_examples, method, control)
    classes = next(g.classes for g in self.groups if g.name == group)
    if not np.isin(self.labels, classes).any():
      return None
    return criteria.over_seeds_and_examples(
      self.predictions[method], self.predictions[control], self.labels, "balanced_accuracy",
      self._num_classes, classes,
    )  # fmt: skip

  def shares_of_room(self, control: str, reference: str) -> dict[str, dict]:
    """Of every method: its share of the way from the control to the reference."""
    shares = criteria.shares_of_room(
      list(self.predictions.values()),
      self.predictions[control],
      self.predictions[reference],
      self.labels,
      self.criterion,
      self._num_classes,
    )
    return dict(zip(self.predictions, shares, strict=True))

  def _measure(self, function, *methods: str):
    predictions = [self.predictions[method] for method in methods]
    return function(*predictions, self.labels, self.criterion, self._num_classes)

  @property
  def _num_classes(self) -> int:
    return sum(len(group.classes) for group in self.groups)


def best_of(methods: list[str], scores: Mapping[str, float]) -> str:
  """The method with the best score by cross-validation; the first if there is none."""
  return max(methods, key=lambda method: scores.get(method, -1.0))


def known_scores(recommendation: Mapping | None) -> dict[str, float]:
  known = (recommendation or {}).get("scores", {})
  return {method: entry["score"] for method, entry in known.items()}


def known_temperatures(recommendation: Mapping | None) -> dict[str, float]:
  """Of the methods that cross-validation calibrated; selections of older runs have none."""
  known = (recommendation or {}).get("scores", {})
  return {m: entry["temperature"] for m, entry in known.items() if "temperature" in entry}


def compare(scored: Scored, method: str, control: str) -> dict:
  """What hallucination adds to the real-only control, and how much the oracle would; paired.

  Every row gets its share of the gap, if there is a gap that seeds and test examples can tell from
  none.
  """
  outcome = {
    "method": method,
    "control": control,
    "reference": None,
    "gain": scored.gain(method, control),
    "headroom": None,
    "gap_closed": None,
  }
  reference = f"oracle+{Method(method).loss}"
  if reference in scored.predictions:
    outcome |= {"reference": reference, "headroom": scored.gain(reference, control)}
    if outcome["headroom"]["interval"][0] > 0:
      shares = scored.shares_of_room(control, reference)
      for row in scored.rows:
        row["gap_closed"] = shares[row["method"]]
      outcome["gap_closed"] = shares[method]
  return outcome


def headline(
  scored: Scored,
  synthetic_methods: Sequence[str],
  plain: str,
  comparison: Mapping,
  recommendation: Mapping | None,
) -> dict:
  """What a user asks first: what to use, what it is worth, and what synthetic data add.

  Args:
    scored: the table.
    synthetic_methods: those of it that use synthetic data.
    plain: the method that a user would have without memdiff.
    comparison: of `compare`.
    recommendation: of cross-validation, if there was one.
  """
  scores = known_scores(recommendation)
  synthetic = comparison["method"]
  if scores:
    synthetic = best_of(synthetic_methods, scores)
  chosen, control = comparison["method"], comparison["control"]
  entry = None
  if recommendation:
    chosen = recommendation["method"]
    entry = recommendation["scores"].get(synthetic)  # none, if folds can judge no synthetic data
  reference = comparison["reference"]
  return {
    "recommended": chosen,
    "by": "cross-validation" if recommendation else "default",
    "plain": plain,
    "over_plain": {"overall": scored.gain(chosen, plain)}
    | {group.name: scored.gain(chosen, plain, group.name) for group in scored.groups},
    "synthetic": {
      "method": synthetic,
      "control": control,
      "overall": scored.gain(synthetic, control),
      "few": scored.gain(synthetic, control, "few"),
      "expected": entry and {"mean": entry["gain"], "interval": entry["interval"]},
      "recommended": chosen == synthetic and recommendation is not None,
    },
    "room": reference and {"reference": reference, "overall": comparison["headroom"]},
  }


def mark_shown(scored: Scored, first: Mapping, comparison: Mapping) -> None:
  """Marks the rows of the short table: those that the first words and the comparison speak of."""
  named = {first["recommended"], first["plain"], first["synthetic"]["method"]}
  named |= {comparison[key] for key in ("method", "control", "reference")}
  for row in scored.rows:
    row["shown"] = row["method"] in named


def agreement(scored: Scored, recommendation: Mapping) -> dict:
  """How well cross-validation foresaw the test set; looked at only when all is chosen."""
  common = [m for m in recommendation["scores"] if m in scored.predictions]
  ours = [recommendation["scores"][m]["score"] for m in common]
  test = [scored.score(m) for m in common]
  return cross_validation.rank_agreement(ours, test) | {
    "methods": len(common),
    "test_gain": scored.gain(recommendation["best"], recommendation["control"]),
    "regret_of_recommended": max(test) - scored.score(recommendation["method"]),
  }
