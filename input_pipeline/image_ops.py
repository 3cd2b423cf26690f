"""Image operations as Pillow defines them, each image of a batch with an operation of its own.

Running every operation on every image and choosing one would cost fourteen passes. Here all of
them are three: a warp (shear, translate, rotate), a table of 256 values per image and channel
(contrast, equalize, solarize, ...), and a blend with a grey or smoothed copy (color, sharpness).
Each image has the parameters of its operation in the pass that does it, and the identity's in the
others.
"""

import jax
import jax.numpy as jnp
import numpy as np

OPERATIONS = (
  "identity",
  "shear_x",
  "shear_y",
  "translate_x",
  "translate_y",
  "rotate",
  "brightness",
  "contrast",
  "color",
  "sharpness",
  "posterize",
  "solarize",
  "autocontrast",
  "equalize",
  "invert",
)
FILL = 128  # of pixels that a warp uncovers, as AutoAugment's code for CIFAR has it


def apply(images: jax.Array, operation: jax.Array, strength: jax.Array) -> jax.Array:
  """One operation per image.

  Args:
    images: [B, H, W, 3] uint8.
    operation: [B] int, index into OPERATIONS.
    strength: [B] float32: shear as a slope; translation in pixels; rotation in degrees,
      counter-clockwise; brightness, contrast, color, sharpness as a factor, 1 changes nothing;
      posterize in bits kept; solarize as a threshold. The others ignore it.

  Returns:
    [B, H, W, 3] uint8.
  """
  images = _warp(images, operation, strength)
  images = _look_up(images, operation, strength)
  return _blend_with_copy(images, operation, strength)


def _is(operation: jax.Array, name: str) -> jax.Array:
  return operation == OPERATIONS.index(name)


# --- warps -----------------------------------------------------------------------------------


def _matrices(operation, strength, height: int, width: int) -> jax.Array:
  """[B, 2, 3] maps from output to input pixels, (x, y) from the upper left corner."""
  zero, one = jnp.zeros_like(strength), jnp.ones_like(strength)
  radians = jnp.where(_is(operation, "rotate"), strength, 0.0) * (np.pi / 180)
  cosine, sine = jnp.cos(radians), jnp.sin(radians)
  turn_x = width / 2 - cosine * (width / 2) + sine * (height / 2)
  turn_y = height / 2 - sine * (width / 2) - cosine * (height / 2)
  by_name = {
    "shear_x": (one, strength, zero, zero, one, zero),
    "shear_y": (one, zero, zero, strength, one, zero),
    "translate_x": (one, zero, -strength, zero, one, zero),
    "translate_y": (one, zero, zero, zero, one, -strength),
    "rotate": (cosine, -sine, turn_x, sine, cosine, turn_y),
  }
  chosen = (one, zero, zero, zero, one, zero)
  for name, numbers in by_name.items():
    is_name = _is(operation, name)
    chosen = [jnp.where(is_name, new, old) for new, old in zip(numbers, chosen, strict=True)]
  return jnp.stack(chosen, axis=-1).reshape(-1, 2, 3)


def _warp(images, operation, strength):
  """Nearest-neighbour warp; FILL where the input ends."""
  batch, height, width, channels = images.shape
  matrix = _matrices(operation, strength, height, width)
  x = jnp.arange(width, dtype=jnp.float32)[None, None] + 0.5
  y = jnp.arange(height, dtype=jnp.float32)[None, :, None] + 0.5

  def source(row):
    at = matrix[:, row, :, None, None]
    return jnp.floor(at[:, 0] * x + at[:, 1] * y + at[:, 2]).astype(jnp.int32)

  from_x, from_y = source(0), source(1)
  inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
  index = jnp.clip(from_y, 0, height - 1) * width + jnp.clip(from_x, 0, width - 1)
  pixels = images.reshape(batch, height * width, channels)
  moved = jnp.take_along_axis(pixels, index.reshape(batch, -1, 1), axis=1)
  moved = moved.reshape(images.shape)
  return jnp.where(inside[..., None], moved, jnp.uint8(FILL))


# --- tables ----------------------------------------------------------------------------------


def _histogram(images: jax.Array) -> jax.Array:
  """[B, H, W, ch] uint8 -> [B, ch, 256] int32."""
  batch, channels = images.shape[0], images.shape[-1]
  rows = jnp.arange(batch * channels).reshape(batch, 1, 1, channels)
  flat = (rows * 256 + images.astype(jnp.int32)).ravel()
  ones = jnp.ones(flat.shape, jnp.int32)
  counts = jax.ops.segment_sum(ones, flat, batch * channels * 256)
  return counts.reshape(batch, channels, 256)


def _equalize_table(histogram: jax.Array, value: jax.Array) -> jax.Array:
  """Pillow's ImageOps.equalize, in whole numbers."""
  last = jnp.max(jnp.where(histogram > 0, value, 0), axis=-1, keepdims=True)
  in_last = jnp.take_along_axis(histogram, last, axis=-1)
  step = (histogram.sum(axis=-1, keepdims=True) - in_last) // 255
  below = jnp.cumsum(histogram, axis=-1) - histogram
  table = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255)
  return jnp.where(step > 0, table, value)


def _autocontrast_table(histogram: jax.Array, value: jax.Array) -> jax.Array:
  """The smallest value to 0, the largest to 255, linear between, rounded down."""
  present = histogram > 0
  low = jnp.min(jnp.where(present, value, 255), axis=-1, keepdims=True)
  high = jnp.max(jnp.where(present, value, 0), axis=-1, keepdims=True)
  stretched = jnp.clip((value - low) * 255 // jnp.maximum(high - low, 1), 0, 255)
  return jnp.where(high > low, stretched, value)


def _blend(copy: jax.Array, original: jax.Array, factor: jax.Array) -> jax.Array:
  """Pillow's Image.blend: copy + factor (original - copy), clipped, rounded down; int32."""
  mixed = copy + factor * (original - copy).astype(jnp.float32)
  return jnp.clip(jnp.floor(mixed), 0, 255).astype(jnp.int32)


def grey(images: jax.Array) -> jax.Array:
  """Luminance as Pillow converts RGB to L. [B, H, W, 3] -> [B, H, W] int32."""
  weights = jnp.array([19595, 38470, 7471]).reshape(1, 1, 1, 3)
  return (jnp.sum(images.astype(jnp.int32) * weights, axis=-1) + 0x8000) >> 16


def _look_up(images, operation, strength):
  batch, height, width, channels = images.shape
  value = jnp.broadcast_to(jnp.arange(256).reshape(1, 1, 256), (batch, channels, 256))
  factor = strength.reshape(-1, 1, 1)
  histogram = _histogram(images)
  # The mean luminance, rounded: what contrast blends with.
  mean = (grey(images).reshape(batch, -1).sum(axis=1) / (height * width) + 0.5).astype(jnp.int32)
  bits = 8 - jnp.clip(factor, 0, 8).astype(jnp.int32)
  tables = {
    "brightness": _blend(jnp.zeros_like(value), value, factor),
    "contrast": _blend(mean.reshape(-1, 1, 1), value, factor),
    "posterize": (value >> bits) << bits,
    "solarize": jnp.where(value < factor, value, 255 - value),
    "autocontrast": _autocontrast_table(histogram, value),
    "equalize": _equalize_table(histogram, value),
    "invert": 255 - value,
  }
  table = value
  for name, new in tables.items():
    table = jnp.where(_is(operation, name).reshape(-1, 1, 1), new, table)
  pixels = images.reshape(batch, height * width, channels).swapaxes(1, 2)
  looked_up = jnp.take_along_axis(table.astype(jnp.uint8), pixels.astype(jnp.int32), axis=2)
  return looked_up.swapaxes(1, 2).reshape(images.shape)


# --- blends with a changed copy --------------------------------------------------------------


def smooth(images: jax.Array) -> jax.Array:
  """Pillow's SMOOTH filter: 3x3, weight 5 at the centre, over 13; borders stay. int32."""
  pixels = images.astype(jnp.int32)
  height, width = images.shape[1:3]
  around = sum(pixels[:, i : i + height - 2, j : j + width - 2] for i in range(3) for j in range(3))
  centre = pixels[:, 1:-1, 1:-1]
  smoothed = (2 * (around + 4 * centre) + 13) // 26  # rounded to the nearest
  return pixels.at[:, 1:-1, 1:-1].set(smoothed)


def _blend_with_copy(images, operation, strength):
  pixels = images.astype(jnp.int32)
  is_color = _is(operation, "color").reshape(-1, 1, 1, 1)
  is_sharpness = _is(operation, "sharpness").reshape(-1, 1, 1, 1)
  copy = jnp.where(is_color, grey(images)[..., None], smooth(images))
  blended = _blend(copy, pixels, strength.reshape(-1, 1, 1, 1))
  return jnp.where(is_color | is_sharpness, blended, pixels).astype(jnp.uint8)
