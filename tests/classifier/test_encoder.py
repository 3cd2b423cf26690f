"""How the encoder sees pixels, how it is scored, and what does not fit it."""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from input_pipeline.dataset import LongTailDataset
from input_pipeline.lazy_images import LazyImages
from memdiff.classifier import backbones, encoder, losses
from memdiff.classifier.backbones import Architecture, BackboneConfig
from memdiff.classifier.encoder import EncoderConfig, InputConfig
from memdiff.config import build
from memdiff.errors import ConfigError, DataError

MEASURED = InputConfig((), (), "rgb")
CONFIGURED = InputConfig((0.1, 0.4, 0.8), (0.5, 0.25, 0.125), "rgb")


def images_of(seed=0, number=9, size=4, channels=3):
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 256, (number, size, size, channels)).astype(np.uint8)
  return images // np.arange(1, channels + 1, dtype=np.uint8)  # channels that differ


def config_of(input_config=MEASURED, **changes):
  backbone = BackboneConfig("resnet8", "auto", 30.0, "float32", ())
  return dataclasses.replace(EncoderConfig(backbone, input_config, "", True), **changes)


# --- pixels ----------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.sampled_from([1, 3]), st.integers(1, 20))
def test_statistics_are_those_of_numpy(seed, channels, number):
  images = images_of(seed, number, channels=channels)
  statistics = encoder.pixel_statistics(MEASURED, images)
  exact = images.astype(np.float64)
  np.testing.assert_allclose(statistics["pixel_mean"], exact.mean(axis=(0, 1, 2)), rtol=1e-6)
  np.testing.assert_allclose(statistics["pixel_std"], exact.std(axis=(0, 1, 2)), rtol=1e-6)
  assert statistics["pixel_mean"].dtype == statistics["pixel_std"].dtype == np.float32


def test_channels_without_contrast_are_not_divided_by_zero():
  images = np.zeros((3, 4, 4, 3), np.uint8)
  images[..., 1] = 200
  images[0, 0, 0, 2] = 1  # a deviation of .14
  statistics = encoder.pixel_statistics(MEASURED, images)
  np.testing.assert_array_equal(statistics["pixel_std"], [1.0, 1.0, 1.0])
  np.testing.assert_allclose(statistics["pixel_mean"], [0.0, 200.0, 1 / 48], rtol=1e-6)


def test_configured_statistics_are_taken_as_they_are_and_no_image_is_read():
  class Unreadable:
    shape = (5, 4, 4, 3)

  for channels in ("rgb", "bgr"):  # they are given in the encoder's own order
    config = dataclasses.replace(CONFIGURED, channels=channels)
    statistics = encoder.pixel_statistics(config, Unreadable())
    np.testing.assert_allclose(statistics["pixel_mean"], 255 * np.array([0.1, 0.4, 0.8]))
    np.testing.assert_allclose(statistics["pixel_std"], 255 * np.array([0.5, 0.25, 0.125]))


@pytest.mark.parametrize("channels", ["rgb", "bgr"])
@pytest.mark.parametrize("given", [(), (0.1, 0.4, 0.8)])
def test_images_are_normalised_in_the_order_that_the_encoder_expects(channels, given):
  config = InputConfig(given, given, channels)
  images = images_of()
  ordered = (images if channels == "rgb" else images[..., ::-1]).astype(np.float64)
  if given:
    expected = (ordered / 255 - np.array(given)) / np.array(given)
  else:
    expected = (ordered - ordered.mean(axis=(0, 1, 2))) / ordered.std(axis=(0, 1, 2))
  shared = jax.tree.map(jnp.asarray, encoder.pixel_statistics(config, images))
  made = encoder.normalize(config, jnp.asarray(images), shared)
  assert made.dtype == jnp.float32
  np.testing.assert_allclose(made, expected, rtol=1e-4, atol=1e-4)


def test_one_channel_is_normalised_too():
  images = images_of(channels=1)
  shared = jax.tree.map(jnp.asarray, encoder.pixel_statistics(MEASURED, images))
  made = np.asarray(encoder.normalize(MEASURED, jnp.asarray(images), shared))
  assert made.shape == images.shape
  assert made.mean() == pytest.approx(0, abs=1e-5) and made.std() == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"mean": (0.5,)}, "mean has 1 channels and std 0"),
    ({"mean": (0.5, 1.2), "std": (0.5, 0.5)}, "numbers from 0 to 1"),
    ({"mean": (0.5,), "std": (0.0,)}, "numbers above 0, up to 1"),
    ({"channels": "rbg"}, "one of rgb, bgr"),
  ],
)
def test_wrong_statistics_are_refused(changes, words):
  values = {"mean": (), "std": (), "channels": "rgb"} | changes
  with pytest.raises(ConfigError, match=words):
    build(InputConfig, values, "encoder.input")


# --- scoring ---------------------------------------------------------------------------------

WEIGHTS = np.random.default_rng(2).normal(size=(12, 5))


def predict(images):
  """A linear model of the pixels."""
  return (images.reshape(len(images), -1) / 255.0) @ jnp.asarray(WEIGHTS, jnp.float32)


def expected_scores(images, labels):
  logits = images.reshape(len(images), -1) / 255.0 @ WEIGHTS
  log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  return {
    "loss": -log_p[np.arange(len(labels)), labels].mean(),
    "accuracy": (logits.argmax(axis=1) == labels).mean(),
  }


@pytest.mark.parametrize(("number", "chunk"), [(1, 4), (3, 4), (4, 4), (5, 4), (23, 4), (23, 7),
                                               (24, 8), (9, 1)])  # fmt: skip
def test_scores_in_chunks_are_those_of_all_images_at_once(number, chunk, monkeypatch):
  monkeypatch.setattr(encoder, "_EVAL_CHUNK", chunk)
  images = images_of(3, number, size=2)
  labels = np.random.default_rng(4).integers(0, 5, number).astype(np.int32)
  sizes = []

  def counting(images):
    sizes.append(len(images))
    return predict(images)

  scores = jax.jit(lambda x, y: encoder.score(counting, x, y))(images, labels)
  expected = expected_scores(images, labels)
  assert set(scores) == set(expected)
  for name, value in expected.items():
    assert float(scores[name]) == pytest.approx(value, rel=1e-5), name
  assert max(sizes) <= chunk


def test_more_images_than_a_chunk_are_scored_in_several():
  assert encoder._EVAL_CHUNK < 1200
  images = images_of(5, 1201, size=2)
  labels = (np.arange(1201) % 5).astype(np.int32)
  scores = jax.jit(lambda x, y: encoder.score(predict, x, y))(images, labels)
  for name, value in expected_scores(images, labels).items():
    assert float(scores[name]) == pytest.approx(value, rel=1e-5), name


# --- settings and data -----------------------------------------------------------------------


class Reader:
  def __len__(self):
    return 6

  def __getitem__(self, index):
    raise AssertionError("no image is to be read")


def data_of(channels=3, streamed=False):
  images = LazyImages(Reader(), 4) if streamed else images_of(number=6, channels=channels)
  labels = np.array([0, 1] * 3, np.int32)
  none = images[:0]
  return LongTailDataset(
    name="pets", class_names=("cat", "dog"), profile="natural", imbalance=1.0,
    train_images=images, train_labels=labels, holdout_images=none, holdout_labels=labels[:0],
    left_out_images=none, left_out_labels=labels[:0], test_images=images, test_labels=labels,
    split_sha256="",
  )  # fmt: skip


def test_settings_that_fit_pass():
  encoder.check(config_of(), data_of())
  encoder.check(config_of(), data_of(channels=1))
  encoder.check(config_of(CONFIGURED), data_of(streamed=True))
  encoder.check(config_of(dataclasses.replace(MEASURED, channels="bgr")), data_of())


@pytest.mark.parametrize(
  ("input_config", "data", "words"),
  [
    (CONFIGURED, {"channels": 1}, "input.mean has 3 channels, but the images have 1"),
    (MEASURED, {"streamed": True}, "pets is too large for that, give them"),
    (InputConfig((), (), "bgr"), {"channels": 1}, "input.channels is bgr, but the images have 1"),
  ],
)
def test_settings_that_do_not_fit_the_images_are_refused(input_config, data, words):
  with pytest.raises(ConfigError, match=words):
    encoder.check(config_of(input_config), data_of(**data))


@pytest.mark.parametrize(("network", "taps"), [
  ("resnet8", ("1:4", "2:2", "3:1")), ("resnet18", ("1:1", "4:1")), ("resnet8", ("3:2",)),
  ("resnet18", ("2:2",)), ("resnet8", ("2:1", "1:3")),
])  # fmt: skip
def test_taps_are_refused_where_a_stage_does_not_divide_into_the_grid(network, taps):
  """Images of 4 x 4 pixels; what a stage gives is asked of the network itself."""
  backbone = BackboneConfig(network, "auto", 30.0, "float32", taps)
  config = config_of(backbone=backbone)
  sides = stage_sides(network, 4)
  bad = [t for t in taps if sides[int(t[0]) - 1] % int(t[2:])]
  if not bad:
    encoder.check(config, data_of())
    return
  side = sides[int(bad[0][0]) - 1]
  words = rf"taps has {bad[0]}, but that stage gives {side} x {side} pixels"
  with pytest.raises(ConfigError, match=words):
    encoder.check(config, data_of())


def stage_sides(network, side):
  """Height of the output of every stage."""
  model = backbones.make_backbone(
    BackboneConfig(network, "auto", 30.0, "float32", ()), 2, cosine=False
  )

  def blocks(x):
    _, state = model.init_with_output(
      jax.random.key(0), x, train=False, capture_intermediates=True, mutable=True
    )
    return state["intermediates"]

  shapes = jax.eval_shape(blocks, jax.ShapeDtypeStruct((1, side, side, 3), np.float32))
  return [
    shapes[f"layer{stage}_0"]["__call__"][0].shape[1]
    for stage in range(1, len(model.architecture.widths) + 1)
  ]


@pytest.mark.parametrize("network", ["resnet8", "resnet18"])
@pytest.mark.parametrize("side", [4, 7, 32, 50, 64])
def test_the_side_of_a_stage_is_that_of_its_output(network, side):
  config = config_of(backbone=BackboneConfig(network, "auto", 30.0, "float32", ()))
  for stage, expected in enumerate(stage_sides(network, side), 1):
    assert encoder.stage_side(config, side, stage) == expected


def test_weights_that_are_not_there_are_named_before_any_work(tmp_path):
  path = str(tmp_path / "none.npz")
  with pytest.raises(DataError, match=r"config\.encoder\.init_from: there is no file .*none\.npz"):
    encoder.check(config_of(init_from=path), data_of())
  with pytest.raises(DataError, match="there is no file"):
    encoder.check(config_of(init_from=str(tmp_path)), data_of())  # a folder


def test_manifests_tell_the_weights_by_their_content(tmp_path):
  assert encoder.weights_sha256(config_of()) is None
  path = tmp_path / "w.npz"
  path.write_bytes(b"some weights")
  config = config_of(init_from=str(path))
  assert encoder.weights_sha256(config) == hashlib.sha256(b"some weights").hexdigest()
  path.write_bytes(b"other weights")
  assert encoder.weights_sha256(config) == hashlib.sha256(b"other weights").hexdigest()


def test_the_head_is_as_the_loss_asks_or_as_configured():
  def backbone(head):
    return BackboneConfig("resnet8", head, 30.0, "float32", ())

  for loss, row in losses.LOSSES.items():
    assert encoder.has_cosine_head(backbone("auto"), loss) == row.cosine_head
    assert encoder.has_cosine_head(backbone("cosine"), loss)
    assert not encoder.has_cosine_head(backbone("linear"), loss)
  assert encoder.make_model(config_of(), "ldam", 4).cosine_scale == 30.0
  assert encoder.make_model(config_of(), "focal", 4).cosine_scale is None


def test_the_encoder_starts_from_the_file_and_from_the_key_where_there_is_none(
  tmp_path, monkeypatch
):
  monkeypatch.setitem(backbones.BACKBONES, "resnet8", Architecture((0,), (4,), True))
  config = config_of()
  model = encoder.make_model(config, "cross_entropy", 4)

  def variables_of(config):
    draw = jax.jit(lambda key: encoder.initial_variables(config, model, (8, 8, 3), key))
    return draw(jax.random.key(1))

  def kernels(variables):
    return variables["params"]["conv1"]["kernel"], variables["params"]["head"]["kernel"]

  drawn = variables_of(config)
  arrays = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(drawn):
    _, *modules, last = (key.key for key in path)
    module = ".".join(modules).replace("head", "fc")
    name = {"mean": "running_mean", "var": "running_var", "bias": "bias"}.get(last, "weight")
    order = {4: (3, 2, 0, 1), 2: (1, 0)}.get(leaf.ndim, (0,))
    arrays[f"{module}.{name}"] = np.asarray(leaf + 1).transpose(order)
  np.savez(tmp_path / "w.npz", **arrays)
  started = dataclasses.replace(config, init_from=str(tmp_path / "w.npz"))
  body, head = kernels(drawn)
  for init_head, expected in ((True, head + 1), (False, head)):
    ours = kernels(variables_of(dataclasses.replace(started, init_head=init_head)))
    np.testing.assert_array_equal(ours[0], body + 1)
    np.testing.assert_array_equal(ours[1], expected)
