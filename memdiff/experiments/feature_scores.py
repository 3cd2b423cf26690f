"""The methods of an experiment on features, scored on the test set and held against each other."""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from memdiff.classifier.priors import log_prior
from memdiff.evaluation import criteria, cross_validation, scores
from memdiff.evaluation.method import Method
from memdiff.experiments import joint
from memdiff.experiments.base import Experiment
from memdiff.experiments.feature_heads import final_heads, head_names
from memdiff.experiments.feature_store import Space
from memdiff.experiments.methods import (
  OWN,
  REAL,
  REFERENCES,
  Choice,
  describe,
  describe_joint,
  describe_own,
  own_tau,
)
from memdiff.memory.feature_space import logits_of

JOINT = "joint"  # joint:<generator>+<loss>


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


def classify(experiment: Experiment, space: Space, choices: Mapping[str, Choice]) -> Scored:
  """Scores every method and reference on the test set."""
  described, found = _own_heads(experiment, space, choices), {}
  for name, logits in joint.load_logits(experiment).items():
    method = Method.of(f"{JOINT}:{name}", experiment.config.joint.loss)
    described[method] = describe_joint(experiment, name), logits.argmax(axis=-1)
  for name in head_names(experiment):
    for loss, head in final_heads(experiment, choices, name).items():
      method = Method.of(name, loss)
      logits = _logits(head, space.test)
      words = describe(experiment, method, choices)
      described[method] = words, np.asarray(logits.argmax(axis=-1))
      found[method] = head
  labels, groups = (
    experiment.dataset.test_labels,
    scores.make_groups(experiment.dataset.train_counts),
  )
  rows = [
    scores.score_method(
      method,
      description,
      predictions,
      labels,
      groups,
      experiment.seeds,
      experiment.dataset.num_classes,
    )
    | {"reference": Method(method).generator in REFERENCES}
    for method, (description, predictions) in described.items()
  ]
  return Scored(
    rows=rows,
    predictions={method: predictions for method, (_, predictions) in described.items()},
    heads=found,
    labels=labels,
    criterion=experiment.config.selection.criterion,
    groups=groups,
  )


_logits = jax.jit(jax.vmap(logits_of))


def _own_heads(
  experiment: Experiment, space: Space, choices: Mapping[str, Choice]
) -> dict[str, tuple[str, np.ndarray]]:
  """method -> (words, predictions) of the heads that the encoders were trained with."""
  tau, described = own_tau(experiment, choices), {}
  for loss, logits in space.own_logits.items():
    name = _own_name(experiment, loss)
    words = describe_own(experiment, loss)
    adjusted = logits - tau * log_prior(experiment.dataset.train_counts)
    described[name] = words, logits.argmax(axis=-1)
    described[f"{name}+logit_adjustment"] = (
      f"{words}; logits adjusted by the class prior afterwards (tau {tau:g})",
      adjusted.argmax(axis=-1),
    )
  return described


def _own_name(experiment: Experiment, loss: str) -> str:
  return OWN if loss == experiment.config.classifier.loss else f"{OWN}:{loss}"


def plain_training(experiment: Experiment, space: Space) -> str:
  """The method that a user would have without memdiff: cross-entropy on the data as they are."""
  if space.own_logits:
    loss = (
      "cross_entropy" if "cross_entropy" in space.own_logits else experiment.config.classifier.loss
    )
    return _own_name(experiment, loss)
  losses = experiment.config.head.losses
  return Method.of(REAL, "cross_entropy" if "cross_entropy" in losses else losses[0])


def best_of(methods: list[str], scores: Mapping[str, float]) -> str:
  """The method with the best score by cross-validation; the first if there is none."""
  return max(methods, key=lambda method: scores.get(method, -1.0))


def _known_scores(recommendation: Mapping | None) -> dict[str, float]:
  known = (recommendation or {}).get("scores", {})
  return {method: entry["score"] for method, entry in known.items()}


def compared_methods(experiment: Experiment, recommendation: Mapping | None) -> tuple[str, str]:
  """(the method that stands for memdiff, the real-only control that it is held against).

  Their losses are chosen by cross-validation, never by the test set.
  """
  scores = _known_scores(recommendation)
  name = (
    "memdiff"
    if "memdiff" in experiment.config.generators.names
    else experiment.config.generators.names[0]
  )
  method = best_of([Method.of(name, loss) for loss in experiment.config.head.losses], scores)
  controls = [m for m in scores if Method(m).generator in (REAL, OWN)]
  return method, best_of(
    controls or [Method.of(REAL, loss) for loss in experiment.config.head.losses], scores
  )


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
  reference = f"oracle+{method.split('+')[1]}"
  if reference in scored.predictions:
    outcome |= {"reference": reference, "headroom": scored.gain(reference, control)}
    if outcome["headroom"]["interval"][0] > 0:
      shares = scored.shares_of_room(control, reference)
      for row in scored.rows:
        row["gap_closed"] = shares[row["method"]]
      outcome["gap_closed"] = shares[method]
  return outcome


def headline(
  experiment: Experiment,
  scored: Scored,
  plain: str,
  comparison: Mapping,
  recommendation: Mapping | None,
) -> dict:
  """What a user asks first: what to use, what it is worth, and what synthetic features add."""
  scores = _known_scores(recommendation)
  names, losses = experiment.config.generators.names, experiment.config.head.losses
  synthetic = comparison["method"]
  if scores:
    synthetic = best_of([Method.of(name, loss) for name in names for loss in losses], scores)
  chosen, control = comparison["method"], comparison["control"]
  entry = None
  if recommendation:
    chosen, entry = recommendation["method"], recommendation["scores"][synthetic]
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


def compare_joint(experiment: Experiment, scored: Scored) -> list[dict]:
  """What each generator adds to joint training on real images alone; paired."""
  control = Method.of(
    f"{JOINT}:{REAL}", getattr(getattr(experiment.config, "joint", None), "loss", "")
  )
  if control not in scored.predictions:
    return []
  return [
    {"method": method, "gain": scored.gain(method, control)}
    for method in scored.predictions
    if method.startswith(f"{JOINT}:") and method != control
  ]


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
