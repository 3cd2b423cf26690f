"""The methods of an experiment on features, scored on the test set and held against each other."""

from collections.abc import Mapping

import jax
import numpy as np

from memdiff.classifier.priors import log_prior
from memdiff.evaluation import calibration, scores
from memdiff.evaluation.method import Method
from memdiff.experiments import fitted, joint
from memdiff.experiments.base import Experiment
from memdiff.experiments.comparison import Scored, best_of, known_scores, known_temperatures
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
from memdiff.memory.feature_space import linear_logits

JOINT = "joint"  # joint:<generator>+<loss>


def classify(
  experiment: Experiment,
  space: Space,
  choices: Mapping[str, Choice],
  recommendation: Mapping | None,
) -> Scored:
  """Scores every method and reference on the test set."""
  data, criterion = experiment.dataset, experiment.config.selection.criterion
  groups, temperatures = scores.make_groups(data.train_counts), known_temperatures(recommendation)
  rows, predictions, found = [], {}, {}

  def take(method: str, words: str, logits: np.ndarray) -> None:
    predictions[method] = logits.argmax(axis=-1)
    row = scores.score_method(
      method,
      words,
      predictions[method],
      data.test_labels,
      groups,
      experiment.seeds,
      data.num_classes,
    )
    calibrated = calibration.measure(logits, data.test_labels, criterion, temperatures.get(method))
    is_reference = Method(method).generator in REFERENCES
    rows.append(row | {"reference": is_reference, "calibration": calibrated})

  for method, (words, logits) in _own_heads(experiment, space, choices).items():
    take(method, words, logits)
  for name, logits in joint.load_logits(experiment).items():
    method = Method.of(f"{JOINT}:{name}", experiment.config.joint.loss)
    take(method, describe_joint(experiment, name), logits)
  of_fitted = fitted.load(experiment)
  for method, logits in fitted.logits_of_test(experiment, space, of_fitted):
    take(method, of_fitted.describe(method), logits)
  for name in head_names(experiment):
    for loss, head in final_heads(experiment, choices, name).items():
      method = Method.of(name, loss)
      take(method, describe(experiment, method, choices), np.asarray(_logits(head, space.test)))
      found[method] = head
  return Scored(
    rows=rows,
    predictions=predictions,
    heads=found,
    labels=data.test_labels,
    criterion=criterion,
    groups=groups,
  )


_logits = jax.jit(jax.vmap(linear_logits))


def _own_heads(
  experiment: Experiment, space: Space, choices: Mapping[str, Choice]
) -> dict[str, tuple[str, np.ndarray]]:
  """method -> (words, logits [S, T, C]) of the heads that the encoders were trained with."""
  tau, described = own_tau(experiment, choices), {}
  for loss, logits in space.own_logits.items():
    name = _own_name(experiment, loss)
    words = describe_own(experiment, loss)
    adjusted = logits - tau * log_prior(experiment.dataset.train_counts)
    described[name] = words, logits
    described[f"{name}+logit_adjustment"] = (
      f"{words}; logits adjusted by the class prior afterwards (tau {tau:g})",
      adjusted,
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


def compared_methods(experiment: Experiment, recommendation: Mapping | None) -> tuple[str, str]:
  """(the method that stands for memdiff, the real-only control that it is held against).

  Their losses are chosen by cross-validation, never by the test set.
  """
  scores = known_scores(recommendation)
  name = (
    "memdiff"
    if "memdiff" in experiment.config.generators.names
    else experiment.config.generators.names[0]
  )
  method = best_of([Method.of(name, loss) for loss in experiment.config.head.losses], scores)
  if recommendation:
    return method, recommendation["control"]
  return method, Method.of(REAL, experiment.config.head.losses[0])


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
