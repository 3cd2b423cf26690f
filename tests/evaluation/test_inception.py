"""The Inception of FID with random weights against NumPy and PyTorch, and its single parts."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from memdiff.errors import DataError
from memdiff.evaluation import inception
from tests.evaluation import torch_writer
from tests.evaluation.torch_writer import view

# Name of a layer, outputs, inputs, height and width of its kernel; blocks have a prefix.
STEM = """
Conv2d_1a_3x3 32 3 3 3
Conv2d_2a_3x3 32 32 3 3
Conv2d_2b_3x3 64 32 3 3
Conv2d_3b_1x1 80 64 1 1
Conv2d_4a_3x3 192 80 3 3"""
OF_35 = """
branch1x1 64 {n} 1 1
branch5x5_1 48 {n} 1 1
branch5x5_2 64 48 5 5
branch3x3dbl_1 64 {n} 1 1
branch3x3dbl_2 96 64 3 3
branch3x3dbl_3 96 96 3 3
branch_pool {k} {n} 1 1"""
TO_17 = """
branch3x3 384 288 3 3
branch3x3dbl_1 64 288 1 1
branch3x3dbl_2 96 64 3 3
branch3x3dbl_3 96 96 3 3"""
OF_17 = """
branch1x1 192 768 1 1
branch7x7_1 {k} 768 1 1
branch7x7_2 {k} {k} 1 7
branch7x7_3 192 {k} 7 1
branch7x7dbl_1 {k} 768 1 1
branch7x7dbl_2 {k} {k} 7 1
branch7x7dbl_3 {k} {k} 1 7
branch7x7dbl_4 {k} {k} 7 1
branch7x7dbl_5 192 {k} 1 7
branch_pool 192 768 1 1"""
TO_8 = """
branch3x3_1 192 768 1 1
branch3x3_2 320 192 3 3
branch7x7x3_1 192 768 1 1
branch7x7x3_2 192 192 1 7
branch7x7x3_3 192 192 7 1
branch7x7x3_4 192 192 3 3"""
OF_8 = """
branch1x1 320 {n} 1 1
branch3x3_1 384 {n} 1 1
branch3x3_2a 384 384 1 3
branch3x3_2b 384 384 3 1
branch3x3dbl_1 448 {n} 1 1
branch3x3dbl_2 384 448 3 3
branch3x3dbl_3a 384 384 1 3
branch3x3dbl_3b 384 384 3 1
branch_pool 192 {n} 1 1"""
LAYERS = {
  "": STEM,
  "Mixed_5b.": OF_35.format(n=192, k=32),
  "Mixed_5c.": OF_35.format(n=256, k=64),
  "Mixed_5d.": OF_35.format(n=288, k=64),
  "Mixed_6a.": TO_17,
  "Mixed_6b.": OF_17.format(k=128),
  "Mixed_6c.": OF_17.format(k=160),
  "Mixed_6d.": OF_17.format(k=160),
  "Mixed_6e.": OF_17.format(k=192),
  "Mixed_7a.": TO_8,
  "Mixed_7b.": OF_8.format(n=1280),
  "Mixed_7c.": OF_8.format(n=2048),
}
# Published: 21,785,568 with scales and shifts of batch norm, here folded into one bias per output.
NUM_WEIGHTS = 21_785_568 - 17_216 + 1008 * 2048


def random_state_dict(seed=0):
  rng, arrays = np.random.default_rng(seed), {}
  for prefix, lines in LAYERS.items():
    for line in lines.split("\n")[1:]:
      name, *shape = line.split()
      out, inside, height, width = map(int, shape)
      kernel = rng.standard_normal((out, inside, height, width), np.float32)
      arrays[f"{prefix}{name}.conv.weight"] = kernel * (inside * height * width) ** -0.5
      arrays[f"{prefix}{name}.bn.weight"] = rng.uniform(1.0, 1.6, out)
      arrays[f"{prefix}{name}.bn.bias"] = rng.normal(size=out) * 0.3
      arrays[f"{prefix}{name}.bn.running_mean"] = rng.normal(size=out) * 0.1
      arrays[f"{prefix}{name}.bn.running_var"] = rng.uniform(0.5, 1.5, out)
      arrays[f"{prefix}{name}.bn.num_batches_tracked"] = np.array(7)
  arrays["fc.weight"] = rng.standard_normal((1008, 2048), np.float32) * 0.1
  arrays["fc.bias"] = rng.normal(size=1008)
  return {name: np.asarray(array, np.float32) for name, array in arrays.items()}


def save(path, arrays):
  safetensors.numpy.save_file({n: np.ascontiguousarray(a) for n, a in arrays.items()}, path)
  return str(path)


def resized(image, side=299):
  """[H, W, ch] -> [side, side, ch] pixel by pixel; the pixel i of `side` lies at i * H / side."""
  height, width = image.shape[:2]
  out = np.empty((side, side, image.shape[-1]))
  for i in range(side):
    for j in range(side):
      y, x = i * height / side, j * width / side
      top, left = int(y), int(x)
      bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
      upper = image[top, left] * (1 - x + left) + image[top, right] * (x - left)
      lower = image[bottom, left] * (1 - x + left) + image[bottom, right] * (x - left)
      out[i, j] = upper * (1 - y + top) + lower * (y - top)
  return out


def windows(x, size, stride, padding, fill):
  """[ch, H, W] -> [ch, h, w, *size]."""
  x = np.pad(x, [(0, 0), *((p, p) for p in padding)], constant_values=fill)
  found = np.lib.stride_tricks.sliding_window_view(x, size, (1, 2))
  return found[:, ::stride, ::stride]


def numpy_convolve(x, kernel, stride, padding):
  found = windows(x, kernel.shape[2:], stride, padding, 0)
  rows = found.transpose(1, 2, 0, 3, 4).reshape(found.shape[1] * found.shape[2], -1)
  return (rows @ kernel.reshape(len(kernel), -1).T).T.reshape(len(kernel), *found.shape[1:3])


def numpy_max(x, stride, padding):
  return windows(x, (3, 3), stride, (padding, padding), -np.inf).max(axis=(3, 4))


def numpy_mean(x):
  return np.nanmean(windows(x, (3, 3), 1, (1, 1), np.nan), axis=(3, 4))


IN_NUMPY = types.SimpleNamespace(convolve=numpy_convolve, max=numpy_max, mean=numpy_mean)


def in_torch():
  """The same operations by PyTorch."""
  torch = pytest.importorskip("torch")
  functional = torch.nn.functional

  def by_torch(function):
    def call(x, *rest):
      return function(torch.from_numpy(np.ascontiguousarray(x))[None], *rest)[0].numpy()

    return call

  return types.SimpleNamespace(
    convolve=by_torch(
      lambda x, kernel, stride, padding: functional.conv2d(
        x, torch.from_numpy(kernel), None, stride, padding
      )
    ),
    max=by_torch(lambda x, stride, padding: functional.max_pool2d(x, 3, stride, padding)),
    mean=by_torch(lambda x: functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)),
  )


def expected_features(arrays, image, do):
  """uint8 [H, W, 3] -> [2048], written layer by layer with the operations of `do`."""

  def layer(x, name, stride=1, padding=(0, 0)):
    x = do.convolve(x, arrays[f"{name}.conv.weight"], stride, padding)
    scale, bias, mean, variance = (
      arrays[f"{name}.bn.{part}"][:, None, None]
      for part in ("weight", "bias", "running_mean", "running_var")
    )
    return np.maximum((x - mean) / np.sqrt(variance + np.float32(1e-3)) * scale + bias, 0)

  def chain(x, prefix, *steps):
    for name, *options in steps:
      x = layer(x, f"{prefix}.{name}", *options)
    return x

  def of_35(x, p):
    return np.concatenate([
      chain(x, p, ("branch1x1",)),
      chain(x, p, ("branch5x5_1",), ("branch5x5_2", 1, (2, 2))),
      chain(x, p, ("branch3x3dbl_1",), ("branch3x3dbl_2", 1, (1, 1)),
            ("branch3x3dbl_3", 1, (1, 1))),
      chain(do.mean(x), p, ("branch_pool",)),
    ])  # fmt: skip

  def of_17(x, p):
    row, column = (1, (0, 3)), (1, (3, 0))
    return np.concatenate([
      chain(x, p, ("branch1x1",)),
      chain(x, p, ("branch7x7_1",), ("branch7x7_2", *row), ("branch7x7_3", *column)),
      chain(x, p, ("branch7x7dbl_1",), ("branch7x7dbl_2", *column), ("branch7x7dbl_3", *row),
            ("branch7x7dbl_4", *column), ("branch7x7dbl_5", *row)),
      chain(do.mean(x), p, ("branch_pool",)),
    ])  # fmt: skip

  def of_8(x, p, pooled):
    row, column = (1, (0, 1)), (1, (1, 0))
    single = chain(x, p, ("branch3x3_1",))
    double = chain(x, p, ("branch3x3dbl_1",), ("branch3x3dbl_2", 1, (1, 1)))
    return np.concatenate([
      chain(x, p, ("branch1x1",)),
      chain(single, p, ("branch3x3_2a", *row)), chain(single, p, ("branch3x3_2b", *column)),
      chain(double, p, ("branch3x3dbl_3a", *row)), chain(double, p, ("branch3x3dbl_3b", *column)),
      chain(pooled, p, ("branch_pool",)),
    ])  # fmt: skip

  x = ((resized(image.astype(float)) - 128) / 128).transpose(2, 0, 1).astype(np.float32)
  x = layer(layer(x, "Conv2d_1a_3x3", 2), "Conv2d_2a_3x3")
  x = do.max(layer(x, "Conv2d_2b_3x3", 1, (1, 1)), 2, 0)
  x = do.max(layer(layer(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3"), 2, 0)
  for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
    x = of_35(x, name)
  x = np.concatenate([
    chain(x, "Mixed_6a", ("branch3x3", 2)),
    chain(x, "Mixed_6a", ("branch3x3dbl_1",), ("branch3x3dbl_2", 1, (1, 1)),
          ("branch3x3dbl_3", 2)),
    do.max(x, 2, 0),
  ])  # fmt: skip
  for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
    x = of_17(x, name)
  x = np.concatenate([
    chain(x, "Mixed_7a", ("branch3x3_1",), ("branch3x3_2", 2)),
    chain(x, "Mixed_7a", ("branch7x7x3_1",), ("branch7x7x3_2", 1, (0, 3)),
          ("branch7x7x3_3", 1, (3, 0)), ("branch7x7x3_4", 2)),
    do.max(x, 2, 0),
  ])  # fmt: skip
  x = of_8(x, "Mixed_7b", do.mean(x))
  return of_8(x, "Mixed_7c", do.max(x, 1, 1)).mean(axis=(1, 2))


@pytest.fixture(scope="module")
def network(tmp_path_factory):
  arrays = random_state_dict()
  path = save(tmp_path_factory.mktemp("net") / "net.safetensors", arrays)
  return arrays, inception.load(path)


@pytest.fixture(scope="module")
def judged(network):
  """(image, its features)."""
  image = np.random.default_rng(1).integers(0, 256, (1, 32, 32, 3)).astype(np.uint8)
  found = jax.jit(inception.features)(network[1], image)
  assert found.shape == (1, inception.FEATURES) and found.dtype == np.float32
  return image[0], found[0]


@pytest.mark.parametrize("operations", [lambda: IN_NUMPY, in_torch], ids=["numpy", "torch"])
def test_features_are_those_of_the_layers_one_by_one(network, judged, operations):
  image, found = judged
  expected = expected_features(network[0], image, operations())
  assert expected.std() > 0.01
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * expected.max())


def test_probabilities_take_the_last_layer_without_its_bias(network):
  arrays, weights = network
  features = np.random.default_rng(2).uniform(size=(3, 2048)).astype(np.float32)
  logits = features @ arrays["fc.weight"].T
  expected = np.exp(logits - logits.max(axis=1, keepdims=True))
  found = inception.probabilities(weights, features)
  np.testing.assert_allclose(found, expected / expected.sum(axis=1, keepdims=True), atol=1e-5)


def test_the_network_has_the_published_number_of_weights(network):
  assert sum(x.size for x in network[1].values()) == NUM_WEIGHTS


@pytest.mark.parametrize("shape", [(32, 32), (7, 400), (299, 299)])
def test_images_are_resized_from_the_corner_without_smoothing(shape):
  image = np.random.default_rng(3).uniform(0, 255, (*shape, 2)).astype(np.float32)
  found = inception._resize(jnp.asarray(image)[None])[0]
  np.testing.assert_allclose(found, resized(image), atol=2e-2)
  np.testing.assert_array_equal(found[0, 0], image[0, 0])


def test_a_mean_at_the_border_is_one_of_the_pixels_that_exist():
  x = np.random.default_rng(4).normal(size=(1, 4, 5, 2)).astype(np.float32)
  found = inception._mean(jnp.asarray(x))
  for i in range(4):
    for j in range(5):
      near = x[0, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
      np.testing.assert_allclose(found[0, i, j], near.mean(axis=(0, 1)), rtol=1e-5, atol=1e-6)


def test_the_published_file_is_read_as_it_is(network, tmp_path):
  arrays, weights = network
  tensors = {name: view(str(i), array) for i, (name, array) in enumerate(arrays.items())}
  torch_writer.write(tmp_path / "net.pth", tensors, zipped=True)
  found = inception.load(str(tmp_path / "net.pth"))
  jax.tree.map(np.testing.assert_array_equal, found, weights)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (lambda a: a.pop("Mixed_6c.branch7x7_2.conv.weight"), "no array Mixed_6c.branch7x7_2.conv.w"),
    (lambda a: a.update({"fc.weight": np.zeros((1000, 2048), np.float32)}), r"\(1000, 2048\)"),
    (lambda a: a["Mixed_7a.branch3x3_1.bn.bias"].fill(np.nan), "bn.bias that are not finite"),
  ],
)
def test_another_network_is_refused(change, words, network, tmp_path):
  arrays = {name: array.copy() if array.ndim < 2 else array for name, array in network[0].items()}
  change(arrays)
  with pytest.raises(DataError, match=words) as caught:
    inception.load(save(tmp_path / "net.safetensors", arrays))
  assert "\n" not in str(caught.value)


def test_a_torn_file_is_refused(tmp_path):
  (tmp_path / "net.safetensors").write_bytes(b"torn")
  with pytest.raises(DataError, match=r"Cannot read .* as a .safetensors file"):
    inception.load(str(tmp_path / "net.safetensors"))
