"""Generated images that train an encoder and its head beside real ones.

They come in by one of two ways. `merged`: real and generated images are one training set, and
batches mix both at random. `joint`: every batch of real images gets a batch of generated ones
beside it, from the start, or as a curriculum: after a warm-up, with a weight that rises.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from memdiff.classifier import heads
from memdiff.config import above, between, one_of, setting, some_of

WAYS = ("joint", "merged")
LEAST_TRUST = 1e-6  # of an image that is used


@dataclasses.dataclass(frozen=True)
class AddedImagesConfig:
  """How generated images take part in the steps of a training."""

  way: str = setting(
    "joint", "batches of their own beside real ones, or one training set", one_of(WAYS)
  )
  share: float = setting(1.0, "joint: generated images for each real one of a batch", above(0))
  warm_up: float = setting(0.0, "joint: share of the steps without generated images", between(0, 1))
  ramp: float = setting(
    0.0, "joint: share of the other steps over which their weight rises", between(0, 1)
  )
  weight: float = setting(1.0, "of a generated image in the loss, of a real one 1", above(0))
  trust: bool = setting(
    True, "whether their weights within a class are in proportion to their confidence"
  )
  counts: tuple[str, ...] = setting(
    ("real",),
    "candidates; of the classes, for prior and class weights; effective adds generated images by"
    " their weight",
    some_of(heads.GAMMA_COUNTS),
  )

  def __post_init__(self):
    if not self.counts:
      raise ValueError('counts is empty, but the loss needs some; set it to ("real",).')
    if self.way == "merged" and (self.warm_up or self.ramp or self.share != 1):
      raise ValueError(
        "way is merged, whose batches take what comes from the start; set warm_up and ramp to 0 and"
        " share to 1, or way to joint."
      )

  @property
  def joint(self) -> bool:
    return self.way == "joint"

  def number(self, batch_size: int) -> int:
    """Generated images beside a batch of real ones."""
    return max(round(self.share * batch_size), 1) if self.joint else 0

  def weight_at(self, step: jax.Array, num_steps: int) -> jax.Array:
    """Of a generated image: 0 in the warm-up, then rising in a straight line. float32 []."""
    first = round(self.warm_up * num_steps)
    length = max(round(self.ramp * (num_steps - first)), 1)
    return self.weight * jnp.clip((step - first + 1) / length, 0.0, 1.0)


@flax.struct.dataclass
class ImagePool:
  """The generated images of a run; arrays of several runs have a leading axis.

  Attributes:
    images: [M, H, W, ch] uint8.
    labels: [M] int32.
    trust: [M] float32 with mean one within each class, 0 if an image is not used.
    number: [] int32, how many images are used; they are the first.
    union: [N + M] int32, the run's training images and, from N on, the images in use; then zeros.
  """

  images: Any
  labels: Any
  trust: Any
  number: Any
  union: Any


@flax.struct.dataclass
class Drawn:
  """Rows of a step: images, labels, and of a training with generated images what each counts."""

  images: Any  # [B, H, W, ch] uint8
  labels: Any  # [B] int32
  weight: Any = None  # [B] float32, 1 for real ones
  real: Any = None  # [B] bool


def make_pool(
  images: np.ndarray,
  labels: np.ndarray,
  confidence: np.ndarray,
  size: int,
  rows: np.ndarray,
  *,
  num_train: int,
) -> ImagePool:
  """The pool of one run, on the host; pools of one size share a program.

  Args:
    images: [m, H, W, ch] uint8, those in use; none weigh anything if there are none.
    labels: [m].
    confidence: [m] above 0.
    size: M, at least m.
    rows: [n] the run's training images.
    num_train: N, of all training images.

  Raises:
    ValueError: if there are more images than places.
  """
  used = len(labels)
  if used > size:
    raise ValueError(f"a pool of {size} places cannot hold {used} images")
  room = size - used
  union = np.concatenate([rows, num_train + np.arange(used)])
  return ImagePool(
    images=np.pad(images, ((0, room), (0, 0), (0, 0), (0, 0))),
    labels=np.pad(labels, (0, room)).astype(np.int32),
    trust=np.pad(trust_within_classes(confidence, labels), (0, room)),
    number=np.int32(used),
    union=np.pad(union, (0, num_train + size - len(union))).astype(np.int32),
  )


def trust_within_classes(confidence: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Confidences [m] over the mean of their class. float32 [m]."""
  _, of_class = np.unique(labels, return_inverse=True)
  means = np.bincount(of_class, confidence) / np.bincount(of_class)
  return (confidence / np.maximum(means, 1e-12)[of_class]).astype(np.float32)


def stack_pools(pools: Sequence[ImagePool]) -> ImagePool:
  """Of several runs, their axis first."""
  return jax.tree.map(lambda *leaves: np.stack(leaves), *pools)


def effective_counts(
  config: AddedImagesConfig,
  real: jax.Array,
  pool: ImagePool,
  weight: jax.Array,
  batch_size: int,
) -> jax.Array:
  """Images of the classes [C] as the loss sees them, in units of a real image.

  A generated image counts as much as it weighs, and as often as it is drawn: merged, as often as a
  real one; joint, `number` of the pool's images stand beside `batch_size` of the real ones.
  """
  often = 1.0
  if config.joint:
    share = config.number(batch_size) / batch_size
    often = share * real.sum() / jnp.maximum(pool.number, 1)
  of_class = jax.ops.segment_sum(_trust(config, pool), pool.labels, len(real))
  return real + often * weight * of_class


def beside(
  config: AddedImagesConfig, key: jax.Array, real: Drawn, pool: ImagePool, weight: jax.Array
) -> Drawn:
  """A batch of real rows [B] with generated ones behind them, `config.number(B)`, drawn evenly.

  If there are none, or they weigh nothing yet, the real rows come again, without weight: batch
  normalisation then sees real images alone.
  """
  size = len(real.labels)
  number = config.number(size)
  index = jax.random.randint(key, (number,), 0, jnp.maximum(pool.number, 1))
  again, some = jnp.arange(number) % size, (pool.number > 0) & (weight > 0)
  images = jnp.where(some, pool.images[index], real.images[again])
  labels = jnp.where(some, pool.labels[index], real.labels[again])
  weights = jnp.where(some, _weights(config, pool, index, weight), 0.0)
  return Drawn(
    images=jnp.concatenate([real.images, images]),
    labels=jnp.concatenate([real.labels, labels]),
    weight=jnp.concatenate([jnp.ones(size), weights]),
    real=jnp.arange(size + number) < size,
  )


def merged(
  config: AddedImagesConfig,
  places: jax.Array,
  images: jax.Array,
  labels: jax.Array,
  pool: ImagePool,
  weight: jax.Array,
) -> Drawn:
  """The rows of the union at `places` [B]; `images` [N, ...] and `labels` [N] are the real ones."""
  index = pool.union[places]
  real = index < len(labels)
  own, other = jnp.minimum(index, len(labels) - 1), jnp.maximum(index - len(labels), 0)
  return Drawn(
    images=jnp.where(real[:, None, None, None], images[own], pool.images[other]),
    labels=jnp.where(real, labels[own], pool.labels[other]),
    weight=jnp.where(real, 1.0, _weights(config, pool, other, weight)),
    real=real,
  )


def _weights(
  config: AddedImagesConfig, pool: ImagePool, index: jax.Array, weight: jax.Array
) -> jax.Array:
  return weight * _trust(config, pool)[index]


def _trust(config: AddedImagesConfig, pool: ImagePool) -> jax.Array:
  """[M], 0 if an image is not used."""
  return pool.trust if config.trust else (pool.trust > 0).astype(jnp.float32)
