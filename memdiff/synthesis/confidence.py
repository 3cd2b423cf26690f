"""Synthetic features, whoever made them: how many, how far to trust each, where each comes from."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from memdiff.config import above, one_of, setting
from memdiff.memory import exemplars as exemplars_lib
from memdiff.memory.exemplars import Exemplars
from memdiff.memory.feature_space import linear_logits

_EPSILON = 1e-8
_TINY = 1e-30  # far below any confidence, but not zero
_PAIRS = 2**24  # of features and references, whose distances are in memory at a time


@flax.struct.dataclass
class SyntheticFeatures:
  """A generator's features of R runs at K strengths, M of each, in order of class."""

  features: Any  # [R, K, M, D] standardised
  labels: Any  # [M] int32
  confidence: Any  # [R, K, M]
  number: Any  # [M] int32, the n-th feature of its class


# --- confidence ------------------------------------------------------------------------------


def _cosine(a: jax.Array, b: jax.Array) -> jax.Array:
  norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
  return jnp.sum(a * b, axis=-1) / jnp.maximum(norms, _EPSILON)


def cosine_confidence(features, prototypes, centre, logits, labels):
  """max(0, cos(f - g, mu_y - g)), g the mean of the class means. [M] in [0, 1].

  Centred, because all features of a ReLU encoder point the same way.
  """
  del logits, labels
  return jnp.maximum(_cosine(features - centre[None], prototypes - centre[None]), 0.0)


def _entropy(logits):
  log_p = jax.nn.log_softmax(logits)
  return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def certainty_confidence(features, prototypes, centre, logits, labels):
  """1 - H(softmax(logits)) / log C: 1 if the classifier is sure (of any class). [M]."""
  del features, prototypes, centre, labels
  return jnp.maximum(1.0 - _entropy(logits) / np.log(logits.shape[-1]), 0.0)


def entropy_confidence(features, prototypes, centre, logits, labels):
  """H(softmax(logits)) in nats, [M] in [0, log C], to the letter of the original design.

  It rewards *uncertain* features; `certainty` is what was probably meant.
  """
  del features, prototypes, centre, labels
  return _entropy(logits)


def probability_confidence(features, prototypes, centre, logits, labels):
  """softmax(logits) of the feature's own class. [M] in [0, 1]."""
  del features, prototypes, centre
  return jnp.take_along_axis(jax.nn.softmax(logits), labels[:, None], axis=-1)[:, 0]


def no_confidence(features, prototypes, centre, logits, labels):
  """1 for all: every synthetic feature counts as a real one. [M]."""
  del prototypes, centre, logits, labels
  return jnp.ones(features.shape[:1])


CONFIDENCES = {
  "cosine": cosine_confidence,
  "certainty": certainty_confidence,
  "entropy_literal": entropy_confidence,
  "probability": probability_confidence,
  "none": no_confidence,
}
NEED_A_HEAD = ("certainty", "entropy_literal", "probability")


@dataclasses.dataclass(frozen=True)
class ConfidenceConfig:
  name: str = setting("cosine", "how far a synthetic feature is trusted", one_of(CONFIDENCES))
  power: float = setting(1.0, "of it; above 1: only the best are trusted", above(0))
  calibrate: bool = setting(False, "to 1 if a feature is as typical as the real ones")
  normalize: bool = setting(True, "to mean 1 within each class")


def _medians(values: jax.Array, exemplars: Exemplars, enough: jax.Array) -> jax.Array:
  """Median of each class's values [N]; of all such medians for classes not `enough`. [C]."""
  by_class = exemplars.by_class
  order = jnp.lexsort((values, exemplars.labels))  # class by class, rising; padding last
  middle = by_class.starts + (jnp.maximum(by_class.counts, 1) - 1) // 2
  medians = values[order[middle]]
  common = jnp.nanmedian(jnp.where(enough, medians, jnp.nan))
  return jnp.where(enough, medians, jnp.nan_to_num(common, nan=1.0))


def real_confidence(name: str, exemplars: Exemplars, head) -> jax.Array:
  """Confidence [N] of the real features, each against the mean of the others of its class."""
  counts = exemplars.by_class.counts
  label = jnp.minimum(exemplars.labels, counts.shape[0] - 1)
  means = exemplars_lib.class_means(exemplars)
  n = counts[label][:, None].astype(jnp.float32)
  others = (n * means[label] - exemplars.features) / jnp.maximum(n - 1, 1)
  centre = means.sum(axis=0) / jnp.maximum((counts > 0).sum(), 1)
  logits = linear_logits(head, exemplars.features)
  return CONFIDENCES[name](exemplars.features, others, centre, logits, label)


@flax.struct.dataclass
class ClassStatistics:
  """What the exemplars of a run say about its synthetic features."""

  means: jax.Array  # [C, D] of the exemplars
  counts: jax.Array  # [C] exemplars
  typical: jax.Array | None  # [C] confidence of real features; None if nothing is calibrated


def class_statistics(exemplars: Exemplars, head, config: ConfidenceConfig) -> ClassStatistics:
  """Of one run; the same for all its features.

  Args:
    exemplars: of the run.
    head: {"kernel" [D, C], "bias" [C]} on standardised features, the encoder's own.
    config: `calibrate` takes the median confidence of the class's real features, each held against
      the others; classes of one exemplar take the median of all classes.
  """
  counts, typical = exemplars.by_class.counts, None
  if config.calibrate:
    typical = _medians(real_confidence(config.name, exemplars, head), exemplars, counts > 1)
  return ClassStatistics(exemplars_lib.class_means(exemplars), counts, typical)


def confidence(
  features: jax.Array,
  labels: jax.Array,
  statistics: ClassStatistics,
  head,
  config: ConfidenceConfig,
) -> jax.Array:
  """How far each synthetic feature is to be trusted; a constant for the gradient.

  Args:
    features: [M, D] standardised.
    labels: [M] int32.
    statistics: of the run.
    head: {"kernel" [D, C], "bias" [C]} on standardised features, the encoder's own.
    config: `calibrate` divides by what is typical of the class and cuts at 1, so that a feature as
      typical as a real one is fully trusted; `power` sharpens; `normalize` divides by the mean of
      the class, so that confidence tells a class's features apart without lowering the weight of
      the class.

  Returns:
    [M], at least 0.
  """
  means, counts = statistics.means, statistics.counts
  centre = means.sum(axis=0) / jnp.maximum((counts > 0).sum(), 1)
  logits = linear_logits(head, features)
  values = CONFIDENCES[config.name](features, means[labels], centre, logits, labels)
  if statistics.typical is not None:
    values = jnp.minimum(values / jnp.maximum(statistics.typical, _TINY)[labels], 1.0)
  values = jax.lax.stop_gradient(values) ** config.power
  if config.normalize:
    total = jax.ops.segment_sum(values, labels, counts.shape[0])
    number = jax.ops.segment_sum(jnp.ones_like(values), labels, counts.shape[0])
    mean = total / jnp.maximum(number, 1)
    # A class whose features are all worth nothing keeps them as they are, all alike.
    values = jnp.where((mean > _TINY)[labels], values / jnp.maximum(mean, _TINY)[labels], 1.0)
  return values


# --- provenance ------------------------------------------------------------------------------


def nearest_of_class(
  features: np.ndarray, labels: np.ndarray, references: np.ndarray, reference_labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """For each row, the nearest reference of its own class; on the host, class by class.

  Args:
    features: [M, D].
    labels: [M] classes with at least one reference.
    references: [N, D].
    reference_labels: [N].

  Returns:
    (index [M] int32 into the references, Euclidean distance [M] float32).
  """
  index = np.zeros(len(features), np.int32)
  for label in np.unique(labels):
    members = np.flatnonzero(reference_labels == label)
    of_class = references[members]
    centre = of_class.mean(axis=0)  # around which squares cancel least
    of_class = of_class - centre
    squares = np.square(of_class).sum(axis=1)
    rows = np.flatnonzero(labels == label)
    at_once = max(_PAIRS // len(members), 1)
    for start in range(0, len(rows), at_once):
      part = rows[start : start + at_once]
      squared = (
        squares - 2 * (features[part] - centre) @ of_class.T
      )  # up to the feature's own square
      index[part] = members[squared.argmin(axis=1)]
  return index, np.linalg.norm(references[index] - features, axis=1)
