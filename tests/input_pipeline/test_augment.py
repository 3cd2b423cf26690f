"""Crops, flips, cutout and mixup against slices and formulas; every switch, and wrong settings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from input_pipeline import augment, policies
from input_pipeline.augment import AugmentConfig
from memdiff.config import as_dict, build
from memdiff.errors import ConfigError

OFF = AugmentConfig(
  padding=0, flip=False, policy="none", num_layers=1, magnitude=0.0, cutout=0, mixup=0.0
)
H, W = 4, 5


def with_(**changes):
  return dataclasses.replace(OFF, **changes)


def numbered(batch, channels=3):
  """Images in which every byte but 0 occurs at most once, the same in the whole batch."""
  image = np.random.default_rng(0).permutation(255)[: H * W * channels] + 1
  return np.tile(image.reshape(1, H, W, channels).astype(np.uint8), (batch, 1, 1, 1))


def which(results, candidates):
  """For each result the number of the candidate that it equals."""
  equal = (results[:, None] == np.stack(candidates)[None]).all(axis=(2, 3, 4))
  assert (equal.sum(axis=1) == 1).all()
  return equal.argmax(axis=1)


def act(config, images, seed=0):
  """Compiled anew, whatever has been patched."""
  return jax.jit(lambda key, images: augment.augment(key, images, config))(
    jax.random.key(seed), jnp.asarray(images)
  )


def uniform(numbers, count):
  return stats.chisquare(np.bincount(numbers, minlength=count)).pvalue > 1e-3


# --- crop and flip ---------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [1, 3])
def test_every_shift_of_a_crop_is_equally_likely(padding):
  images, side = numbered(4000), 2 * padding + 1
  padded = np.zeros((H + 2 * padding, W + 2 * padding, 3), np.uint8)
  padded[padding : padding + H, padding : padding + W] = images[0]
  crops = [padded[y : y + H, x : x + W] for y in range(side) for x in range(side)]
  results = np.asarray(augment.random_crop(jax.random.key(0), jnp.asarray(images), padding))
  assert uniform(which(results, crops), side**2)


def test_half_of_the_images_are_mirrored():
  images = numbered(4000)
  results = np.asarray(augment.random_flip(jax.random.key(1), jnp.asarray(images)))
  assert uniform(which(results, [images[0], images[0, :, ::-1]]), 2)


def test_crops_and_flips_keep_each_image_in_its_place():
  """Image i of one colour i: whatever is cut, a pixel is i or 0."""
  colours = np.arange(1, 200, dtype=np.uint8).reshape(-1, 1, 1, 1)
  images = np.broadcast_to(colours, (199, H, W, 3))
  result = np.asarray(act(with_(padding=2, flip=True), images))
  assert ((result == colours) | (result == 0)).all()
  assert (result == colours).any(axis=(1, 2, 3)).all()


# --- cutout ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_cutout_clears_a_square_around_a_uniform_pixel(size):
  images = np.random.default_rng(3).uniform(1, 2, (H, W, 3)).astype(np.float32)
  cut = []
  for y in range(H):
    for x in range(W):
      image = images.copy()
      top, left = y - size // 2, x - size // 2
      image[max(top, 0) : top + size, max(left, 0) : left + size] = 0
      cut.append(image)
  batch = jnp.asarray(np.tile(images, (4000, 1, 1, 1)))
  results = np.asarray(augment.cutout(jax.random.key(4), batch, size))
  assert results.dtype == np.float32
  assert uniform(which(results, cut), H * W)


def test_cutout_of_size_0_changes_nothing():
  images = jnp.ones((3, H, W, 3))
  np.testing.assert_array_equal(augment.cutout(jax.random.key(0), images, 0), images)


# --- mixup -----------------------------------------------------------------------------------


def test_mixup_is_a_mixture_with_a_partner():
  images = np.random.default_rng(5).normal(size=(12, H, W, 3)).astype(np.float32)
  mixed, partner, share = augment.mixup(jax.random.key(6), jnp.asarray(images), 1.0)
  assert sorted(partner.tolist()) == list(range(12))
  assert 0 < float(share) < 1 and mixed.dtype == jnp.float32
  for i in range(12):
    expected = float(share) * images[i] + (1 - float(share)) * images[int(partner[i])]
    np.testing.assert_allclose(mixed[i], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_the_share_is_of_beta_and_the_partner_of_all(alpha):
  draw = jax.jit(jax.vmap(lambda key: augment.mixup(key, jnp.zeros((6, 1)), alpha)[1:]))
  partners, shares = draw(jax.random.split(jax.random.key(7), 3000))
  assert stats.kstest(np.asarray(shares), stats.beta(alpha, alpha).cdf).pvalue > 1e-3
  for i in range(6):
    assert uniform(np.asarray(partners)[:, i], 6)


# --- all together ----------------------------------------------------------------------------

EVERYTHING = with_(padding=1, flip=True, policy="autoaugment")


@pytest.mark.parametrize("channels", [1, 3])
def test_with_everything_off_images_stay_as_they_are(channels):
  images = numbered(8, channels)
  result = act(OFF, images)
  np.testing.assert_array_equal(result, images)
  assert result.dtype == jnp.uint8


@pytest.mark.parametrize("config", [
  with_(padding=2), with_(flip=True), with_(policy="autoaugment"),
  with_(policy="randaugment", num_layers=2, magnitude=9.0), EVERYTHING,
], ids=["crop", "flip", "autoaugment", "randaugment", "everything"])  # fmt: skip
def test_each_switch_changes_images_of_the_same_shape_and_type(config):
  images = np.random.default_rng(8).integers(0, 256, (64, 8, 8, 3), np.uint8)
  first, again, other = (act(config, images, seed) for seed in (0, 0, 1))
  assert first.shape == images.shape and first.dtype == jnp.uint8
  assert (np.asarray(first) != images).any(axis=(1, 2, 3)).sum() > 16
  np.testing.assert_array_equal(first, again)
  assert not np.array_equal(first, other)


def test_grey_images_are_cropped_and_flipped():
  images = numbered(2000, 1)
  results = np.asarray(act(with_(padding=1, flip=True), images))
  padded = np.pad(images[0], ((1, 1), (1, 1), (0, 0)))
  crops = [padded[y : y + H, x : x + W] for y in range(3) for x in range(3)]
  views = crops + [crop[:, ::-1] for crop in crops]
  assert uniform(which(results, views), 18)


def test_the_policy_sees_the_cropped_image(monkeypatch):
  """Inverting comes last: the black border is white."""
  monkeypatch.setattr(policies, "RANDAUGMENT", ("invert",))
  images = numbered(64)
  result = act(with_(padding=2, policy="randaugment"), images)
  cropped = act(with_(padding=2), images)
  np.testing.assert_array_equal(result, 255 - cropped)
  assert (np.asarray(cropped) == 0).any()


def test_randaugment_gets_its_layers_and_its_magnitude(monkeypatch):
  images = numbered(4)
  inverted = 255 - images
  monkeypatch.setattr(policies, "RANDAUGMENT", ("invert",))
  for num_layers in (1, 2):
    result = act(with_(policy="randaugment", num_layers=num_layers), images)
    np.testing.assert_array_equal(result, inverted if num_layers % 2 else images)
  monkeypatch.setattr(policies, "RANDAUGMENT", ("solarize",))
  for magnitude, expected in ((0.0, images), (30.0, inverted)):
    result = act(with_(policy="randaugment", magnitude=magnitude), images)
    np.testing.assert_array_equal(result, expected)


def test_autoaugment_reads_its_table(monkeypatch):
  pair = ("invert", 1.0, 0), ("solarize", 0.0, 9)
  monkeypatch.setattr(policies, "AUTOAUGMENT_CIFAR10", (pair,))
  images = numbered(4)
  result = act(with_(policy="autoaugment"), images)
  np.testing.assert_array_equal(result, 255 - images)


# --- wrong settings --------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "shape", "words"), [
  ({"padding": 4}, (4, 9, 3), "padding is 4 pixels, but the images have only 4"),
  ({"padding": 9}, (9, 4, 1), "padding is 9 pixels, but the images have only 4"),
  ({"cutout": 5}, (9, 4, 1), "cutout is 5 pixels, but the images have only 4"),
  ({"policy": "autoaugment"}, (8, 8, 1), "policy is autoaugment.*have 1 channel; set it to none"),
  ({"policy": "randaugment"}, (8, 8, 1), "policy is randaugment.*have 1 channel; set it to none"),
])  # fmt: skip
def test_settings_that_do_not_fit_the_images_are_refused(changes, shape, words):
  with pytest.raises(ConfigError, match=f"config.classifier.augment.{words}"):
    augment.check(with_(**changes), shape)


@pytest.mark.parametrize("config", [
  OFF, with_(padding=3), with_(cutout=4), with_(policy="autoaugment"),
  with_(policy="randaugment", mixup=0.2),
])  # fmt: skip
def test_settings_that_fit_pass(config):
  augment.check(config, (4, 9, 3))


def test_the_shipped_settings_are_read():
  config = build(AugmentConfig, as_dict(AugmentConfig()))
  augment.check(config, (32, 32, 3))
  assert config.padding == 4 and config.flip and config.policy == "none"


@pytest.mark.parametrize(("field", "value", "words"), [
  ("padding", -1, "at least 0"), ("policy", "auto", "one of none, autoaugment, randaugment"),
  ("num_layers", 0, "between 1 and 10"), ("magnitude", 30.5, "between 0 and 30"),
  ("cutout", -1, "at least 0"), ("mixup", -0.1, "at least 0"), ("flip", 1, "True or False"),
])  # fmt: skip
def test_values_that_are_not_allowed_are_refused(field, value, words):
  settings = as_dict(AugmentConfig()) | {field: value}
  with pytest.raises(ConfigError, match=f"config.{field} is {value!r}, but must be {words}"):
    build(AugmentConfig, settings)
