"""Heads trained on a frozen encoder: what is drawn, what moves, and what stays bit for bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from input_pipeline import augment
from input_pipeline.augment import AugmentConfig
from input_pipeline.dataset import LongTailDataset
from input_pipeline.lazy_images import LazyImages
from input_pipeline.streaming import StreamConfig
from memdiff.classifier import backbones, decoupled, encoder, image_batches
from memdiff.classifier.backbones import Architecture, BackboneConfig
from memdiff.classifier.decoupled import DecoupledConfig
from memdiff.classifier.encoder import EncoderConfig, InputConfig
from memdiff.classifier.encoder_training import ClassifierConfig, Recipe
from memdiff.classifier.losses import LossConfig
from memdiff.runtime import loop, train_state
from memdiff.runtime.train_state import OptimizerConfig
from tests import support

TINY = Architecture((0,), (4,), for_small_images=True)
SIZE, RATE = 5, 0.05
COUNTS = np.array([24, 5, 1])
LABELS = np.repeat(np.arange(3), COUNTS).astype(np.int32)
SGD = OptimizerConfig("sgd", RATE, "constant", (), (), 0.0, False, 0.0, 0.0, 0.0, 1)
CLASSIFIER = ClassifierConfig(
  loss="cross_entropy", references=(),
  loss_parameters=LossConfig(0.99, 1.0, 1.0, 0.5, 1.0, 0.8, 0.3, 0.35, 5, 0.1),
  augment=AugmentConfig(0, False, "none", 2, 9.0, 0, 0.0), stream=StreamConfig(2, 0, 1),
  batch_size=10, num_epochs=1.0, optimizer=SGD,
)  # fmt: skip
CONFIG = DecoupledConfig(("crt", "lws"), 1.0, 1.0, num_epochs=2.0, optimizer=SGD)
ENCODER = EncoderConfig(
  BackboneConfig("resnet8", "auto", 16.0, "float32", ()),
  InputConfig((0.5,), (0.25,), "rgb"),
  "",
  True,
)


class Grey:
  """Whole images by number: each of one grey, which tells which it is."""

  def __len__(self):
    return len(LABELS)

  def __getitem__(self, index):
    return Image.fromarray(np.full((SIZE, SIZE, 3), 8 * index, np.uint8))


@pytest.fixture(autouse=True)
def _tiny_backbone(monkeypatch):
  """A network of one convolution."""
  monkeypatch.setitem(backbones.BACKBONES, "resnet8", TINY)


def data_of(streamed=False):
  """The image of index i has the grey 8 i everywhere."""
  lazy = LazyImages(Grey(), SIZE)
  images = lazy if streamed else lazy[:][..., :1]
  none, no_label = images[:0], LABELS[:0]
  return LongTailDataset(
    name="greys", class_names=("a", "b", "c"), profile="natural", imbalance=24.0,
    train_images=images, train_labels=LABELS, holdout_images=none, holdout_labels=no_label,
    left_out_images=none, left_out_labels=no_label, test_images=images, test_labels=LABELS,
    split_sha256="",
  )  # fmt: skip


def setting(data, seeds=1, loss="cross_entropy"):
  """(encoder's settings, a trained state with seeds leading)."""
  channels = data.train_images.shape[-1]
  given = InputConfig((0.5,) * channels, (0.25,) * channels, "rgb")
  config = dataclasses.replace(ENCODER, input=given)
  model = encoder.make_model(config, loss, 3)
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.zeros((1, SIZE, SIZE, channels)), train=False)
  )
  rng = np.random.default_rng(0)

  def draw(path, x):
    noise = 0.3 * rng.normal(size=(seeds, *x.shape))
    return jnp.asarray(noise if path[-1].key == "kernel" else 1 + abs(noise), jnp.float32)

  drawn = jax.tree_util.tree_map_with_path(draw, shapes)
  keys = jax.random.split(jax.random.key(1), seeds)
  state = train_state.TrainState(
    jnp.zeros(seeds, jnp.int32), keys, drawn["params"], None, drawn["batch_stats"]
  )
  return config, state


def make(method, mesh, data=None, config=CONFIG, classifier=CLASSIFIER, seeds=1,
         loss="cross_entropy"):  # fmt: skip
  data = data or data_of()
  encoder_config, frozen = setting(data, seeds, loss)
  shared = encoder.device_data(encoder_config.input, data, mesh)
  stage = decoupled.make_stage(
    method, config, Recipe(classifier, encoder_config, loss), frozen, data, shared, mesh
  )
  return stage, frozen


def first(tree):
  return jax.tree.map(lambda x: x[0], tree)


@pytest.fixture
def drawn(monkeypatch):
  """The batches of images that are augmented, as they run."""
  seen, function = [], augment.augment

  def watched(key, images, config):
    jax.debug.callback(lambda x: seen.append(np.asarray(x)), images, ordered=True)
    return function(key, images, config)

  monkeypatch.setattr(augment, "augment", watched)
  return seen


def indices(images):
  """Which training image each is, [B]."""
  assert (images == images[:, :1, :1, :1]).all()
  return images[:, 0, 0, 0] // 8


def steps(stage, number):
  per_seed, everywhere = first(stage.per_seed), stage.shared["pixel_mean"].sharding
  init = jax.jit(lambda key: stage.init(key, per_seed), out_shardings=everywhere)
  states, step = [init(jax.random.key(2))], jax.jit(stage.step, out_shardings=everywhere)
  feed = stage.batches and stage.batches(0, 0)
  losses = []
  for _ in range(number):
    given = (per_seed, next(feed)) if feed else per_seed
    state, metrics = step(states[-1], stage.shared, given)
    states.append(state)
    losses.append(float(metrics["loss"]))
  if feed:
    feed.close()
  jax.effects_barrier()
  return states, losses


# --- what is trained -------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["crt", "lws"])
def test_the_head_is_trained_on_features_of_the_frozen_encoder(method, mesh, drawn):
  """Three steps of plain SGD on the cross-entropy, written out."""
  stage, frozen = make(method, mesh)
  states, losses = steps(stage, 3)
  config, _ = setting(data_of())
  model, variables = encoder.make_model(config, "cross_entropy", 3), first(stage.per_seed)
  forward = jax.jit(lambda x: model.apply(variables, x, train=False)[1])
  per_seed = jax.tree.map(lambda x: np.asarray(x, np.float64), first(frozen.params)["head"])
  head = {name: np.asarray(value, np.float64) for name, value in states[0].params.items()}
  if method == "lws":
    assert set(head) == {"scale"}
    np.testing.assert_array_equal(head["scale"], np.ones(3))
  else:
    assert set(head) == {"kernel", "bias"} and head["kernel"].shape == (4, 3)
    assert not np.allclose(head["kernel"], per_seed["kernel"], atol=0.1)
    np.testing.assert_array_equal(head["bias"], np.zeros(3))
  for number in range(3):
    images = (drawn[number] / 255.0 - 0.5) / 0.25
    features = np.asarray(forward(images.astype(np.float32)), np.float64)
    targets = np.eye(3)[LABELS[indices(drawn[number])]]
    used = per_seed if method == "lws" else head
    linear = features @ used["kernel"] + used["bias"]
    logits = head["scale"] * linear if method == "lws" else linear
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert losses[number] == pytest.approx(-np.log((p * targets).sum(axis=1)).mean(), rel=1e-4)
    error = (p - targets) / len(targets)
    if method == "lws":
      head["scale"] -= RATE * (error * linear).sum(axis=0)
    else:
      head["kernel"] -= RATE * features.T @ error
      head["bias"] -= RATE * error.sum(axis=0)
    for name, value in head.items():
      np.testing.assert_allclose(states[number + 1].params[name], value, rtol=1e-4, atol=1e-6)
    made = decoupled.trained_logits(
      method, states[number].params, first(frozen.params)["head"],
      jnp.asarray(features, jnp.float32),
    )  # fmt: skip
    np.testing.assert_allclose(made, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["crt", "lws"])
def test_the_encoder_stays_as_it_is_bit_for_bit(method, mesh, tmp_path):
  stage, frozen = make(method, mesh, seeds=2)
  before = jax.tree.map(np.array, (frozen.params, frozen.model_state))
  run = support.make_run(mesh, (0, 1), 3)
  state = loop.train(stage, run, tmp_path)
  assert stage.name == f"heads/{method}" and stage.num_steps == 6
  assert state.model_state is None and state.bank is None
  for a, b in zip(jax.tree.leaves(before),
                  jax.tree.leaves((stage.per_seed["params"], stage.per_seed["batch_stats"])),
                  strict=True):  # fmt: skip
    np.testing.assert_array_equal(a, b)
  for leaf in jax.tree.leaves(state.params):
    assert leaf.shape[0] == 2 and not np.array_equal(leaf[0], leaf[1])


def test_an_epoch_draws_as_many_images_as_there_are(mesh):
  for epochs, expected in ((0.0, 0), (1.0, 3), (0.5, 2), (10.0, 30)):
    config = dataclasses.replace(CONFIG, num_epochs=epochs)
    assert make("crt", mesh, config=config)[0].num_steps == expected


# --- what is drawn ---------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
def test_classes_are_drawn_alike(streamed, mesh, drawn):
  """The one image of the last class as often as the 24 of the first."""
  stage, _ = make("lws", mesh, data_of(streamed))
  assert (stage.batches is not None) == streamed and stage.evaluate is None
  steps(stage, 40)
  index = np.concatenate([indices(images) for images in drawn])
  assert len(index) == 400
  assert stats.chisquare(np.bincount(LABELS[index], minlength=3)).pvalue > 1e-3
  assert len(set(index[LABELS[index] == 0])) == 24  # and all of a class
  assert len({tuple(indices(images)) for images in drawn}) == 40


def test_images_are_augmented_anew_at_each_step_but_not_mixed(mesh, monkeypatch):
  """The labels of mixed images would be shares; a head learns from whole ones."""
  seen, view = [], image_batches.augmented

  def watched(*arguments):
    made = view(*arguments)
    jax.debug.callback(lambda x: seen.append(np.asarray(x)), made, ordered=True)
    return made

  monkeypatch.setattr(image_batches, "augmented", watched)

  def losses_with(**changes):
    per_seed = dataclasses.replace(CLASSIFIER.augment, **changes)
    stage, _ = make("lws", mesh, classifier=dataclasses.replace(CLASSIFIER, augment=per_seed))
    return steps(stage, 2)[1]

  assert losses_with() == losses_with(mixup=0.5)
  seen.clear()
  losses_with(cutout=3)
  first_holes, second_holes = (images == 0 for images in seen)
  assert first_holes.any(axis=(1, 2, 3)).all()
  assert not np.array_equal(first_holes, second_holes)


def test_a_new_head_goes_on_cosine_and_contrastive_encoders_too(mesh):
  for loss in ("ldam", "bcl"):
    stage, frozen = make("crt", mesh, loss=loss)
    assert "bias" not in frozen.params["head"]
    state = jax.eval_shape(stage.init, jax.random.key(0), first(stage.per_seed))
    after, metrics = jax.eval_shape(stage.step, state, stage.shared, first(stage.per_seed))
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert set(metrics) == {"loss"}
