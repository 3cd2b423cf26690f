"""Batches as pure functions of (key, step), for data that lies on the devices; used inside jit."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


def epoch_indices(key: jax.Array, step: jax.Array, num_examples: int, batch_size: int) -> jax.Array:
  """The `step`-th batch of an endless stream of epochs, each a fresh permutation.

  Every example comes once per epoch; a batch may end one epoch and begin the next.

  Args:
    key: of the stream; the same at every step.
    step: int32 [].
    num_examples: N.
    batch_size: B, at most N.

  Returns:
    Indices, [B] int32.
  """
  position = step * batch_size + jnp.arange(batch_size)
  epoch = step * batch_size // num_examples
  orders = jnp.stack(
    [jax.random.permutation(jax.random.fold_in(key, epoch + i), num_examples) for i in range(2)]
  )
  return orders[position // num_examples - epoch, position % num_examples]


def padded_epoch_indices(
  key: jax.Array, step: jax.Array, num_examples: jax.Array, size: int, batch_size: int
) -> jax.Array:
  """As `epoch_indices`, for runs of one program that differ in their number of examples.

  Every epoch has `size` places. Each example comes once, and the other places get examples at
  random, so that none comes more often than another on average.

  Args:
    key, step: see `epoch_indices`.
    num_examples: int32 [], from 1 to `size`; may be traced.
    size: at least `batch_size`.
    batch_size: B.

  Returns:
    Indices below `num_examples`, [B] int32.
  """
  index = epoch_indices(key, step, size, batch_size)
  others_key = jax.random.fold_in(key, ~step)  # no epoch has a number as large
  others = jax.random.randint(others_key, (batch_size,), 0, num_examples)
  return jnp.where(index < num_examples, index, others)


@flax.struct.dataclass
class ByClass:
  """Where the examples of each class are."""

  order: Any  # [N] indices, class by class
  starts: Any  # [C] where a class begins in `order`
  counts: Any  # [C]


def group_by_class(labels: np.ndarray, num_classes: int) -> ByClass:
  """Of labels [N]; rows whose label is not below `num_classes` come last and belong to no class."""
  counts = np.bincount(labels, minlength=num_classes)[:num_classes]
  return ByClass(
    order=np.argsort(labels, kind="stable").astype(np.int32),
    starts=(np.cumsum(counts) - counts).astype(np.int32),
    counts=counts.astype(np.int32),
  )


def draw_members(key: jax.Array, by_class: ByClass, labels: jax.Array) -> jax.Array:
  """For each label a random example of its class, with replacement.

  Args:
    key: randomness.
    by_class: of the examples.
    labels: [B] int32 classes that have examples.

  Returns:
    Indices, [B] int32.
  """
  offset = jax.random.randint(key, labels.shape, 0, jnp.maximum(by_class.counts[labels], 1))
  return by_class.order[by_class.starts[labels] + offset]


def draw_probabilities(counts: np.ndarray, exponent: float) -> np.ndarray:
  """Probability of drawing each class, n^exponent / sum: 1 as in the data, 0 balanced."""
  weights = np.where(counts > 0, np.maximum(counts, 1) ** exponent, 0.0)
  return weights / weights.sum()


def draw_labels(key: jax.Array, cumulative: jax.Array, number: int) -> jax.Array:
  """Classes by their cumulated weights [C], with replacement. [number] int32."""
  # Below the last cumulated value, so that rounding cannot pick a class of no weight.
  u = jax.random.uniform(key, (number,), maxval=cumulative[-1])
  return jnp.searchsorted(cumulative, u, side="right")


def balanced_indices(
  key: jax.Array, step: jax.Array, by_class: ByClass, batch_size: int
) -> jax.Array:
  """The `step`-th batch of class-balanced sampling: a class at random, then one of its examples.

  Kang et al. 2020, section 3, with q = 0.

  Returns:
    Indices, [B] int32.
  """
  class_key, example_key = jax.random.split(jax.random.fold_in(key, step))
  label = jax.random.randint(class_key, (batch_size,), 0, by_class.counts.shape[0])
  return draw_members(example_key, by_class, label)
