"""DINOv2 with random weights against NumPy and PyTorch, its places, and files that are none."""

import jax
import numpy as np
import pytest
import safetensors.numpy
from scipy import special

from memdiff.errors import DataError
from memdiff.evaluation import dinov2

WIDTH, BLOCKS, HEADS = 384, 12, 6  # of vits14
KNOWN = 3  # patches along a side of the grid whose places the file holds


def random_state_dict(seed=0, width=WIDTH, blocks=BLOCKS):
  rng = np.random.default_rng(seed)

  def matrix(*shape):
    return rng.standard_normal(shape, np.float32) * np.prod(shape[1:]) ** -0.5

  def vector(size, centre=0.0):
    return centre + 0.2 * rng.standard_normal(size, np.float32)

  arrays = {
    "cls_token": vector((1, 1, width)),
    "pos_embed": vector((1, 1 + KNOWN**2, width)),
    "mask_token": vector((1, width)),
    "patch_embed.proj.weight": matrix(width, 3, 14, 14),
    "patch_embed.proj.bias": vector(width),
    "norm.weight": vector(width, 1),
    "norm.bias": vector(width),
  }
  for i in range(blocks):
    p = f"blocks.{i}."
    for name in ("norm1", "norm2"):
      arrays[f"{p}{name}.weight"], arrays[f"{p}{name}.bias"] = vector(width, 1), vector(width)
    for name in ("ls1", "ls2"):
      arrays[f"{p}{name}.gamma"] = vector(width, 0.5)
    for name, out, inside in (
      ("attn.qkv", 3 * width, width),
      ("attn.proj", width, width),
      ("mlp.fc1", 4 * width, width),
      ("mlp.fc2", width, 4 * width),
    ):
      arrays[f"{p}{name}.weight"], arrays[f"{p}{name}.bias"] = matrix(out, inside), vector(out)
  return {name: np.asarray(array, np.float32) for name, array in arrays.items()}


def save(path, arrays):
  safetensors.numpy.save_file(arrays, path)
  return str(path)


def cubic(t):
  t = abs(t)
  if t <= 1:
    return 1.25 * t**3 - 2.25 * t**2 + 1
  return -0.75 * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


def numpy_places(grid, side):
  """[n, n, D] -> [side, side, D], number by number."""
  known, step = len(grid), len(grid) / (side + 0.1)
  out = np.zeros((side, side, grid.shape[-1]))
  for a in range(side):
    for b in range(side):
      y, x = (a + 0.5) * step - 0.5, (b + 0.5) * step - 0.5
      for i in range(int(np.floor(y)) - 1, int(np.floor(y)) + 3):
        for j in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
          place = grid[min(max(i, 0), known - 1), min(max(j, 0), known - 1)]
          out[a, b] += cubic(y - i) * cubic(x - j) * place
  return out


def numpy_features(arrays, image):
  """uint8 [S, S, 3] -> [D]."""

  def norm(x, name):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * arrays[f"{name}.weight"] + arrays[f"{name}.bias"]

  def linear(x, name):
    return x @ arrays[f"{name}.weight"].T + arrays[f"{name}.bias"]

  x = (image / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
  side, tokens = len(image) // 14, [arrays["cls_token"][0, 0]]
  for a in range(side):
    for b in range(side):
      patch = x[14 * a : 14 * a + 14, 14 * b : 14 * b + 14].transpose(2, 0, 1)
      kernel = arrays["patch_embed.proj.weight"]
      tokens.append((kernel * patch).sum(axis=(1, 2, 3)) + arrays["patch_embed.proj.bias"])
  grid = arrays["pos_embed"][0, 1:].reshape(KNOWN, KNOWN, -1)
  grid = grid if side == KNOWN else numpy_places(grid, side)
  x = np.stack(tokens) + np.concatenate([arrays["pos_embed"][0, :1], grid.reshape(side**2, -1)])
  for i in range(BLOCKS):
    p = f"blocks.{i}."
    query, key, value = (
      linear(norm(x, f"{p}norm1"), f"{p}attn.qkv").reshape(-1, 3, HEADS, 64).swapaxes(0, 1)
    )
    scores = np.einsum("qhd,khd->hqk", query, key) / 8
    attention = special.softmax(scores, axis=-1)
    y = np.einsum("hqk,khd->qhd", attention, value).reshape(x.shape)
    x = x + linear(y, f"{p}attn.proj") * arrays[f"{p}ls1.gamma"]
    y = linear(norm(x, f"{p}norm2"), f"{p}mlp.fc1")
    y = y * (1 + special.erf(y / np.sqrt(2))) / 2
    x = x + linear(y, f"{p}mlp.fc2") * arrays[f"{p}ls2.gamma"]
  return norm(x, "norm")[0]


def torch_features(arrays, image):
  """The same by PyTorch's own functions."""
  torch = pytest.importorskip("torch")
  functional, w = torch.nn.functional, {n: torch.from_numpy(a) for n, a in arrays.items()}

  def norm(x, name):
    return functional.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

  def linear(x, name):
    return functional.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

  x = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
  x = (x - torch.tensor([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1)) / torch.tensor(
    [0.229, 0.224, 0.225]
  ).reshape(1, 3, 1, 1)
  x = functional.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=14)
  places, side = w["pos_embed"], x.shape[-1]
  if side != KNOWN:
    grid = places[:, 1:].reshape(1, KNOWN, KNOWN, WIDTH).permute(0, 3, 1, 2)
    scale = (side + 0.1) / KNOWN
    grid = functional.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    assert grid.shape[-2:] == (side, side)
    places = torch.cat([places[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
  x = torch.cat([w["cls_token"], x.flatten(2).transpose(1, 2)], dim=1) + places
  for i in range(BLOCKS):
    p = f"blocks.{i}."
    qkv = linear(norm(x, f"{p}norm1"), f"{p}attn.qkv").reshape(1, -1, 3, HEADS, 64)
    y = functional.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
    x = x + w[f"{p}ls1.gamma"] * linear(y.transpose(1, 2).flatten(2), f"{p}attn.proj")
    y = functional.gelu(linear(norm(x, f"{p}norm2"), f"{p}mlp.fc1"))
    x = x + w[f"{p}ls2.gamma"] * linear(y, f"{p}mlp.fc2")
  return norm(x, "norm")[0, 0].numpy()


@pytest.fixture(scope="module")
def network(tmp_path_factory):
  arrays = random_state_dict()
  path = save(tmp_path_factory.mktemp("net") / "net.safetensors", arrays)
  return arrays, dinov2.load(path)


@pytest.mark.parametrize("expected", [numpy_features, torch_features], ids=["numpy", "torch"])
@pytest.mark.parametrize("side", [28, 42, 70])
def test_features_are_those_of_the_layers_one_by_one(network, side, expected):
  arrays, weights = network
  images = np.random.default_rng(1).integers(0, 256, (2, side, side, 3)).astype(np.uint8)
  found = jax.jit(dinov2.features)(weights, images)
  assert found.shape == (2, WIDTH) and found.dtype == np.float32
  for image, features in zip(images, found, strict=True):
    np.testing.assert_allclose(features, expected(arrays, image), rtol=1e-3, atol=1e-3)


def test_places_of_the_published_grid_are_interpolated_as_by_pytorch():
  torch = pytest.importorskip("torch")
  places = np.random.default_rng(2).normal(size=(1 + 37**2, 4)).astype(np.float32)
  grid = torch.from_numpy(places[1:].reshape(1, 37, 37, 4)).permute(0, 3, 1, 2)
  scale = (16.1 / 37, 16.1 / 37)
  grid = torch.nn.functional.interpolate(grid, scale_factor=scale, mode="bicubic")
  expected = grid[0].permute(1, 2, 0).reshape(256, 4).numpy()
  found = dinov2._places(jax.numpy.asarray(places), 16)
  np.testing.assert_allclose(found, np.concatenate([places[:1], expected]), atol=2e-5)


def test_places_of_the_same_grid_stay_as_they_are():
  places = np.random.default_rng(3).normal(size=(17, 4)).astype(np.float32)
  np.testing.assert_array_equal(dinov2._places(jax.numpy.asarray(places), 4), places)


@pytest.mark.parametrize(
  ("width", "number"), [(384, 22_056_576), (768, 86_580_480), (1024, 304_368_640)]
)
def test_the_networks_have_the_published_numbers_of_weights(width, number):
  shapes = dinov2._shapes(width, 1 + 37**2)
  mask_token = width  # is there, but for training alone
  assert sum(int(np.prod(shape)) for shape in shapes.values()) + mask_token == number


def wider(arrays):
  arrays["pos_embed"] = np.zeros((1, 10, 1536), np.float32)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (lambda a: a.pop("blocks.7.attn.qkv.bias"), "has no array blocks.7.attn.qkv.bias"),
    (lambda a: a.pop("pos_embed"), "has no array pos_embed"),
    (wider, r"\(1, 10, 1536\); the networks that are known have \(1, tokens, 384, 768 or 1024\)"),
    (lambda a: a.update(pos_embed=a["pos_embed"][:, :-1]), "places of 8 patches"),
    (lambda a: a.update(register_tokens=a["cls_token"]), "a DINOv2 with registers"),
    (lambda a: a.update(cls_token=a["cls_token"][0]), r"cls_token of the shape \(1, 384\)"),
  ],
)
def test_another_network_is_refused(change, words, network, tmp_path):
  arrays = dict(network[0])
  change(arrays)
  with pytest.raises(DataError, match=words) as caught:
    dinov2.load(save(tmp_path / "net.safetensors", arrays))
  assert "\n" not in str(caught.value)
