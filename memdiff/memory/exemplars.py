"""The training features as generators see them: labelled, standardised, drawn from by class."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline.batches import ByClass, draw_members, group_by_class


@flax.struct.dataclass
class Exemplars:
  """Features of one training set; arrays may lead with runs (seeds, folds).

  Rows whose label is C or more pad the array, so that runs of different size fit into one; they
  belong to no class.
  """

  features: Any  # [N, D] standardised
  labels: Any  # [N] int32
  by_class: ByClass


def make(features: np.ndarray, labels: np.ndarray, num_classes: int) -> Exemplars:
  """Of one run: features [N, D], labels [N] int."""
  labels = np.asarray(labels, np.int32)
  return Exemplars(features, labels, group_by_class(labels, num_classes))


def draw(key: jax.Array, exemplars: Exemplars, labels: jax.Array) -> jax.Array:
  """For each of labels [M] a random exemplar of its class. [M, D]."""
  return exemplars.features[draw_members(key, exemplars.by_class, labels)]


def _sums(exemplars: Exemplars, values: jax.Array) -> jax.Array:
  """Sums over the members of each class. [N, ...] -> [C, ...]."""
  num_classes = exemplars.by_class.counts.shape[0]
  return jax.ops.segment_sum(values, exemplars.labels, num_classes + 1)[:num_classes]


def class_means(exemplars: Exemplars) -> jax.Array:
  """[C, D]; zeros for an empty class."""
  counts = jnp.maximum(exemplars.by_class.counts, 1)
  return _sums(exemplars, exemplars.features) / counts[:, None]


def deviations(exemplars: Exemplars) -> jax.Array:
  """Each feature minus the mean of its class, zero in padding rows. [N, D]."""
  means = class_means(exemplars)
  inside = exemplars.labels < means.shape[0]
  centres = means[jnp.where(inside, exemplars.labels, 0)]
  return jnp.where(inside[:, None], exemplars.features - centres, 0.0)


def within_covariance(exemplars: Exemplars) -> jax.Array:
  """Pooled covariance within classes, divided by N - C (of classes with members). [D, D]."""
  counts, residuals = exemplars.by_class.counts, deviations(exemplars)
  freedom = counts.sum() - (counts > 0).sum()
  # Less than float32 would make what is singular indefinite.
  squares = jnp.matmul(residuals.T, residuals, precision=jax.lax.Precision.HIGHEST)
  return squares / jnp.maximum(freedom, 1)
