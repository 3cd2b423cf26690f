"""Batches as pure functions of (key, step), for data that lies on the devices; used inside jit."""

import jax
import jax.numpy as jnp


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


def random_shift(key: jax.Array, images: jax.Array, pixels: int) -> jax.Array:
  """Shifts each image [B, H, W, ch] by up to `pixels` in both directions, filling with zeros."""
  if pixels == 0:
    return images
  batch, height, width, channels = images.shape
  padded = jnp.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)))
  corners = jax.random.randint(key, (batch, 2), 0, 2 * pixels + 1)

  def crop(image, corner):
    return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (height, width, channels))

  return jax.vmap(crop)(padded, corners)
