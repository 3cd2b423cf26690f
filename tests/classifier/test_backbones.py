"""Backbones against the published sizes, and against a forward pass written out in NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memdiff.classifier import backbones
from memdiff.classifier.backbones import Architecture, BackboneConfig, ResNet
from memdiff.config import build
from memdiff.contrastive import unit_length
from memdiff.errors import ConfigError

CIFAR = ["resnet8", "resnet20", "resnet32", "resnet44", "resnet56"]


def config_of(name, taps=()):
  return BackboneConfig(name, "auto", 30.0, "float32", taps)


def shapes_of(name, num_classes, size, cosine=False, taps=()):
  """(model, variables, (logits, features)) without computing anything."""
  model = backbones.make_backbone(config_of(name, taps), num_classes, cosine=cosine)
  images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
  outputs, variables = jax.eval_shape(
    lambda x: model.init_with_output(jax.random.key(0), x, train=False), images
  )
  return model, variables, outputs


def number(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
  ("name", "millions"),
  [("resnet20", 0.27), ("resnet32", 0.46), ("resnet44", 0.66), ("resnet56", 0.85)],
)
def test_cifar_networks_have_the_sizes_of_the_paper(name, millions):
  """He et al. 2015, table 6; and convolutions, batch norms and head counted one by one."""
  params = number(shapes_of(name, 10, 32)[1]["params"])
  assert round(params / 1e6, 2) == millions
  blocks = (int(name.removeprefix("resnet")) - 2) // 6
  channels = [3, *[16] * (2 * blocks + 1), *[32] * (2 * blocks), *[64] * (2 * blocks)]
  layers = sum(9 * a * b + 2 * b for a, b in itertools.pairwise(channels))
  assert params == layers + 64 * 10 + 10


def test_resnet_32_has_exactly_this_many_parameters():
  assert number(shapes_of("resnet32", 10, 32)[1]["params"]) == 464154
  assert number(shapes_of("resnet32", 100, 32)[1]["params"]) == 464154 + 90 * 65
  assert number(shapes_of("resnet32", 10, 32, cosine=True)[1]["params"]) == 464154 - 10


@pytest.mark.parametrize(("name", "params"), [("resnet18", 11689512), ("resnet50", 25557032)])
def test_imagenet_networks_have_the_sizes_of_torchvision(name, params):
  variables = shapes_of(name, 1000, 224)[1]
  assert number(variables["params"]) == params


@pytest.mark.parametrize("name", backbones.BACKBONES)
def test_features_are_as_long_as_feature_dim_says(name):
  length = {"resnet50": 2048}.get(name, 64 if name in CIFAR else 512)
  assert backbones.feature_dim(config_of(name)) == length
  model, variables, (logits, features) = shapes_of(name, 7, 32)
  assert (logits.shape, features.shape) == ((2, 7), (2, length))
  assert logits.dtype == features.dtype == jnp.float32
  assert variables["params"]["head"]["kernel"].shape == (length, 7)
  assert len(variables["params"]) == 3 + sum(model.architecture.stage_sizes)


@pytest.mark.parametrize(
  ("name", "taps", "length"),
  [
    ("resnet32", ("2:2", "3:1"), 32 * 4 + 64),
    ("resnet32", ("1:8",), 16 * 64),
    ("resnet18", ("1:2", "4:1"), 64 * 4 + 512),
    ("resnet50", ("3:1", "2:2", "3:1"), 2 * 1024 + 512 * 4),
  ],
)
def test_features_of_inner_stages_are_as_long_as_feature_dim_says(name, taps, length):
  assert backbones.feature_dim(config_of(name, taps)) == length
  _, variables, (logits, features) = shapes_of(name, 7, 64, taps=taps)
  assert (logits.shape, features.shape) == ((2, 7), (2, length))
  assert features.dtype == jnp.float32
  assert variables["params"]["head"]["kernel"].shape == (backbones.BACKBONES[name].feature_dim, 7)


VALUES = {"name": "resnet20", "head": "auto", "scale": 30.0, "dtype": "float32", "taps": ()}


def test_an_unknown_network_is_refused_with_those_that_exist():
  with pytest.raises(ConfigError, match=r"'resnet31', but must be one of resnet8, resnet20, .*50"):
    build(BackboneConfig, VALUES | {"name": "resnet31"})


@pytest.mark.parametrize(
  ("taps", "words"),
  [
    (("2:2", "x"), "must be texts like 3:1"),
    (("2",), "must be texts like 3:1"),
    (("0:1",), "must be texts like 3:1"),
    (("2:0",), "must be texts like 3:1"),
    ((" 2:1",), "must be texts like 3:1"),
    (("3:1", "4:1"), "taps names stage 4, but resnet20 has 3"),
  ],
)
def test_taps_of_no_stage_are_refused(taps, words):
  with pytest.raises(ConfigError, match=words):
    build(BackboneConfig, VALUES | {"taps": taps})
  assert build(BackboneConfig, VALUES | {"taps": ("2:2", "3:1")}).taps == ("2:2", "3:1")


# --- the CIFAR network in NumPy --------------------------------------------------------------

SMALL = Architecture((2, 1, 1), (4, 8, 16), for_small_images=True)


IMAGES = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)


def drawn(model):
  """Variables of the model with every number at random, batch statistics too."""
  variables = jax.eval_shape(lambda: model.init(jax.random.key(0), IMAGES, train=False))
  rng = np.random.default_rng(0)

  def draw(path, x):
    noise = rng.normal(size=x.shape) * 0.3
    value = noise if path[-1].key in ("kernel", "bias", "mean") else 1 + abs(noise)
    return value.astype(x.dtype)

  return jax.tree_util.tree_map_with_path(draw, variables)


def apply(model, variables, images, **options):
  """`model.apply`, compiled as one program."""
  return jax.jit(lambda v, x: model.apply(v, x, **options))(variables, images)


def convolve(x, kernel, stride=1):
  """3x3 with a border of zeros, one output pixel at a time."""
  padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  rows, columns = range(0, x.shape[1], stride), range(0, x.shape[2], stride)
  return np.stack([
    np.stack([np.einsum("bijc,ijcd->bd", padded[:, r : r + 3, c : c + 3], kernel)
              for c in columns], axis=1)
    for r in rows
  ], axis=1)  # fmt: skip


def forward(variables, images):
  """(logits, features, [output of each stage]) of SMALL in evaluation mode."""
  params, statistics = variables["params"], variables["batch_stats"]

  def norm(x, *path):
    p, s = params, statistics
    for name in path:
      p, s = p[name], s[name]
    return (x - s["mean"]) / np.sqrt(s["var"] + 1e-5) * p["scale"] + p["bias"]

  x, stages = np.maximum(norm(convolve(images, params["conv1"]["kernel"]), "bn1"), 0), []
  for stage, (size, width) in enumerate(zip(SMALL.stage_sizes, SMALL.widths, strict=True)):
    for block in range(size):
      name, stride = f"layer{stage + 1}_{block}", 2 if stage > 0 and block == 0 else 1
      y = convolve(x, params[name]["conv1"]["kernel"], stride)
      y = np.maximum(norm(y, name, "bn1"), 0)
      y = norm(convolve(y, params[name]["conv2"]["kernel"]), name, "bn2")
      if stride == 2:  # option A: every other pixel, a quarter of the width in zeros on each side
        zeros = np.zeros((*y.shape[:3], width // 4))
        x = np.concatenate([zeros, x[:, ::2, ::2], zeros], axis=-1)
      x = np.maximum(x + y, 0)
    stages.append(x)
  features = x.mean(axis=(1, 2))
  return features @ params["head"]["kernel"] + params["head"]["bias"], features, stages


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 5)])
def test_the_cifar_network_is_that_of_the_paper_with_option_a(height, width):
  model = ResNet(3, SMALL)
  images = IMAGES[:, :height, :width]
  variables = drawn(model)
  assert not any("downsample" in block for block in variables["params"].values())
  made = apply(model, variables, images, train=False)
  *expected, _ = forward(jax.tree.map(lambda x: x.astype(np.float64), variables), images)
  for ours, theirs in zip(made, expected, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("taps", [("2:2", "3:1"), ("3:1", "2:2"), ("1:4",), ("3:2", "1:1", "3:2")])
def test_taps_average_what_their_stages_give_over_a_grid_row_by_row(taps, monkeypatch):
  """In the order of the taps; of each square all channels, squares from the upper left."""
  monkeypatch.setitem(backbones.BACKBONES, "resnet8", SMALL)
  model = backbones.make_backbone(config_of("resnet8", taps), 3, cosine=False)
  variables = drawn(model)
  logits, features = apply(model, variables, IMAGES, train=False)
  double = jax.tree.map(lambda x: x.astype(np.float64), variables)
  expected_logits, _, stages = forward(double, IMAGES)
  parts = []
  for text in taps:
    stage, grid = map(int, text.split(":"))
    x = stages[stage - 1]
    height, width = x.shape[1] // grid, x.shape[2] // grid
    parts += [
      x[:, r * height : (r + 1) * height, c * width : (c + 1) * width].mean(axis=(1, 2))
      for r in range(grid)
      for c in range(grid)
    ]
  np.testing.assert_allclose(features, np.concatenate(parts, axis=1), rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(logits, expected_logits, rtol=1e-4, atol=1e-4)  # of the last stage
  assert features.shape[1] == backbones.feature_dim(config_of("resnet8", taps))


@pytest.mark.parametrize(
  ("architecture", "size", "reduction"),
  [
    (SMALL, 16, 4),
    (Architecture((1, 1, 1, 1), (4, 4, 8, 8), False), 64, 32),
    (Architecture((1, 1, 1, 1), (4, 4, 8, 8), False, bottleneck=True), 64, 32),
  ],
)
def test_the_last_feature_map_is_this_much_smaller(architecture, size, reduction):
  model = ResNet(3, architecture)
  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)

  def blocks(x):
    _, state = model.init_with_output(
      jax.random.key(0), x, train=False, capture_intermediates=True, mutable=True
    )
    return state["intermediates"]

  shapes = {name: v["__call__"][0].shape for name, v in jax.eval_shape(blocks, images).items()
            if name.startswith("layer")}  # fmt: skip
  last = len(architecture.widths)
  assert shapes[f"layer{last}_0"] == (1, size // reduction, size // reduction,
                                      architecture.feature_dim)  # fmt: skip
  for stage in range(1, last):
    ratio = shapes[f"layer{stage}_0"][1] / shapes[f"layer{stage + 1}_0"][1]
    assert ratio == 2


def test_option_b_projects_where_the_shape_changes_and_only_there():
  def projected(name):
    params = shapes_of(name, 10, 32)[1]["params"]
    return {block for block, value in params.items() if "downsample" in value}

  assert projected("resnet18") == {"layer2_0", "layer3_0", "layer4_0"}
  assert projected("resnet50") == {"layer1_0", "layer2_0", "layer3_0", "layer4_0"}
  assert not projected("resnet20")


# --- batch norm ------------------------------------------------------------------------------


def normalized(x, dtype=jnp.float32):
  layer = backbones.batch_norm(True, dtype, "bn")
  variables = layer.init(jax.random.key(0), x)
  return layer.apply(variables, x, mutable=["batch_stats"])


@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_the_variance_is_that_of_numpy_even_far_from_zero(mean):
  """In float32, E[x^2] - E[x]^2 would lose every digit at 1000."""
  x = np.random.default_rng(0).normal(size=(16, 4, 4, 3)) * [1.0, 0.5, 2.0] + mean
  x = x.astype(np.float32)
  y, updates = normalized(jnp.asarray(x))
  exact = x.astype(np.float64)
  axes = (0, 1, 2)
  centred = (exact - exact.mean(axes)) / np.sqrt(exact.var(axes) + 1e-5)
  np.testing.assert_allclose(y, centred, rtol=2e-3, atol=2e-3)
  statistics = updates["batch_stats"]
  np.testing.assert_allclose(statistics["var"], 0.9 + 0.1 * exact.var(axes), rtol=1e-3)
  np.testing.assert_allclose(statistics["mean"], 0.1 * exact.mean(axes), rtol=1e-4, atol=1e-5)


def test_training_mode_uses_the_batch_and_evaluation_mode_the_running_statistics():
  model = ResNet(3, SMALL)
  variables = drawn(model)
  (train, _), updates = apply(model, variables, IMAGES, train=True, mutable=["batch_stats"])
  evaluated, _ = apply(model, variables, IMAGES, train=False)
  assert not np.allclose(train, evaluated, atol=1e-2)
  moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), variables["batch_stats"],
                       updates["batch_stats"])  # fmt: skip
  assert all(jax.tree.leaves(moved))
  other, _ = apply(model, variables, IMAGES * np.array([1, 2]).reshape(2, 1, 1, 1), train=False)
  np.testing.assert_allclose(other[0], evaluated[0], rtol=1e-4, atol=1e-4)
  assert not np.allclose(other[1], evaluated[1], atol=1e-2)


# --- types -----------------------------------------------------------------------------------


def test_bfloat16_computes_in_sixteen_bits_and_keeps_everything_else_in_float32():
  full, half = ResNet(3, SMALL), ResNet(3, SMALL, dtype=jnp.bfloat16)
  variables = drawn(half)
  (logits, features), state = apply(
    half, variables, IMAGES, train=True, mutable=["batch_stats", "intermediates"],
    capture_intermediates=True,
  )  # fmt: skip
  kept = jax.tree.leaves((variables, state["batch_stats"]))
  assert all(x.dtype == np.float32 for x in kept)
  assert logits.dtype == features.dtype == jnp.float32
  for name in ("conv1", "bn1", "layer1_0", "layer3_0"):
    assert state["intermediates"][name]["__call__"][0].dtype == jnp.bfloat16, name
  (expected, _), _ = apply(full, variables, IMAGES, train=True, mutable=["batch_stats"])
  assert not np.array_equal(logits, expected)
  np.testing.assert_allclose(logits, expected, rtol=0.1, atol=0.1)


def test_the_configured_type_and_scale_reach_the_network():
  for name, dtype in (("float32", jnp.float32), ("bfloat16", jnp.bfloat16)):
    config = BackboneConfig("resnet8", "auto", 12.0, name, ())
    linear, cosine = (backbones.make_backbone(config, 4, cosine=c) for c in (False, True))
    assert linear.dtype == cosine.dtype == dtype
    assert (linear.cosine_scale, cosine.cosine_scale) == (None, 12.0)


# --- the cosine head -------------------------------------------------------------------------


def test_a_cosine_head_is_scale_times_the_cosine():
  model = ResNet(5, SMALL, cosine_scale=16.0)
  variables = drawn(model)
  logits, features = apply(model, variables, IMAGES, train=False)
  kernel = np.asarray(variables["params"]["head"]["kernel"], np.float64)
  assert set(variables["params"]["head"]) == {"kernel"}
  for row, feature in zip(logits, np.asarray(features, np.float64), strict=True):
    for c in range(5):
      cosine = feature @ kernel[:, c] / np.linalg.norm(feature) / np.linalg.norm(kernel[:, c])
      assert float(row[c]) == pytest.approx(16 * cosine, abs=1e-4)


def test_weights_of_a_cosine_head_start_on_the_unit_sphere():
  head = backbones.CosineHead(7, 30.0)
  kernel = head.init(jax.random.key(0), jnp.ones((1, 12)))["params"]["kernel"]
  np.testing.assert_allclose(np.linalg.norm(kernel, axis=0), 1.0, rtol=1e-5)
  assert np.linalg.matrix_rank(kernel) == 7


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3))
def test_unit_length_is_one_or_zero(values):
  x = np.array([values], np.float32)
  length = float(np.linalg.norm(unit_length(jnp.asarray(x), 1)))
  if np.linalg.norm(x) > 1e-11:
    assert length == pytest.approx(1.0, abs=1e-5)
  else:
    assert length <= 1.0 + 1e-5
  for axis in (0, 1):
    turned = unit_length(jnp.asarray(x if axis else x.T), axis)
    assert float(np.linalg.norm(turned)) == pytest.approx(length, abs=1e-6)


def test_a_zero_vector_stays_zero_and_so_does_its_gradient():
  weights = jnp.arange(1.0, 4.0)

  def total(x):
    return jnp.sum(unit_length(x, 1) * weights[None])

  value, gradient = jax.value_and_grad(total)(jnp.zeros((2, 3)))
  assert float(value) == 0.0
  np.testing.assert_array_equal(gradient, np.zeros((2, 3)))


def test_the_gradient_of_unit_length_is_orthogonal_to_the_vector():
  x = jnp.array([[3.0, 4.0, 0.0]])
  gradient = jax.grad(lambda x: unit_length(x, 1)[0, 2])(x)
  np.testing.assert_allclose(gradient, [[0.0, 0.0, 0.2]], atol=1e-6)
  along = jax.grad(lambda x: unit_length(x, 1)[0, 0])(x)
  np.testing.assert_allclose(along, [[16 / 125, -12 / 125, 0.0]], atol=1e-6)
