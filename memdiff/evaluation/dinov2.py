"""DINOv2, vision transformers trained without labels, as features of images.

Oquab et al., "DINOv2: learning robust visual features without supervision", 2024: the models
vits14, vitb14 and vitl14 without registers, told apart by their shapes. The names of the arrays are
those of the published files, such as dinov2_vitl14_pretrain.pth.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from memdiff.errors import DataError
from memdiff.evaluation import weight_files

PATCH = 14  # pixels
_DEPTHS = {384: 12, 768: 12, 1024: 24}  # blocks, by width: vits14, vitb14, vitl14
_HEAD = 64  # width of a head
_EPSILON = 1e-6  # of layer norm
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, on 0..1
_NEEDED = (
  "dinov2_vits14_pretrain.pth, dinov2_vitb14_pretrain.pth or dinov2_vitl14_pretrain.pth, as it is"
  " or as .safetensors,"
)
_OFFSET = 0.1  # of a grid's side when places are interpolated, as published
_SHARPNESS = -0.75  # of the cubic filter


def weights_path(path: str = "") -> str:
  """`path`; no package brings the weights.

  Raises:
    DataError: if there is no such file.
  """
  return weight_files.given(path, "dinov2", _NEEDED)


def load(path: str) -> dict[str, jax.Array]:
  """The network's arrays; those of all blocks as one array with the block first.

  Raises:
    DataError: if it is no DINOv2 of the three, or an array is missing, of another shape, or not
      finite.
  """
  arrays = weight_files.read(path)
  width, tokens = _size(path, arrays)
  shapes = _shapes(width, tokens)
  arrays = weight_files.fitting(path, arrays, shapes, f"a DINOv2 of width {width}")
  kernel = arrays["patch_embed.proj.weight"].transpose(2, 3, 1, 0)  # OIHW
  weights = {
    "patch/kernel": kernel.reshape(-1, width),
    "patch/bias": arrays["patch_embed.proj.bias"],
    "class": arrays["cls_token"][0, 0],
    "places": arrays["pos_embed"][0],
    "norm.weight": arrays["norm.weight"],
    "norm.bias": arrays["norm.bias"],
  }
  for name in _block_shapes(width):
    weights[f"blocks/{name}"] = np.stack(
      [arrays[f"blocks.{i}.{name}"] for i in range(_DEPTHS[width])]
    )
  return jax.tree.map(jnp.asarray, weights)


def _size(path: str, arrays: Mapping[str, np.ndarray]) -> tuple[int, int]:
  """(width, number of tokens) by the places of a file."""
  if "register_tokens" in arrays:
    raise DataError(f"{path} is a DINOv2 with registers; give one without, whose features differ.")
  if "pos_embed" not in arrays:
    raise DataError(f"{path} has no array pos_embed, so it is no DINOv2.")
  shape = arrays["pos_embed"].shape
  if len(shape) != 3 or shape[-1] not in _DEPTHS or math.isqrt(max(shape[1] - 1, 0)) < 1:
    raise DataError(
      f"{path} has pos_embed of the shape {shape}; the networks that are known have (1, tokens,"
      f" {', '.join(map(str, list(_DEPTHS)[:-1]))} or {max(_DEPTHS)})."
    )
  if math.isqrt(shape[1] - 1) ** 2 != shape[1] - 1:
    raise DataError(f"{path} has places of {shape[1] - 1} patches, which are no square.")
  return shape[2], shape[1]


def _block_shapes(width: int) -> dict[str, tuple[int, ...]]:
  """Of the arrays of a block."""
  shapes: dict[str, tuple[int, ...]] = {}
  for name, out, inside in (
    ("attn.qkv", 3 * width, width),
    ("attn.proj", width, width),
    ("mlp.fc1", 4 * width, width),
    ("mlp.fc2", width, 4 * width),
  ):
    shapes |= {f"{name}.weight": (out, inside), f"{name}.bias": (out,)}
  names = ("norm1.weight", "norm1.bias", "ls1.gamma", "norm2.weight", "norm2.bias", "ls2.gamma")
  return shapes | dict.fromkeys(names, (width,))


def _shapes(width: int, tokens: int) -> dict[str, tuple[int, ...]]:
  """Of the arrays that the file must hold."""
  shapes: dict[str, tuple[int, ...]] = {
    "cls_token": (1, 1, width),
    "pos_embed": (1, tokens, width),
    "patch_embed.proj.weight": (width, 3, PATCH, PATCH),
    "patch_embed.proj.bias": (width,),
    "norm.weight": (width,),
    "norm.bias": (width,),
  }
  for i in range(_DEPTHS[width]):
    shapes |= {f"blocks.{i}.{name}": shape for name, shape in _block_shapes(width).items()}
  return shapes


def features(weights: Mapping[str, jax.Array], images: jax.Array) -> jax.Array:
  """The class token after the last layer norm.

  uint8 RGB [N, S, S, 3], S a multiple of 14 -> float32 [N, D].
  """
  number, side = len(images), images.shape[1] // PATCH
  mean, deviation = (np.array(x, np.float32)[None, None, None] for x in (_MEAN, _DEVIATION))
  x = (images.astype(jnp.float32) / 255 - mean) / deviation
  x = x.reshape(number, side, PATCH, side, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
  x = x.reshape(number, side * side, -1) @ weights["patch/kernel"]
  x += weights["patch/bias"][None, None]
  first = jnp.broadcast_to(weights["class"][None, None], (number, 1, x.shape[-1]))
  x = jnp.concatenate([first, x], axis=1) + _places(weights["places"], side)[None]
  prefix = "blocks/"
  blocks = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
  x, _ = jax.lax.scan(lambda x, block: (_block(block, x), None), x, blocks)
  return _norm(weights, "norm", x[:, 0])


def _block(weights: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
  """Attention and a layer per token, each scaled and added. [N, T, D] -> [N, T, D]."""
  heads = x.shape[-1] // _HEAD
  y = _linear(weights, "attn.qkv", _norm(weights, "norm1", x))
  query, key, value = jnp.moveaxis(y.reshape(*x.shape[:2], 3, heads, _HEAD), 2, 0)
  attention = jax.nn.softmax(jnp.einsum("nqhd,nkhd->nhqk", query, key) / math.sqrt(_HEAD))
  y = jnp.einsum("nhqk,nkhd->nqhd", attention, value).reshape(x.shape)
  x += _linear(weights, "attn.proj", y) * weights["ls1.gamma"][None, None]
  y = jax.nn.gelu(_linear(weights, "mlp.fc1", _norm(weights, "norm2", x)), approximate=False)
  return x + _linear(weights, "mlp.fc2", y) * weights["ls2.gamma"][None, None]


def _linear(weights: Mapping[str, jax.Array], name: str, x: jax.Array) -> jax.Array:
  y = jnp.einsum("...i,oi->...o", x, weights[f"{name}.weight"])
  return y + jnp.expand_dims(weights[f"{name}.bias"], range(x.ndim - 1))


def _norm(weights: Mapping[str, jax.Array], name: str, x: jax.Array) -> jax.Array:
  x = jax.nn.standardize(x, epsilon=_EPSILON)
  scale, bias = (
    jnp.expand_dims(weights[f"{name}.{part}"], range(x.ndim - 1)) for part in ("weight", "bias")
  )
  return x * scale + bias


def _places(places: jax.Array, side: int) -> jax.Array:
  """Of the class token and of side x side patches; those of another grid are interpolated.

  [1 + n * n, D] -> [1 + side * side, D].
  """
  known = math.isqrt(len(places) - 1)
  if known == side:
    return places
  matrix = _cubic(known, side)
  grid = places[1:].reshape(known, known, -1)
  grid = jnp.einsum("ai,bj,ijd->abd", matrix, matrix, grid).reshape(side * side, -1)
  return jnp.concatenate([places[:1], grid])


def _cubic(known: int, side: int) -> np.ndarray:
  """Rows of factors by which `known` numbers in a line become `side`. float32 [side, known].

  The step from one to the next is known / (side + 0.1), as the published network has it. Beyond
  the ends the last number is repeated.
  """
  centre = (np.arange(side) + 0.5) * known / (side + _OFFSET) - 0.5
  matrix = np.zeros((side, known))
  for tap in range(-1, 3):
    index = np.floor(centre).astype(int) + tap
    factor = _cubic_filter(np.abs(centre - index))
    np.add.at(matrix, (np.arange(side), np.clip(index, 0, known - 1)), factor)
  return matrix.astype(np.float32)


def _cubic_filter(distance: np.ndarray) -> np.ndarray:
  """Keys, "Cubic convolution interpolation for digital image processing", 1981."""
  a, t = _SHARPNESS, distance
  near = (a + 2) * t**3 - (a + 3) * t**2 + 1
  far = a * (t**3 - 5 * t**2 + 8 * t - 4)
  return np.where(t <= 1, near, np.where(t < 2, far, 0.0))
