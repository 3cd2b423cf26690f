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


@flax.struct.dataclass
class ByClass:
  """Where the examples of each class are."""

  order: Any  # [N] indices, class by class
  starts: Any  # [C] where a class begins in `order`
  counts: Any  # [C] at least 1


def group_by_class(labels: np.ndarray) -> ByClass:
  """Of labels [N] in which every class up to the largest occurs."""
  counts = np.bincount(labels)
  return ByClass(
    order=np.argsort(labels, kind="stable").astype(np.int32),
    starts=(np.cumsum(counts) - counts).astype(np.int32),
    counts=counts.astype(np.int32),
  )


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
  offset = jax.random.randint(example_key, (batch_size,), 0, by_class.counts[label])
  return by_class.order[by_class.starts[label] + offset]
