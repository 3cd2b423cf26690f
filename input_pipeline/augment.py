"""Augmentation on the devices: pure functions of a key and a batch, for use inside jit."""

import dataclasses

import jax
import jax.numpy as jnp

from input_pipeline import policies
from memdiff.config import at_least, between, one_of, setting
from memdiff.errors import ConfigError

POLICIES = ("none", "autoaugment", "randaugment")


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
  padding: int = setting(
    4, "crop back at random after zero padding by so many pixels; 0: none", at_least(0)
  )
  flip: bool = setting(True, "mirror half of the images")
  policy: str = setting("none", "a published set of operations", one_of(POLICIES))
  num_layers: int = setting(2, "randaugment: operations per image", between(1, 10))
  magnitude: float = setting(9.0, "randaugment: how strong they are", between(0, 30))
  cutout: int = setting(0, "side in pixels of the square set to the mean; 0: none", at_least(0))
  mixup: float = setting(0.0, "alpha of Beta(alpha, alpha); 0: none", at_least(0))


def check(config: AugmentConfig, image_shape: tuple[int, ...]) -> None:
  """Raises ConfigError if the settings do not fit images of shape (H, W, ch)."""
  height, width, channels = image_shape
  where = "config.classifier.augment"
  if config.padding >= min(height, width):
    raise ConfigError(
      f"{where}.padding is {config.padding} pixels, but the images have only {min(height, width)}."
    )
  if config.cutout > min(height, width):
    raise ConfigError(
      f"{where}.cutout is {config.cutout} pixels, but the images have only {min(height, width)}."
    )
  if config.policy != "none" and channels != 3:
    raise ConfigError(
      f"{where}.policy is {config.policy}, which is made for colours, but the images have"
      f" {channels} channel; set it to none."
    )


def augment(key: jax.Array, images: jax.Array, config: AugmentConfig) -> jax.Array:
  """Crop, flip and policy, in this order. uint8 [B, H, W, ch] -> the same."""
  crop_key, flip_key, policy_key = jax.random.split(key, 3)
  if config.padding > 0:
    images = random_crop(crop_key, images, config.padding)
  if config.flip:
    images = random_flip(flip_key, images)
  if config.policy == "autoaugment":
    images = policies.autoaugment(policy_key, images)
  elif config.policy == "randaugment":
    images = policies.randaugment(policy_key, images, config.num_layers, config.magnitude)
  return images


def random_crop(key: jax.Array, images: jax.Array, padding: int) -> jax.Array:
  """Pads each image [B, H, W, ch] with zeros by `padding` pixels and crops it back at random."""
  batch, height, width, channels = images.shape
  padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
  corners = jax.random.randint(key, (2 * batch,), 0, 2 * padding + 1).reshape(batch, 2)

  def crop(image, corner):
    return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (height, width, channels))

  return jax.vmap(crop)(padded, corners)


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
  """Mirrors each image [B, H, W, ch] with probability 1/2."""
  flipped = jax.random.bernoulli(key, shape=images.shape[:1]).reshape(-1, 1, 1, 1)
  return jnp.where(flipped, images[:, :, ::-1], images)


def cutout(key: jax.Array, images: jax.Array, size: int) -> jax.Array:
  """Sets a square of side `size` to zero, the mean of normalised images [B, H, W, ch].

  Its centre is uniform over the pixels, so that it may be cut by the border. DeVries and Taylor,
  "Improved regularization of convolutional neural networks with cutout", 2017.
  """
  if size == 0:
    return images
  batch, height, width, _ = images.shape
  centre = jax.random.randint(
    key, (2, batch, 1, 1, 1), 0, jnp.array([height, width]).reshape(2, 1, 1, 1, 1)
  )
  y = jnp.arange(height).reshape(1, height, 1, 1) - (centre[0] - size // 2)
  x = jnp.arange(width).reshape(1, 1, width, 1) - (centre[1] - size // 2)
  inside = (y >= 0) & (y < size) & (x >= 0) & (x < size)
  return jnp.where(inside, 0.0, images)


def mixup(key: jax.Array, images: jax.Array, alpha: float):
  """Mixes each image with another of the batch: share own + (1 - share) partner.

  Zhang et al., "mixup: beyond empirical risk minimization", 2018; one share per batch, drawn from
  Beta(alpha, alpha), as in their code.

  Args:
    images: [B, ...] float32.
    alpha: above 0.

  Returns:
    (images [B, ...], partner [B] int32, share []).
  """
  share_key, partner_key = jax.random.split(key)
  share = jax.random.beta(share_key, alpha, alpha)
  partner = jax.random.permutation(partner_key, images.shape[0])
  return share * images + (1 - share) * images[partner], partner, share
