"""The Inception network of the Fréchet Inception distance, as features of images.

Szegedy et al., "Rethinking the Inception architecture for computer vision", 2016, in the version
of 2015-12-05 that Heusel et al., "GANs trained by a two time-scale update rule", 2017, took for
FID. It differs from later ones: means over 3 x 3 pixels leave out the border, the last block takes
maxima in their place, there are 1008 classes, and images are enlarged by the bilinear filter of
TensorFlow 1, whose pixels lie at their corners. The names of the arrays are those of the conversion
to PyTorch, pt_inception-2015-12-05-6726825d.pth.
"""

import dataclasses
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from memdiff.evaluation import weight_files

FEATURES, CLASSES, SIDE = 2048, 1008, 299
_EPSILON = 1e-3  # of batch norm
_NEEDED = "pt_inception-2015-12-05-6726825d.pth of pytorch-fid, as it is or as .safetensors,"


@dataclasses.dataclass(frozen=True)
class _Layer:
  """A convolution without bias, batch norm, ReLU."""

  name: str
  out: int
  kernel: tuple[int, int] = (1, 1)  # height, width
  stride: int = 1
  padding: str = "SAME"


# A step of a branch: a layer, layers side by side whose outputs are joined, or a pool by its name.
_Step = _Layer | tuple[_Layer, ...] | str
_MEAN, _MAX, _HALVE = "mean", "max", "halve"
_Block = tuple[tuple[_Step, ...], ...]  # branches


def _of_35(pooled: int) -> _Block:
  """A block on 35 x 35 pixels."""
  return (
    (_Layer("branch1x1", 64),),
    (_Layer("branch5x5_1", 48), _Layer("branch5x5_2", 64, (5, 5))),
    (
      _Layer("branch3x3dbl_1", 64),
      _Layer("branch3x3dbl_2", 96, (3, 3)),
      _Layer("branch3x3dbl_3", 96, (3, 3)),
    ),
    (_MEAN, _Layer("branch_pool", pooled)),
  )


def _of_17(inner: int) -> _Block:
  """A block on 17 x 17 pixels."""
  row, column = (1, 7), (7, 1)
  return (
    (_Layer("branch1x1", 192),),
    (
      _Layer("branch7x7_1", inner),
      _Layer("branch7x7_2", inner, row),
      _Layer("branch7x7_3", 192, column),
    ),
    (
      _Layer("branch7x7dbl_1", inner),
      _Layer("branch7x7dbl_2", inner, column),
      _Layer("branch7x7dbl_3", inner, row),
      _Layer("branch7x7dbl_4", inner, column),
      _Layer("branch7x7dbl_5", 192, row),
    ),
    (_MEAN, _Layer("branch_pool", 192)),
  )


def _of_8(pool: str) -> _Block:
  """A block on 8 x 8 pixels."""

  def fork(name: str) -> tuple[_Layer, ...]:
    return _Layer(f"{name}a", 384, (1, 3)), _Layer(f"{name}b", 384, (3, 1))

  return (
    (_Layer("branch1x1", 320),),
    (_Layer("branch3x3_1", 384), fork("branch3x3_2")),
    (_Layer("branch3x3dbl_1", 448), _Layer("branch3x3dbl_2", 384, (3, 3)), fork("branch3x3dbl_3")),
    (pool, _Layer("branch_pool", 192)),
  )


_STEM: tuple[_Step, ...] = (
  _Layer("Conv2d_1a_3x3", 32, (3, 3), 2, "VALID"),
  _Layer("Conv2d_2a_3x3", 32, (3, 3), 1, "VALID"),
  _Layer("Conv2d_2b_3x3", 64, (3, 3)),
  _HALVE,
  _Layer("Conv2d_3b_1x1", 80),
  _Layer("Conv2d_4a_3x3", 192, (3, 3), 1, "VALID"),
  _HALVE,
)
_TO_17: _Block = (
  (_Layer("branch3x3", 384, (3, 3), 2, "VALID"),),
  (
    _Layer("branch3x3dbl_1", 64),
    _Layer("branch3x3dbl_2", 96, (3, 3)),
    _Layer("branch3x3dbl_3", 96, (3, 3), 2, "VALID"),
  ),
  (_HALVE,),
)
_TO_8: _Block = (
  (_Layer("branch3x3_1", 192), _Layer("branch3x3_2", 320, (3, 3), 2, "VALID")),
  (
    _Layer("branch7x7x3_1", 192),
    _Layer("branch7x7x3_2", 192, (1, 7)),
    _Layer("branch7x7x3_3", 192, (7, 1)),
    _Layer("branch7x7x3_4", 192, (3, 3), 2, "VALID"),
  ),
  (_HALVE,),
)
_BLOCKS: dict[str, _Block] = {
  "Mixed_5b": _of_35(32),
  "Mixed_5c": _of_35(64),
  "Mixed_5d": _of_35(64),
  "Mixed_6a": _TO_17,
  "Mixed_6b": _of_17(128),
  "Mixed_6c": _of_17(160),
  "Mixed_6d": _of_17(160),
  "Mixed_6e": _of_17(192),
  "Mixed_7a": _TO_8,
  "Mixed_7b": _of_8(_MEAN),
  "Mixed_7c": _of_8(_MAX),
}


def weights_path(path: str = "") -> str:
  """`path`; no package brings the weights.

  Raises:
    DataError: if there is no such file.
  """
  return weight_files.given(path, "inception_fid", _NEEDED)


def load(path: str) -> dict[str, jax.Array]:
  """The network's convolutions with batch norm folded into them, and its last layer's kernel.

  Raises:
    DataError: if an array is missing, of another shape, or not finite.
  """
  shapes = _shapes()
  arrays = weight_files.fitting(path, weight_files.read(path), shapes, "the Inception of FID")
  weights = {"fc/kernel": arrays["fc.weight"].T}
  for name in shapes:
    if name.endswith(".conv.weight"):
      layer = name.removesuffix(".conv.weight")
      norm = f"{layer}.bn"
      scale = arrays[f"{norm}.weight"] / np.sqrt(arrays[f"{norm}.running_var"] + _EPSILON)
      kernel = arrays[name] * scale[:, None, None, None]  # OIHW
      weights[f"{layer}/kernel"] = kernel.transpose(2, 3, 1, 0)
      weights[f"{layer}/bias"] = arrays[f"{norm}.bias"] - arrays[f"{norm}.running_mean"] * scale
  return jax.tree.map(jnp.asarray, weights)


def _shapes() -> dict[str, tuple[int, ...]]:
  """Of the arrays that the file must hold."""
  shapes = {}
  for name, inside, layer in _layers():
    shapes[f"{name}.conv.weight"] = (layer.out, inside, *layer.kernel)
    for array in ("weight", "bias", "running_mean", "running_var"):
      shapes[f"{name}.bn.{array}"] = (layer.out,)
  return shapes | {"fc.weight": (CLASSES, FEATURES)}


def _layers() -> Iterator[tuple[str, int, _Layer]]:
  """(name in the file, channels that go in, layer) of every layer."""
  channels = 3
  for prefix, block in [("", (_STEM,)), *((f"{name}.", x) for name, x in _BLOCKS.items())]:
    joined = 0
    for branch in block:
      inside = channels
      for step in branch:
        if not isinstance(step, str):
          layers = step if isinstance(step, tuple) else (step,)
          yield from ((f"{prefix}{layer.name}", inside, layer) for layer in layers)
          inside = sum(layer.out for layer in layers)
      joined += inside
    channels = joined


def features(weights: Mapping[str, jax.Array], images: jax.Array) -> jax.Array:
  """uint8 RGB [N, H, W, 3] -> float32 [N, 2048], means over the last block's pixels."""
  x = (_resize(images.astype(jnp.float32)) - 128.0) / 128.0
  x = _branch(weights, "", _STEM, x)
  for name, block in _BLOCKS.items():
    x = jnp.concatenate([_branch(weights, f"{name}.", b, x) for b in block], axis=-1)
  return x.mean(axis=(1, 2))


def probabilities(weights: Mapping[str, jax.Array], features: jax.Array) -> jax.Array:
  """Of the 1008 classes, without the last layer's bias, as the Inception score has it.

  [N, 2048] -> [N, 1008].
  """
  return jax.nn.softmax(features @ weights["fc/kernel"])


def _resize(images: jax.Array) -> jax.Array:
  """[N, H, W, ch] -> [N, 299, 299, ch]: bilinear, without smoothing, as TensorFlow 1 does it."""
  for axis in (1, 2):
    place = np.arange(SIDE) * (images.shape[axis] / SIDE)  # not (i + 1/2) * ... - 1/2
    low = place.astype(int)
    high = np.minimum(low + 1, images.shape[axis] - 1)
    share = np.expand_dims((place - low).astype(np.float32), [d for d in range(4) if d != axis])
    below, above = (jnp.take(images, index, axis=axis) for index in (low, high))
    images = below + (above - below) * share
  return images


def _branch(
  weights: Mapping[str, jax.Array], prefix: str, steps: tuple[_Step, ...], x: jax.Array
) -> jax.Array:
  for step in steps:
    if isinstance(step, str):
      x = _POOLS[step](x)
    elif isinstance(step, tuple):
      x = jnp.concatenate([_convolve(weights, prefix, layer, x) for layer in step], axis=-1)
    else:
      x = _convolve(weights, prefix, step, x)
  return x


def _convolve(
  weights: Mapping[str, jax.Array], prefix: str, layer: _Layer, x: jax.Array
) -> jax.Array:
  y = jax.lax.conv_general_dilated(
    x,
    weights[f"{prefix}{layer.name}/kernel"],
    (layer.stride, layer.stride),
    layer.padding,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  return jax.nn.relu(y + weights[f"{prefix}{layer.name}/bias"][None, None, None])


def _mean(x: jax.Array) -> jax.Array:
  """Over 3 x 3 pixels; at the border over those that exist."""
  number = _pool(jnp.ones((1, *x.shape[1:3], 1)), 0.0, jax.lax.add)
  return _pool(x, 0.0, jax.lax.add) / number


def _pool(x: jax.Array, start: float, combine, stride: int = 1, padding: str = "SAME") -> jax.Array:
  return jax.lax.reduce_window(x, start, combine, (1, 3, 3, 1), (1, stride, stride, 1), padding)


_POOLS = {
  _MEAN: _mean,
  _MAX: lambda x: _pool(x, -jnp.inf, jax.lax.max),
  _HALVE: lambda x: _pool(x, -jnp.inf, jax.lax.max, 2, "VALID"),
}
