"""Synthetic features that train a classifier's head beside images, while the encoder moves on.

They enter at the head, at first with little weight, and move along with the mean of their class,
which the memory bank follows. A gradient reaches the encoder from images alone.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from memdiff.memory.memory_bank import MemoryBank


@dataclasses.dataclass(frozen=True)
class AddedRows:
  """How synthetic features take part in the steps of a training.

  Attributes:
    batch_size: how many stand beside a batch of images.
    counts: what the loss takes for the counts of the classes, one of heads.GAMMA_COUNTS: `real`,
      or `effective`, which adds synthetic features as far as they are trusted. Real ones keep, on
      images, the margins of training without synthetic features.
    first_step: at which they enter.
    ramp: share of the later steps over which their weight rises to 1.
  """

  batch_size: int
  counts: str
  first_step: int
  ramp: float

  def weight(self, step: jax.Array, num_steps: int) -> jax.Array:
    """0 before `first_step`, then rising in a straight line to 1."""
    length = max(round(self.ramp * (num_steps - self.first_step)), 1)
    return jnp.clip((step - self.first_step + 1) / length, 0.0, 1.0)

  def class_counts(self, real: jax.Array, pool: "Pool", weight: jax.Array) -> jax.Array:
    """Counts of the classes for the loss; `real` and the result are [C]."""
    if self.counts == "real":
      return real
    return real + weight * jax.ops.segment_sum(pool.confidence, pool.labels, len(real))


@flax.struct.dataclass
class Pool:
  """One seed's synthetic features, and where the classes were when they were made."""

  features: Any  # [M, D] in the encoder's units
  confidence: Any  # [M]
  labels: Any  # [M] int32
  prototype: Any  # [C, D] of the moving bank


def draw(key: jax.Array, pool: Pool, bank: MemoryBank, number: int) -> tuple[jax.Array, ...]:
  """Features [number, D] as they would be now, their labels and confidences [number]."""
  index = jax.random.randint(key, (number,), 0, len(pool.labels))
  labels = pool.labels[index]
  moved = (bank.prototype[: len(pool.prototype)] - pool.prototype)[labels]
  features = jnp.maximum(pool.features[index] + moved, 0.0)  # as after the encoder's ReLU
  return features, labels, pool.confidence[index]


def drift(bank: MemoryBank, pool: Pool) -> jax.Array:
  """How far the classes have moved since: mean shift of a class over the spread of the classes.

  Args:
    bank: of one seed, now.
    pool: the features in use.
  """
  known = (bank.seen > 0)[: pool.prototype.shape[0]]
  number = jnp.maximum(known.sum(), 1)

  def rms(rows):
    return jnp.sqrt(jnp.where(known, jnp.square(rows).sum(axis=1), 0.0).sum() / number)

  centre = jnp.where(known[:, None], pool.prototype, 0.0).sum(axis=0) / number
  moved = bank.prototype[: pool.prototype.shape[0]] - pool.prototype
  return rms(moved) / jnp.maximum(rms(pool.prototype - centre[None]), 1e-12)
