"""Augmentation against SciPy, and what is said of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from memdiff.synthesis import pixel_augmentation

IMAGES = np.random.default_rng(0).normal(size=(400, 8, 8, 2)).astype(np.float32)


def augmented(probability, mirrored=True, seed=0):
  function = jax.jit(pixel_augmentation.augment, static_argnums=(2, 3))
  images, vectors = function(jax.random.key(seed), jnp.asarray(IMAGES), probability, mirrored)
  return np.asarray(images), np.asarray(vectors)


def test_images_are_what_their_vectors_say():
  """Every image rebuilt by SciPy from its vector alone."""
  images, vectors = augmented(0.6)
  for image, vector, original in zip(images, vectors, IMAGES, strict=True):
    mirror, upside_down, scaling, cosine, sine, along, across, right, down = vector
    if mirror:
      original = original[:, ::-1]
    if upside_down:
      original = original[::-1]
    direction, stretch = np.arctan2(across, along) / 2, np.hypot(along, across)

    def turn(angle):
      return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])

    rotation = np.array([[cosine + 1, -sine], [sine, cosine + 1]])
    squeeze = np.diag([2 ** (-0.2 * stretch), 2 ** (0.2 * stretch)])
    matrix = 2 ** (-0.2 * scaling) * rotation @ turn(-direction) @ squeeze @ turn(direction)
    swapped = matrix[::-1, ::-1]  # rows first, as SciPy has it
    moved = np.array([3.5 + 0.125 * 8 * down, 3.5 + 0.125 * 8 * right])
    offset = 3.5 - swapped @ moved
    for channel in range(2):
      expected = ndimage.affine_transform(
        original[..., channel], swapped, offset, order=1, mode="mirror"
      )
      np.testing.assert_allclose(image[..., channel], expected, atol=2e-4)


def test_each_change_comes_with_its_probability():
  _, vectors = augmented(0.3)
  shares = (vectors != 0).mean(axis=0)
  np.testing.assert_allclose(shares[[2, 3, 4, 5, 7, 8]], 0.3, atol=0.08)
  assert shares[1] == pytest.approx(0.15, abs=0.06) and shares[6] == pytest.approx(0.15, abs=0.06)
  assert shares[0] == pytest.approx(0.5, abs=0.08)
  assert not augmented(0.3, mirrored=False)[1][:, 0].any()


def test_images_without_a_change_stay_as_they_are():
  images, vectors = augmented(0.12)
  same = ~vectors.any(axis=1)
  assert same.mean() > 0.1
  np.testing.assert_allclose(images[same], IMAGES[same], atol=1e-5)


def moves(strength, side=40):
  """How far pixels are moved: read off images whose pixels are their own places. [B, H, W, 2]."""
  places = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), axis=-1)
  images = jnp.broadcast_to(jnp.asarray(places, jnp.float32), (60, side, side, 2))
  bent = pixel_augmentation.elastic(jax.random.key(0), images, strength)
  inner = slice(side // 4, -side // 4)  # at the border, places are mirrored
  return np.asarray(bent - images)[:, inner, inner]


def test_bent_images_move_smoothly_each_in_its_own_way():
  found = moves(0.5)
  of_knots = 0.5 * 40 / 8
  assert 0.5 * of_knots < found.std(axis=0).mean() < of_knots
  assert np.abs(found.mean(axis=0)).max() < 1.2  # to no side rather than another
  steps = np.abs(np.diff(found, axis=1)).mean(), np.abs(np.diff(found, axis=2)).mean()
  assert max(steps) < 0.35  # neighbours move alike
  np.testing.assert_allclose(moves(0.0), 0, atol=1e-4)
  np.testing.assert_allclose(moves(0.25), found / 2, atol=1e-3)
