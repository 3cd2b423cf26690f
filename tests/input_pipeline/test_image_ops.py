"""Every image operation against Pillow, all of them mixed in one batch.

Exact, but for pixels where the last digit of a float decides: a warp whose source lies on the edge
between two pixels (Pillow counts in 1/65536 of a pixel), a blend or a stretch that lands on a whole
number (Pillow rounds each product; a fused multiplication does not).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from input_pipeline import image_ops
from input_pipeline.image_ops import OPERATIONS

WARPS = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
BLENDS = {"contrast": ImageEnhance.Contrast, "color": ImageEnhance.Color,
          "sharpness": ImageEnhance.Sharpness}  # fmt: skip
SHAPES = [(20, 24), (33, 17), (32, 32)]
STRENGTHS = 12  # per operation
FILL = 128  # AutoAugment's grey

apply = jax.jit(image_ops.apply)


def matrix(name, s, height, width):
  """From output to input pixels, as Image.transform takes it."""
  if name == "rotate":
    cosine, sine = np.cos(np.radians(s)), np.sin(np.radians(s))
    cx, cy = width / 2, height / 2
    return (cosine, -sine, cx - cosine * cx + sine * cy, sine, cosine, cy - sine * cx - cosine * cy)
  return {
    "shear_x": (1, s, 0, 0, 1, 0), "shear_y": (1, 0, 0, s, 1, 0),
    "translate_x": (1, 0, -s, 0, 1, 0), "translate_y": (1, 0, 0, 0, 1, -s),
  }[name]  # fmt: skip


def with_pillow(name, pixels, strength):
  image, s, grey = Image.fromarray(pixels), float(strength), (FILL,) * 3
  if name == "rotate":
    return image.rotate(s, Image.Resampling.NEAREST, fillcolor=grey)
  if name in WARPS:
    numbers = matrix(name, s, *pixels.shape[:2])
    how = Image.Transform.AFFINE, numbers, Image.Resampling.NEAREST
    return image.transform(image.size, *how, fillcolor=grey)
  if name in BLENDS:
    return BLENDS[name](image).enhance(s)
  return {
    "identity": lambda: image,
    "brightness": lambda: ImageEnhance.Brightness(image).enhance(s),
    "posterize": lambda: ImageOps.posterize(image, int(s)),
    "solarize": lambda: ImageOps.solarize(image, s),
    "autocontrast": lambda: ImageOps.autocontrast(image),
    "equalize": lambda: ImageOps.equalize(image),
    "invert": lambda: ImageOps.invert(image),
  }[name]()


def undecided(name, pixels, strength):
  """Where the last digit decides, and by how much the result may then differ."""
  height, width = pixels.shape[:2]
  values = pixels.astype(np.float64)
  if name in WARPS:
    a, b, c, d, e, f = matrix(name, float(strength), height, width)
    y, x = np.mgrid[:height, :width] + 0.5
    at = np.stack([a * x + b * y + c, d * x + e * y + f], axis=-1)
    on_edge = (np.abs(at - at.round()) < 1e-3).any(axis=-1)
    return np.repeat(on_edge[..., None], 3, axis=-1), 255
  if name in BLENDS:
    copy = np.asarray(BLENDS[name](Image.fromarray(pixels)).degenerate, np.float64)
    exact = copy + float(strength) * (values - copy)
    return (np.abs(exact - exact.round()) < 1e-3) & (copy != values), 1
  if name == "autocontrast":
    low, high = values.min(axis=(0, 1)), values.max(axis=(0, 1))
    return (values - low) * 255 % np.maximum(high - low, 1) == 0, 1
  return np.zeros(pixels.shape, bool), 0


def random_strength(name, rng):
  if name in WARPS:
    return rng.uniform(-1, 1) * {"s": 0.4, "t": 15.0, "r": 180.0}[name[0]]
  if name == "posterize":
    return rng.integers(1, 9)
  return rng.uniform(0, 257) if name == "solarize" else rng.uniform(0.0, 2.0)


def random_images(rng, number, shape):
  """Each channel between limits of its own; some images have one value, some two."""
  low = rng.integers(0, 200, (number, 1, 1, 3))
  high = low + rng.integers(1, 56 + 200 - low)
  images = rng.integers(low, high, (number, *shape, 3))
  images[::STRENGTHS] = low[::STRENGTHS]
  two = slice(1, None, STRENGTHS)
  images[two] = np.where(rng.random(images[two].shape) < 0.5, low[two], high[two] - 1)
  return images.astype(np.uint8)


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def batch(request):
  """(images, names, strengths, results) with all operations mixed."""
  rng = np.random.default_rng(sum(request.param))
  names = [name for name in OPERATIONS for _ in range(STRENGTHS)]
  strengths = np.array([random_strength(name, rng) for name in names], np.float32)
  images = random_images(rng, len(names), request.param)
  order = rng.permutation(len(names))
  images, names, strengths = images[order], np.array(names)[order], strengths[order]
  results = apply(images, np.array([OPERATIONS.index(name) for name in names]), strengths)
  assert results.dtype == jnp.uint8
  return images, names, strengths, np.asarray(results)


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_operation_is_that_of_pillow(batch, name):
  images, names, strengths, results = batch
  own = np.flatnonzero(names == name)
  changed, shares = 0, []
  for i in own:
    ours = results[i].astype(int)
    theirs = np.asarray(with_pillow(name, images[i], strengths[i])).astype(int)
    where, most = undecided(name, images[i], strengths[i])
    np.testing.assert_array_equal(ours[~where], theirs[~where])
    assert np.abs(ours - theirs).max() <= most
    changed += (ours != images[i]).any()
    shares.append(where.mean())
  assert changed == 0 if name == "identity" else changed >= STRENGTHS // 3
  assert np.median(shares) < (0.3 if name == "autocontrast" else 0.05)


@pytest.mark.parametrize(("name", "strength"), [
  ("shear_x", 0.0), ("shear_y", 0.0), ("translate_x", 0.0), ("translate_y", 0.0), ("rotate", 0.0),
  ("brightness", 1.0), ("contrast", 1.0), ("color", 1.0), ("sharpness", 1.0), ("posterize", 8.0),
  ("solarize", 256.0), ("identity", 7.0),
])  # fmt: skip
def test_strengths_that_change_nothing(name, strength):
  images = np.random.default_rng(0).integers(0, 256, (4, 20, 24, 3), np.uint8)
  images[0, 0, :2, 0] = 0, 255
  same = apply(images, np.full(4, OPERATIONS.index(name)), np.full(4, strength, np.float32))
  np.testing.assert_array_equal(same, images)


def one(name, strength, images):
  number = OPERATIONS.index(name)
  return apply(images, np.full(len(images), number), np.full(len(images), strength, np.float32))


def test_directions_are_as_documented():
  images = np.random.default_rng(1).integers(0, 256, (2, 6, 6, 3), np.uint8)
  right, down = np.full_like(images, FILL), np.full_like(images, FILL)
  right[:, :, 2:], down[:, 3:] = images[:, :, :-2], images[:, :-3]
  np.testing.assert_array_equal(one("translate_x", 2.0, images), right)
  np.testing.assert_array_equal(one("translate_y", 3.0, images), down)
  np.testing.assert_array_equal(one("rotate", 90.0, images), np.rot90(images, axes=(1, 2)))
  np.testing.assert_array_equal(one("solarize", 0.0, images), 255 - images)
  assert (one("translate_x", 6.0, images) == FILL).all()


def test_images_do_not_influence_each_other():
  rng = np.random.default_rng(2)
  images = random_images(rng, len(OPERATIONS), (20, 24))
  operation = np.arange(len(OPERATIONS))
  strengths = np.array([random_strength(name, rng) for name in OPERATIONS], np.float32)
  together = apply(images, operation, strengths)
  order = rng.permutation(len(OPERATIONS))
  shuffled = apply(images[order], operation[order], strengths[order])
  np.testing.assert_array_equal(shuffled, together[order])
  others = np.where((operation == 8).reshape(-1, 1, 1, 1), images, 255 - images)
  np.testing.assert_array_equal(apply(others, operation, strengths)[8], together[8])


def test_seeds_side_by_side_are_seeds_alone():
  rng = np.random.default_rng(3)
  operation = rng.integers(0, len(OPERATIONS), (3, 15))
  images = random_images(rng, 45, (20, 24)).reshape(3, 15, 20, 24, 3)
  strengths = rng.uniform(0.5, 2, (3, 15)).astype(np.float32)
  together = np.asarray(jax.jit(jax.vmap(image_ops.apply))(images, operation, strengths))
  for i in range(3):
    alone = np.asarray(apply(images[i], operation[i], strengths[i]))
    assert np.abs(together[i].astype(int) - alone).max() <= 1
    assert (together[i] == alone).mean() > 0.999


def test_grey_is_the_luminance_of_pillow():
  colours = np.random.default_rng(4).integers(0, 256, (1, 256, 256, 3), np.uint8)
  colours[0, 0, :4] = [[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0]]
  theirs = np.asarray(Image.fromarray(colours[0]).convert("L"))
  np.testing.assert_array_equal(image_ops.grey(jnp.asarray(colours))[0], theirs)


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (3, 3), (9, 7)])
def test_smoothing_is_that_of_pillow_up_to_the_border(shape):
  images = np.random.default_rng(5).integers(0, 256, (40, *shape, 3), np.uint8)
  ours = image_ops.smooth(jnp.asarray(images))
  theirs = [np.asarray(Image.fromarray(image).filter(ImageFilter.SMOOTH)) for image in images]
  np.testing.assert_array_equal(ours, np.stack(theirs))
