"""Augmentation that the U-Net is told of, so that samples do not show it.

Every image may be mirrored, turned upside down, scaled, rotated, stretched and moved; what was done
is a vector of nine numbers, zeros for an image as it is, which is what sampling asks for. Karras et
al., "Elucidating the design space of diffusion-based generative models", 2022, appendix F.2, which
CBDM trains with as ADA. The direction of a stretch is told by twice its angle: by the angle itself,
as in the authors' code, a stretch and the opposite one are told alike. Pixels are interpolated
linearly and reflected beyond the border, without that code's oversampling by wavelets.
"""

import dataclasses

import jax
import jax.numpy as jnp

from memdiff.config import between, setting
from memdiff.runtime.random import normal, stream

_STEP = 0.2  # log2 of a scaling or stretching by one
_SHIFT = 0.125  # of a side, a move by one
_KNOTS = 3  # of a bent image, per side


@dataclasses.dataclass(frozen=True)
class AugmentationConfig:
  probability: float = setting(0.0, "of each change, published as 0.12; 0: none", between(0, 1))


def augment(
  key: jax.Array, images: jax.Array, probability: float, mirrored: bool
) -> tuple[jax.Array, jax.Array]:
  """Changes images and says how.

  Args:
    key: randomness.
    images: [B, H, W, ch] float32.
    probability: of each change but mirroring.
    mirrored: whether half of the images are mirrored, whatever the probability.

  Returns:
    (images, vectors [B, 9]: mirrored, upside down, scaling, cosine - 1 and sine of the rotation,
    stretching along twice its direction, moves right and down).
  """
  rows = len(images)

  def chosen(name):
    return jax.random.bernoulli(stream(key, f"{name} chosen"), probability, (rows,))

  def gaussian(name):
    return chosen(name) * normal(stream(key, name), (rows,))

  def angle(name):
    return jax.random.uniform(stream(key, name), (rows,), minval=-jnp.pi, maxval=jnp.pi)

  mirror = jax.random.bernoulli(stream(key, "mirror"), 0.5 if mirrored else 0.0, (rows,))
  upside_down = chosen("upside_down") & jax.random.bernoulli(stream(key, "flip"), 0.5, (rows,))
  scaling, stretching = gaussian("scale"), gaussian("stretch")
  rotation, direction = chosen("rotate") * angle("rotate"), angle("direction")
  direction = jax.random.bernoulli(stream(key, "oblique"), 0.5, (rows,)) * direction
  shift = chosen("move")[None] * normal(stream(key, "move"), (2, rows))
  images = jnp.where(mirror[:, None, None, None], images[:, :, ::-1], images)
  images = jnp.where(upside_down[:, None, None, None], images[:, ::-1], images)
  matrices = _matrices(scaling, rotation, stretching, direction)
  vectors = (
    mirror, upside_down, scaling, jnp.cos(rotation) - 1, jnp.sin(rotation),
    stretching * jnp.cos(2 * direction), stretching * jnp.sin(2 * direction), *shift,
  )  # fmt: skip
  return warped(images, matrices, shift.T), jnp.stack(vectors, axis=1).astype(jnp.float32)


def _matrices(scaling, rotation, stretching, direction) -> jax.Array:
  """[B, 2, 2] maps from output to input positions (right, down) around the centre."""

  def turn(angle):
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([jnp.stack([cosine, -sine], 1), jnp.stack([sine, cosine], 1)], 1)

  shrink, stretch = 2 ** (-_STEP * scaling), 2 ** (-_STEP * stretching)
  stretched = jnp.stack([stretch, 1 / stretch], 1)[:, :, None] * turn(direction)
  return shrink[:, None, None] * (turn(rotation) @ turn(-direction) @ stretched)


def warped(images: jax.Array, matrices: jax.Array, shift: jax.Array) -> jax.Array:
  """Images [B, H, W, ch] mapped by [B, 2, 2], then moved by shift [B, 2] times an eighth of a side.

  Positions are (right, down) from the centre; the matrices map output to input.
  """
  height, width = images.shape[1:3]
  down, right = _positions(height, width)

  def places(matrix, shift):
    moved = jnp.stack([right - _SHIFT * width * shift[0], down - _SHIFT * height * shift[1]])
    return jnp.einsum("ij,jhw->ihw", matrix, moved)[::-1]

  return _read(images, jax.vmap(places)(matrices, shift))


def _positions(height: int, width: int) -> tuple[jax.Array, jax.Array]:
  """Of the pixels, (down, right) from the centre. [H, W] each."""
  return jnp.meshgrid(
    jnp.arange(height) - (height - 1) / 2, jnp.arange(width) - (width - 1) / 2, indexing="ij"
  )


def _read(images: jax.Array, places: jax.Array) -> jax.Array:
  """Images [B, H, W, ch] at places [B, 2, H, W], (down, right) from the centre."""
  centre = (jnp.array(images.shape[1:3]) - 1) / 2

  def read(image, places):
    found = list(places + centre[:, None, None])

    def interpolated(channel):
      return jax.scipy.ndimage.map_coordinates(channel, found, order=1, mode="mirror")

    return jax.vmap(interpolated, in_axes=2, out_axes=2)(image)

  return jax.vmap(read)(images, places)


def affine(key: jax.Array, images: jax.Array, strength: jax.Array) -> jax.Array:
  """Images [B, H, W, ch] float32, each scaled, rotated, stretched and moved at random.

  All four are normal; at a strength of 1 their deviations are a fifth of an octave, 15 degrees, a
  fifth of an octave and an eighth of a side. Nothing is mirrored.
  """
  rows = len(images)
  scaling, rotation, stretching, right, down = strength * jnp.stack(
    [normal(stream(key, name), (rows,)) for name in ("scale", "rotate", "stretch", "right", "down")]
  )
  direction = jax.random.uniform(stream(key, "direction"), (rows,), maxval=jnp.pi)
  matrices = _matrices(scaling, rotation * (jnp.pi / 12), stretching, direction)
  return warped(images, matrices, jnp.stack([right, down], axis=1))


def elastic(key: jax.Array, images: jax.Array, strength: jax.Array) -> jax.Array:
  """Images [B, H, W, ch] float32, each bent at random.

  Three by three points are moved, and what lies between follows smoothly (Ronneberger et al.,
  "U-Net", 2015, section 3.1). Moves are normal; at a strength of 1 their deviation is an eighth of
  a side.
  """
  rows, height, width = images.shape[:3]
  side = jnp.array([height, width])[None, :, None, None]
  knots = strength * _SHIFT * side * normal(stream(key, "knots"), (rows, 2, _KNOTS, _KNOTS))
  moves = jax.image.resize(knots, (rows, 2, height, width), "cubic")
  return _read(images, jnp.stack(_positions(height, width))[None] + moves)
