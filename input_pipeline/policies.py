"""AutoAugment and RandAugment: which operation each image of a batch gets, and how strongly.

AutoAugment: the CIFAR-10 policy of Cubuk et al. 2019, 25 pairs of operations. RandAugment: Cubuk et
al. 2020. Strengths are linear in the magnitude, with the ranges of both papers. Signed operations
go either way with equal chance. Uncovered pixels become grey (128), and warps take the nearest
pixel; code that circulates with long-tailed recognition interpolates bicubically.
"""

import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline import image_ops

_MOST_SHIFT = 150 / 331  # of the image's side

# Operation -> strength at magnitude 0 and at the largest, and whether its sign is drawn.
_RANGES = {
  "shear_x": (0.0, 0.3, True),
  "shear_y": (0.0, 0.3, True),
  "translate_x": (0.0, _MOST_SHIFT, True),  # in sides
  "translate_y": (0.0, _MOST_SHIFT, True),
  "rotate": (0.0, 30.0, True),
  "brightness": (0.0, 0.9, True),  # on top of 1
  "color": (0.0, 0.9, True),
  "contrast": (0.0, 0.9, True),
  "sharpness": (0.0, 0.9, True),
  "posterize": (8.0, 4.0, False),
  "solarize": (256.0, 0.0, False),
  "identity": (0.0, 0.0, False),
  "autocontrast": (0.0, 0.0, False),
  "equalize": (0.0, 0.0, False),
  "invert": (0.0, 0.0, False),
}
_FACTORS = ("brightness", "color", "contrast", "sharpness")

# (operation, probability, magnitude 0..9) twice per sub-policy.
AUTOAUGMENT_CIFAR10 = (
  (("invert", 0.1, 0), ("contrast", 0.2, 6)),
  (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
  (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
  (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
  (("autocontrast", 0.5, 0), ("equalize", 0.9, 0)),
  (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
  (("color", 0.4, 3), ("brightness", 0.6, 7)),
  (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
  (("equalize", 0.6, 0), ("equalize", 0.5, 0)),
  (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
  (("color", 0.7, 7), ("translate_x", 0.5, 8)),
  (("equalize", 0.3, 0), ("autocontrast", 0.4, 0)),
  (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
  (("brightness", 0.9, 6), ("color", 0.2, 8)),
  (("solarize", 0.5, 2), ("invert", 0.0, 0)),
  (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
  (("equalize", 0.2, 0), ("equalize", 0.6, 0)),
  (("color", 0.9, 9), ("equalize", 0.6, 0)),
  (("autocontrast", 0.8, 0), ("solarize", 0.2, 8)),
  (("brightness", 0.1, 3), ("color", 0.7, 0)),
  (("solarize", 0.4, 5), ("autocontrast", 0.9, 0)),
  (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
  (("autocontrast", 0.9, 0), ("solarize", 0.8, 3)),
  (("equalize", 0.8, 0), ("invert", 0.1, 0)),
  (("translate_y", 0.7, 9), ("autocontrast", 0.9, 0)),
)

RANDAUGMENT = tuple(name for name in image_ops.OPERATIONS if name != "invert")


def strengths(
  operation: jax.Array, magnitude: jax.Array, sign: jax.Array, height: int, width: int
) -> jax.Array:
  """What `image_ops.apply` takes.

  Args:
    operation: [B] index into image_ops.OPERATIONS.
    magnitude: [B] in [0, 1], share of the largest.
    sign: [B] of -1 or 1.
    height, width: of the images, pixels.
  """
  low, high, signed = (
    np.array([_RANGES[name][i] for name in image_ops.OPERATIONS], np.float32) for i in range(3)
  )
  side = np.ones(len(low), np.float32)
  side[image_ops.OPERATIONS.index("translate_x")] = width
  side[image_ops.OPERATIONS.index("translate_y")] = height
  base = np.array([name in _FACTORS for name in image_ops.OPERATIONS], np.float32)
  low, high, signed, side, base = (
    jnp.asarray(x)[operation] for x in (low, high, signed, side, base)
  )
  strength = side * (low + magnitude * (high - low))
  strength = base + jnp.where(signed > 0, sign, 1.0) * strength
  is_bits = operation == image_ops.OPERATIONS.index("posterize")
  return jnp.where(is_bits, jnp.round(strength), strength)


def _signs(key: jax.Array, size: int) -> jax.Array:
  return jnp.where(jax.random.bernoulli(key, shape=(size,)), 1.0, -1.0)


def autoaugment(key: jax.Array, images: jax.Array) -> jax.Array:
  """One sub-policy per image, each of its operations with its probability. uint8 [B, H, W, 3]."""
  batch, height, width, _ = images.shape
  table = np.array(
    [
      [(image_ops.OPERATIONS.index(name), p, m / 9) for name, p, m in pair]
      for pair in AUTOAUGMENT_CIFAR10
    ],
    np.float32,
  )
  choice_key, *layer_keys = jax.random.split(key, 3)
  chosen = jnp.asarray(table)[jax.random.randint(choice_key, (batch,), 0, len(table))]
  for layer, layer_key in enumerate(layer_keys):
    happens_key, sign_key = jax.random.split(layer_key)
    happens = jax.random.uniform(happens_key, (batch,)) < chosen[:, layer, 1]
    operation = jnp.where(happens, chosen[:, layer, 0].astype(jnp.int32), 0)
    magnitude = chosen[:, layer, 2]
    strength = strengths(operation, magnitude, _signs(sign_key, batch), height, width)
    images = image_ops.apply(images, operation, strength)
  return images


def randaugment(key: jax.Array, images: jax.Array, num_layers: int, magnitude: float) -> jax.Array:
  """`num_layers` operations per image, uniform over RANDAUGMENT, all at `magnitude` of 30."""
  batch, height, width, _ = images.shape
  candidates = jnp.array([image_ops.OPERATIONS.index(name) for name in RANDAUGMENT])
  for layer_key in jax.random.split(key, num_layers):
    choice_key, sign_key = jax.random.split(layer_key)
    operation = candidates[jax.random.randint(choice_key, (batch,), 0, len(candidates))]
    share = jnp.full((batch,), magnitude / 30)
    strength = strengths(operation, share, _signs(sign_key, batch), height, width)
    images = image_ops.apply(images, operation, strength)
  return images
