"""Memory in pixels: exemplars of a class as images, and classes made up by turning them.

A denoiser that meets the same few exemplars of a rare class again and again learns them by heart.
A class whose image and exemplars are turned, mirrored or recoloured *together* it cannot know: it
has to look at the exemplars, and learns from the large classes what members of one class have in
common. It can then draw classes that training never saw, from their exemplars alone.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline.batches import ByClass
from memdiff.config import at_least, between, setting
from memdiff.runtime.random import stream


@dataclasses.dataclass(frozen=True)
class PixelMemoryConfig:
  is_shown: bool = setting(False, "whether every U-Net looks at exemplars; memdiff turns it on")
  num_exemplars: int = setting(4, "of the class that it looks at, at most", at_least(1))
  hidden: float = setting(
    0.25, "share of the images whose label is hidden, their exemplars shown", between(0, 1)
  )
  invented: float = setting(
    0.5, "share of those that are turned into classes never seen", between(0, 1)
  )

  @property
  def num_shown(self) -> int:
    """Exemplars that the U-Net looks at, 0 if it looks at none."""
    return self.num_exemplars if self.is_shown else 0


def draw_exemplars(
  key: jax.Array, by_class: ByClass, labels: jax.Array, number: int, itself: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """Exemplars of each row's class, drawn with replacement; a repeated one counts once.

  Args:
    key: randomness.
    by_class: of the training images.
    labels: [B] classes.
    number: K.
    itself: [B] places in `by_class.order` of images that are left out; None: nothing is.

  Returns:
    (index [B, K] of training images, mask [B, K] bool, False for repeats and if there is nothing).
  """
  counts = by_class.counts[labels][:, None]
  available = jnp.maximum(counts - (itself is not None), 0)
  offset = jax.random.randint(key, (len(labels), number), 0, jnp.maximum(available, 1))
  starts = by_class.starts[labels][:, None]
  if itself is not None:  # counted from the image itself on, around the class
    offset = (itself[:, None] - starts + 1 + offset) % jnp.maximum(counts, 1)
  index = by_class.order[jnp.minimum(starts + offset, len(by_class.order) - 1)]
  earlier = jnp.tril(jnp.ones((number, number), bool), -1)
  repeated = ((index[:, :, None] == index[:, None]) & earlier[None]).any(axis=2)
  return index, ~repeated & (available > 0)


def thin_out(key: jax.Array, mask: jax.Array) -> jax.Array:
  """Shows the first m of K exemplars, log m uniform, so that the U-Net knows memories of any size.

  Args:
    key: randomness.
    mask: [B, K] bool.
  """
  rows, number = mask.shape
  shown = jnp.exp(jax.random.uniform(key, (rows,), maxval=jnp.log(number + 1.0)))
  return mask & (jnp.arange(number)[None] < jnp.floor(shown)[:, None])


def turns(channels: int, mirrored: bool) -> np.ndarray:
  """All ways to make another class: [N, 3 + ch], transpose, flip rows, flip columns, channels.

  Args:
    channels: of the images; those of colour images change places too.
    mirrored: whether an image and its mirror image are of one class, so that mirroring alone makes
      no other.
  """
  orders = list(itertools.permutations(range(channels)))
  ways = [
    (*bits, *order)
    for bits in itertools.product((0, 1), repeat=3)
    for order in orders
    if (bits[:2] if mirrored else bits) != (0,) * (2 if mirrored else 3) or order != orders[0]
  ]
  return np.array(ways)


def turned(images: jax.Array, ways: jax.Array) -> jax.Array:
  """Square images [B, ..., H, H, ch], each row in its way: ways [B, 3 + ch], as in `turns`."""
  extra = (1,) * (images.ndim - 1)
  transposes, rows, columns = (ways[:, i].reshape(-1, *extra) == 1 for i in range(3))
  images = jnp.where(transposes, images.swapaxes(-3, -2), images)
  images = jnp.where(rows, images[..., ::-1, :, :], images)
  images = jnp.where(columns, images[..., ::-1, :], images)
  order = ways[:, 3:].reshape(len(ways), *(1,) * (images.ndim - 2), -1)
  return jnp.take_along_axis(images, order, axis=-1)


def identity(channels: int) -> np.ndarray:
  """The way that changes nothing. [3 + ch]."""
  return np.array((0, 0, 0, *range(channels)))


@dataclasses.dataclass(frozen=True)
class Shown:
  """What is done to the rows of a batch.

  Attributes:
    ways: [B, 3 + ch], as in `turns`.
    invented: [B] bool, whether a row stands for a class that was made up.
    hidden: [B] bool, whether its label is hidden.
  """

  ways: jax.Array
  invented: jax.Array
  hidden: jax.Array


def draw_shown(
  key: jax.Array, config: PixelMemoryConfig, has_exemplars: jax.Array, channels: int, mirrored: bool
) -> Shown:
  """Whose label is hidden, and which rows become classes never seen: only such with exemplars.

  Args:
    key: of the step.
    config: the shares.
    has_exemplars: [B] bool.
    channels: of the images.
    mirrored: as in `turns`.
  """
  rows = has_exemplars.shape
  hidden = jax.random.bernoulli(stream(key, "hide"), config.hidden, rows) & has_exemplars
  invented = hidden & jax.random.bernoulli(stream(key, "invent"), config.invented, rows)
  table = jnp.asarray(turns(channels, mirrored))
  drawn = table[jax.random.randint(stream(key, "turn"), rows, 0, len(table))]
  ways = jnp.where(invented[:, None], drawn, jnp.asarray(identity(channels))[None])
  return Shown(ways, invented, hidden)
