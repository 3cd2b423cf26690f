"""The classifier stage: what a step computes, for every kind of loss and way of reading images."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec
from PIL import Image

from input_pipeline import augment, batches
from input_pipeline.augment import AugmentConfig
from input_pipeline.dataset import LongTailDataset
from input_pipeline.lazy_images import LazyImages
from input_pipeline.streaming import StreamConfig
from memdiff.classifier import backbones, encoder, encoder_training, image_batches, losses
from memdiff.classifier.backbones import Architecture, BackboneConfig
from memdiff.classifier.encoder import EncoderConfig, InputConfig
from memdiff.classifier.encoder_training import ClassifierConfig, Recipe
from memdiff.classifier.losses import LossConfig
from memdiff.errors import ConfigError
from memdiff.experiments.base import forward_images
from memdiff.memory.memory_bank import BankConfig
from memdiff.runtime import loop, results
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.random import stream
from memdiff.runtime.train_state import OptimizerConfig
from tests import support

TINY = Architecture((0,), (8,), for_small_images=True)
COUNTS = np.array([8, 4, 2])
SIZE, RATE, DECAY = 6, 0.1, 0.01
LOSS = LossConfig(
  beta=0.99, power=1.0, focusing=1.0, margin=0.5, tau=1.2, defer=0.5, tail_share=0.4,
  contrastive_weight=0.35, embedding_dim=5, temperature=0.2,
)  # fmt: skip
CONFIG = ClassifierConfig(
  loss="cross_entropy", references=(), loss_parameters=LOSS,
  augment=AugmentConfig(0, False, "none", 2, 9.0, 0, 0.0), stream=StreamConfig(2, 0, 1),
  batch_size=14, num_epochs=2.0,
  optimizer=OptimizerConfig("sgd", RATE, "constant", (), (), 0.9, False, DECAY, 0.0, 0.0, 1),
)  # fmt: skip
ENCODER = EncoderConfig(
  BackboneConfig("resnet8", "auto", 16.0, "float32", ()), InputConfig((), (), "rgb"), "", True
)
BANK = BankConfig(num_slots=3, horizon=1000)
KEY = jax.random.key(3)


@pytest.fixture(autouse=True)
def _tiny_backbone(monkeypatch):
  """A network of one convolution."""
  monkeypatch.setitem(backbones.BACKBONES, "resnet8", TINY)


def changed(config, **changes):
  """The config with fields replaced; those of its augmentation by their own names."""
  per_seed = {n: changes.pop(n) for n in list(changes) if hasattr(config.augment, n)}
  return dataclasses.replace(
    config, augment=dataclasses.replace(config.augment, **per_seed), **changes
  )


def pictures(labels, seed):
  """Noise around a pattern for each class."""
  patterns = np.random.default_rng(9).integers(40, 216, (len(COUNTS), SIZE, SIZE, 3))
  noise = np.random.default_rng(seed).integers(-25, 26, (len(labels), SIZE, SIZE, 3))
  return (patterns[labels] + noise).astype(np.uint8)


def data_of(train_images=None, holdout=0):
  labels = np.repeat(np.arange(3), COUNTS).astype(np.int32)
  test_labels = np.tile(np.arange(3), 5).astype(np.int32)
  test, images = pictures(test_labels, 1), pictures(labels, 0)
  return LongTailDataset(
    name="patterns", class_names=("a", "b", "c"), profile="natural", imbalance=4.0,
    train_images=images if train_images is None else train_images, train_labels=labels,
    holdout_images=test[:holdout], holdout_labels=test_labels[:holdout],
    left_out_images=test[:0], left_out_labels=test_labels[:0],
    test_images=test, test_labels=test_labels, split_sha256="",
  )  # fmt: skip


def make(
  mesh, loss="cross_entropy", config=CONFIG, data=None, bank=None, encoder_config=ENCODER, rows=None
):
  data = data or data_of()
  shared = encoder.device_data(encoder_config.input, data, mesh)
  recipe = Recipe(config, encoder_config, loss, bank)
  return encoder_training.make_stage(recipe, data, shared, mesh, rows)


def steps(stage, number=1, fold=()):
  """States 0 to `number` of one seed, and the metrics of the steps between."""
  everywhere = stage.shared["pixel_mean"].sharding  # as in the loop: one compilation for all steps
  states = [jax.jit(lambda key: stage.init(key, ()), out_shardings=everywhere)(KEY)]
  step = jax.jit(
    lambda state, per_seed: stage.step(state, stage.shared, per_seed), out_shardings=everywhere
  )
  metrics = []
  feed = stage.batches and stage.batches(0, 0)
  for _ in range(number):
    state, values = step(states[-1], ((), next(feed)) if feed else fold)
    states.append(state)
    metrics.append({name: float(value) for name, value in values.items()})
  if feed:
    feed.close()
  return states, metrics


def watch(monkeypatch, module, name):
  """A list that fills with the arrays that every call of `module.name` returns, as it runs."""
  seen, function = [], getattr(module, name)

  def watched(*arguments):
    made = function(*arguments)
    jax.debug.callback(lambda x: seen.append(jax.tree.map(np.asarray, x)), made, ordered=True)
    return made

  monkeypatch.setattr(module, name, watched)
  return seen


def batch_labels(step):
  """Of the batch of this step, which is a whole epoch."""
  order = batches.epoch_indices(stream(KEY, "order"), jnp.int32(step), 14, 14)
  return data_of().train_labels[order]


# --- settings --------------------------------------------------------------------------------


@given(st.floats(0, 300), st.integers(1, 5000), st.integers(1, 512))
def test_steps_are_epochs_of_batches(num_epochs, num_examples, batch_size):
  config = changed(CONFIG, num_epochs=num_epochs, batch_size=batch_size)
  number = config.num_steps(num_examples)
  assert isinstance(number, int)
  assert abs(number * batch_size - num_epochs * num_examples) <= batch_size / 2 * (1 + 1e-9)


def test_the_standard_recipe_has_the_steps_of_the_field():
  """CIFAR-100-LT at imbalance 100: 200 epochs of 10,847 images in batches of 128."""
  assert changed(CONFIG, num_epochs=200.0, batch_size=128).num_steps(10847) == 16948


@pytest.mark.parametrize(
  ("loss", "references", "expected"),
  [
    ("csl", (), ["csl"]),
    ("csl", ("ldam", "focal"), ["csl", "ldam", "focal"]),
    ("csl", ("focal", "csl"), ["csl", "focal"]),
  ],
)
def test_each_loss_is_trained_once_and_the_one_to_build_on_comes_first(loss, references, expected):
  config = changed(CONFIG, loss=loss, references=references)
  assert list(encoder_training.trained_losses(config)) == expected


def test_settings_that_fit_pass(tmp_path):
  data = data_of()
  encoder_training.check(CONFIG, ENCODER, data)
  encoder_training.check(changed(CONFIG, loss="ldam_drw", mixup=0.2), ENCODER, data)
  weights = dataclasses.replace(ENCODER, init_from=str(tmp_path / "w.npz"))
  encoder_training.check(changed(CONFIG, num_epochs=0.0), weights, data)
  linear = dataclasses.replace(ENCODER.backbone, head="linear")
  encoder_training.check(CONFIG, dataclasses.replace(ENCODER, backbone=linear), data)


@pytest.mark.parametrize(
  ("changes", "head", "words"),
  [
    ({"batch_size": 15}, "auto", r"batch_size is 15, but the training set has only 14 images"),
    ({"padding": 6}, "auto", r"augment\.padding is 6 pixels"),
    ({"cutout": 7}, "auto", r"augment\.cutout is 7 pixels"),
    ({"loss": "bcl", "mixup": 0.2}, "auto", "The loss bcl needs one label per image"),
    ({"references": ("csl_code",), "mixup": 0.2}, "auto", "The loss csl_code needs one label"),
    ({"loss": "ldam"}, "linear", "The loss ldam is defined on cosines"),
    ({"references": ("focal", "bcl")}, "linear", "The loss bcl is defined on cosines"),
    ({"num_epochs": 0.0}, "auto", r"num_epochs is 0, not one step, .*init_from is empty"),
    ({"num_epochs": 0.4}, "auto", r"num_epochs is 0\.4, not one step"),
  ],
)
def test_settings_that_do_not_fit_are_refused(changes, head, words):
  backbone = dataclasses.replace(ENCODER.backbone, head=head)
  config = dataclasses.replace(ENCODER, backbone=backbone)
  with pytest.raises(ConfigError, match=words):
    encoder_training.check(changed(CONFIG, **changes), config, data_of())


# --- a step, written out ---------------------------------------------------------------------


def normalized(images):
  return ((images - images.mean(axis=(0, 1, 2))) / images.std(axis=(0, 1, 2))).astype(np.float32)


def log_softmax(z):
  z = np.asarray(z, np.float64)
  return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def cross_entropies(logits, labels):
  return -log_softmax(logits)[np.arange(len(labels)), labels]


def outputs(loss, state, images):
  """((logits, features), batch statistics) of the network in training mode."""
  model = encoder.make_model(ENCODER, loss, 3)
  variables = {"params": state.params, "batch_stats": state.model_state}
  apply = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))
  out, updates = apply(variables, images)
  return jax.tree.map(np.asarray, out), updates["batch_stats"]


def test_a_step_is_sgd_on_the_mean_cross_entropy_of_the_batch(mesh):
  """The batch is the whole training set, whose order does not matter."""
  data = data_of()
  (before, after), (metrics,) = steps(make(mesh))
  images, labels = normalized(data.train_images), data.train_labels
  model = encoder.make_model(ENCODER, "cross_entropy", 3)

  def mean(params):
    variables = {"params": params, "batch_stats": before.model_state}
    (logits, _), _ = model.apply(variables, images, train=True, mutable=["batch_stats"])
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(14), labels])

  gradients = jax.jit(jax.grad(mean))(before.params)
  expected = jax.tree.map(lambda p, g: p - RATE * (g + DECAY * p), before.params, gradients)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), after.params,
               expected)  # fmt: skip
  (logits, _), statistics = outputs("cross_entropy", before, images)
  assert metrics["loss"] == pytest.approx(cross_entropies(logits, labels).mean(), rel=1e-4)
  assert metrics["accuracy"] == pytest.approx((logits.argmax(axis=1) == labels).mean())
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
               after.model_state, statistics)  # fmt: skip
  assert int(after.step) == 1 and after.bank is None and not after.loss_state


def test_mixup_trains_on_mixed_images_with_both_labels(mesh, monkeypatch):
  seen = watch(monkeypatch, augment, "mixup")
  states, metrics = steps(make(mesh, config=changed(CONFIG, mixup=1.0)), 2)
  jax.effects_barrier()
  assert float(seen[0][2]) != float(seen[1][2])  # drawn anew at each step
  for number, (images, partner, share) in enumerate(seen):
    labels = batch_labels(number)
    (logits, _), _ = outputs("cross_entropy", states[number], images)
    per_seed, others = (cross_entropies(logits, y).mean() for y in (labels, labels[partner]))
    expected = float(share * per_seed + (1 - share) * others)
    assert metrics[number]["loss"] == pytest.approx(expected, rel=1e-4)


def unit(x):
  """Rows of length one; a zero row, as of hidden units that are all dead, stays zero."""
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def projected(params, name, x):
  """Two layers with batch norm between, to unit length."""
  dense, norm, out = (params[f"{name}_{layer}"] for layer in ("hidden", "bn", "out"))
  x = x @ dense["kernel"] + dense["bias"]
  x = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-5) * norm["scale"] + norm["bias"]
  return unit(np.maximum(x, 0) @ out["kernel"] + out["bias"])


def balanced_contrastive(z, labels, centres, temperature):
  """Zhu et al. 2022, eq. 6, over anchors z [N, P]."""
  everything = np.concatenate([z, centres])
  classes = np.concatenate([labels, np.arange(len(centres))])
  total = 0.0
  for i in range(len(z)):
    similarity = np.exp(everything @ z[i] / temperature)
    others = np.arange(len(everything)) != i
    below = sum(similarity[others & (classes == c)].mean() for c in range(len(centres)))
    total -= np.log(similarity[others & (classes == classes[i])] / below).mean()
  return total / len(z)


def test_balanced_contrastive_learning_adds_its_term_on_two_further_views(mesh, monkeypatch):
  views = watch(monkeypatch, image_batches, "augmented")
  states, metrics = steps(make(mesh, "bcl", changed(CONFIG, flip=True, cutout=2)), 2)
  jax.effects_barrier()
  assert len({view.tobytes() for view in views}) == 6  # augmented apart, and anew at each step
  for number, values in enumerate(metrics):
    state, images = states[number], np.concatenate(views[3 * number : 3 * number + 3])
    assert (images == 0).any(axis=(1, 2, 3)).all()  # each has its cutout
    labels = batch_labels(number)
    (logits, features), _ = outputs("bcl", state, images)
    adjusted = logits[:14] + LOSS.tau * np.log(COUNTS / COUNTS.sum())
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), state.params)
    z = projected(params["projection"], "feature", features[14:])
    centres = projected(params["projection"], "centre", params["head"]["kernel"].T)
    term = balanced_contrastive(z, np.tile(labels, 2), centres, LOSS.temperature)
    expected = cross_entropies(adjusted, labels).mean() + LOSS.contrastive_weight * term
    assert values["loss"] == pytest.approx(expected, rel=1e-3)
    assert values["accuracy"] == pytest.approx((logits[:14].argmax(axis=1) == labels).mean())
  for part in ("params", "model_state"):
    old, new = (getattr(state, part)["projection"] for state in states[:2])
    assert not any(jax.tree.leaves(jax.tree.map(np.array_equal, old, new)))


def test_margins_are_scaled_as_the_cosines_are(mesh):
  data = data_of()
  (before, _), (metrics,) = steps(make(mesh, "ldam"))
  (logits, _), _ = outputs("ldam", before, normalized(data.train_images))
  assert np.abs(logits).max() <= 16.0
  margins = LOSS.margin * (COUNTS.min() / COUNTS) ** 0.25
  shifted = logits - 16.0 * np.eye(3)[data.train_labels] * margins
  expected = cross_entropies(shifted, data.train_labels).mean()
  assert metrics["loss"] == pytest.approx(expected, rel=1e-4)


# --- every kind of loss ----------------------------------------------------------------------


@pytest.mark.parametrize("loss", losses.LOSSES)
def test_every_loss_of_the_table_makes_a_step_with_a_state_of_fixed_shape(loss, mesh):
  row = losses.LOSSES[loss]
  stage = make(mesh, loss, bank=BANK if row.needs_bank else None)
  state = jax.eval_shape(stage.init, KEY, ())
  after, metrics = jax.eval_shape(stage.step, state, stage.shared, ())
  assert jax.tree.structure(state) == jax.tree.structure(after)
  assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, after)
  assert {name: value.shape for name, value in metrics.items()} == {"loss": (), "accuracy": ()}
  assert bool(state.loss_state) == row.stateful
  assert ("projection" in state.params) == row.contrastive
  assert ("bias" in state.params["head"]) == (not row.cosine_head)


def test_a_term_with_memory_remembers_every_batch(mesh):
  """The additive term of CSL's text, over the batches of two steps."""
  states, metrics = steps(make(mesh, "csl_paper"), 2)
  images, labels = normalized(data_of().train_images), data_of().train_labels
  lengths = np.zeros(3)
  for number, state in enumerate(states):
    term = state.loss_state["term"]
    np.testing.assert_array_equal(term["examples"], number * COUNTS)
    np.testing.assert_allclose(term["lengths"], lengths, rtol=1e-4)
    if number < 2:
      (logits, features), _ = outputs("csl_paper", state, images)
      lengths += np.bincount(labels, np.linalg.norm(features, axis=1))
      assert metrics[number]["loss"] > cross_entropies(logits, labels).mean() * (1 + 1e-5)


def test_a_stage_with_a_bank_trains_in_the_loop_and_is_found_again(mesh, tmp_path):
  stage = make(mesh, "semantic_scale", bank=BANK)
  run = support.make_run(mesh, (0, 5), 2)
  state = loop.train(stage, run, tmp_path)
  assert stage.name == "classifier/semantic_scale" and stage.num_steps == 2
  assert np.asarray(state.step).tolist() == [2, 2]
  np.testing.assert_array_equal(state.bank.seen[:, :3], [2 * COUNTS] * 2)
  for leaf in jax.tree.leaves(state.params["conv1"]):
    assert not np.array_equal(leaf[0], leaf[1])  # seeds differ
  records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [(r["step"], r["kind"]) for r in records] == [(0, "eval"), (2, "train"), (2, "eval")]
  assert all(len(r["metrics"]["loss"]) == 2 for r in records)
  again = results.load(tmp_path, mesh)
  for ours, theirs in zip(
    jax.tree.leaves((again.params, again.model_state)),
    jax.tree.leaves((state.params, state.model_state)),
    strict=True,
  ):
    np.testing.assert_array_equal(ours, theirs)


def test_the_bank_holds_the_features_of_the_batches_and_feeds_semantic_scale(mesh):
  stage = make(mesh, "semantic_scale", bank=BANK)
  states, _ = steps(stage, 2)
  for number, state in enumerate(states):
    np.testing.assert_array_equal(state.bank.seen[:3], number * COUNTS)
  np.testing.assert_allclose(states[1].loss_state["weights"]["gamma"], np.ones(3), rtol=1e-6)
  gamma = states[2].loss_state["weights"]["gamma"]
  assert float(gamma.mean()) == pytest.approx(1, rel=1e-5) and float(gamma.std()) > 1e-3
  data = data_of()
  (_, features), _ = outputs("semantic_scale", states[0], normalized(data.train_images))
  for label in range(3):
    per_seed = features[data.train_labels == label]
    np.testing.assert_allclose(states[1].bank.prototype[label], per_seed.mean(axis=0), atol=1e-4)
    for slot in np.asarray(states[1].bank.slots[label][: min(3, COUNTS[label])]):
      assert np.abs(per_seed - slot).max(axis=1).min() < 1e-4


def test_the_bank_is_split_by_class_and_nothing_else_is(mesh):
  stage = make(mesh, "semantic_scale", bank=BANK)
  specs = mesh_lib.state_specs(jax.eval_shape(stage.init, KEY, ()), mesh, "replicated")
  assert set(jax.tree.leaves(specs.replace(bank=None))) == {PartitionSpec()}
  assert set(jax.tree.leaves(specs.bank)) == {PartitionSpec("data")}
  plain = make(mesh)
  specs = mesh_lib.state_specs(jax.eval_shape(plain.init, KEY, ()), mesh, "replicated")
  assert set(jax.tree.leaves(specs)) == {PartitionSpec()}


@pytest.mark.parametrize("loss", ["cross_entropy", "ldam_drw"])
def test_the_loss_falls_and_the_test_set_is_learnt(loss, mesh):
  stage = make(mesh, loss, changed(CONFIG, num_epochs=60.0))
  states, metrics = steps(stage, stage.num_steps)
  evaluate = jax.jit(lambda state: stage.evaluate(state, stage.shared, ()))
  before, after = evaluate(states[0]), evaluate(states[-1])
  assert float(after["loss"]) < 0.5 * float(before["loss"])
  assert float(after["accuracy"]) >= 0.8
  assert metrics[-1]["accuracy"] == 1.0
  assert metrics[29]["loss"] < 0.5 * metrics[0]["loss"]  # before the weights set in
  assert len(states) == 61


# --- folds -----------------------------------------------------------------------------------

# Two that see different shares of the classes, of images that are not alike.
ROWS = np.array([[0, 2, 3, 4, 5, 6, 8, 9, 12, 13], [1, 7, 3, 8, 9, 10, 11, 13, 12, 5]])


def part_of(data, rows):
  return dataclasses.replace(
    data, train_images=data.train_images[rows], train_labels=data.train_labels[rows]
  )


def uneven():
  """Images that grow brighter, so that parts of them have statistics of their own."""
  data = data_of()
  images = (data.train_images * np.linspace(0.2, 1, 14)[:, None, None, None]).astype(np.uint8)
  return dataclasses.replace(data, train_images=images)


@pytest.mark.parametrize(
  "loss",
  ["cross_entropy", "ldam"]
  + [pytest.param(loss, marks=pytest.mark.slow) for loss in ("balanced_softmax", "csl")],
)
def test_a_fold_trains_as_if_there_was_nothing_but_its_part(mesh, loss):
  """By its own class counts and pixel statistics, whatever the rest of the set is like."""
  data, config = uneven(), changed(CONFIG, batch_size=5, num_epochs=1.0)
  stage = make(mesh, loss, config, data, rows=ROWS)
  for run, rows in enumerate(ROWS):
    ours, ours_metrics = steps(stage, 2, jax.tree.map(lambda x, run=run: x[run], stage.per_seed))
    alone = make(mesh, loss, config, part_of(data, rows))
    theirs, theirs_metrics = steps(alone, 2)
    assert stage.num_steps == alone.num_steps == 2
    for a, b in zip(ours_metrics, theirs_metrics, strict=True):
      assert a == pytest.approx(b, rel=1e-4)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
      (ours[-1].params, ours[-1].model_state),
      (theirs[-1].params, theirs[-1].model_state),
    )


def test_what_is_known_of_a_fold_is_of_its_own_images_alone():
  data = uneven()
  rows = np.array([[3, 0, 8, 12, -1, -1], [1, 2, 9, 13, 11, 4]])
  known = image_batches.fold_data(ENCODER, data, rows)
  np.testing.assert_array_equal(known["rows"], rows)
  np.testing.assert_array_equal(known["number"], [4, 6])
  np.testing.assert_array_equal(known["counts"], [[2, 1, 1], [3, 2, 1]])
  for run, per_seed in enumerate((rows[0, :4], rows[1])):
    images = data.train_images[per_seed]
    for name, function in (("pixel_mean", np.mean), ("pixel_std", np.std)):
      np.testing.assert_allclose(
        known["statistics"][name][run], function(images, axis=(0, 1, 2)), rtol=1e-4
      )
  given = dataclasses.replace(ENCODER, input=InputConfig((0.5,) * 3, (0.25,) * 3, "rgb"))
  statistics = image_batches.fold_data(given, data, rows)["statistics"]
  np.testing.assert_allclose(statistics["pixel_mean"], np.full((2, 3), 127.5), rtol=1e-6)


def test_a_fold_draws_its_own_images_evenly_however_few_they_are(mesh):
  data, rows = uneven(), np.full((1, 14), -1)
  rows[0, :6] = [0, 5, 7, 8, 10, 13]  # of 14 places
  stage = make(mesh, config=changed(CONFIG, batch_size=7), data=data, rows=rows)
  fold = jax.tree.map(lambda x: x[0], stage.per_seed)
  state = jax.jit(stage.init)(KEY, fold)
  draw = jax.jit(jax.vmap(lambda step: stage.batch(state.replace(step=step), stage.shared, fold)))
  drawn = draw(jnp.arange(400))
  times = np.bincount(np.asarray(drawn.rows.labels).ravel(), minlength=3)
  np.testing.assert_allclose(times / times.sum(), [3 / 6, 2 / 6, 1 / 6], atol=0.03)
  means = np.asarray(drawn.images).reshape(2800, -1).mean(axis=1).round(4)
  _, of_image = np.unique(means, return_counts=True)
  assert len(of_image) == 6
  np.testing.assert_allclose(of_image / 2800, np.full(6, 1 / 6), atol=0.03)


@pytest.mark.parametrize("loss", losses.LOSSES)
def test_every_loss_of_the_table_trains_in_folds(loss, mesh):
  row = losses.LOSSES[loss]
  stage = make(
    mesh, loss, changed(CONFIG, batch_size=5), bank=BANK if row.needs_bank else None, rows=ROWS
  )
  per_seed = jax.tree.map(lambda x: x[0], stage.per_seed)
  state = jax.eval_shape(stage.init, KEY, per_seed)
  after, _ = jax.eval_shape(stage.step, state, stage.shared, per_seed)
  assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, after)
  assert stage.evaluate is None


def test_images_pass_each_encoder_by_the_statistics_of_its_fold(mesh):
  data = uneven()
  stage = make(mesh, data=data, config=changed(CONFIG, batch_size=5), rows=ROWS)
  states = jax.vmap(stage.init)(jax.random.split(KEY, 2), stage.per_seed)
  e = SimpleNamespace(config=SimpleNamespace(encoder=ENCODER), dataset=data, mesh=mesh)
  images = data.test_images
  statistics = stage.per_seed["statistics"]
  logits, features = forward_images(e, "cross_entropy", states, images, statistics)
  whole, _ = forward_images(e, "cross_entropy", states, images)
  model = encoder.make_model(ENCODER, "cross_entropy", 3)
  for run, rows in enumerate(ROWS):
    state = jax.tree.map(lambda x, run=run: x[run], states)
    for seen, found in ((data.train_images[rows], logits), (data.train_images, whole)):
      mean, std = (f(seen, axis=(0, 1, 2)) for f in (np.mean, np.std))
      inputs = ((images - mean) / std).astype(np.float32)
      expected = jax.jit(lambda s, x: encoder.apply_eval(model, s, x))(state, inputs)
      np.testing.assert_allclose(found[run], expected[0], rtol=1e-3, atol=1e-4)
  assert np.abs(logits - whole).max() > 1e-2 and features.shape[:2] == (2, len(images))


# --- scores, weights to start from, streams --------------------------------------------------


def test_held_out_images_are_scored_beside_the_test_set(mesh):
  data = data_of(holdout=7)
  stage = make(mesh, data=data)
  state = steps(stage, 0)[0][0]
  scores = jax.jit(lambda s: stage.evaluate(s, stage.shared, ()))(state)
  assert set(scores) == {"loss", "accuracy", "holdout_loss", "holdout_accuracy"}
  mean, std = (f(data.train_images, axis=(0, 1, 2)) for f in (np.mean, np.std))
  model = encoder.make_model(ENCODER, "cross_entropy", 3)
  for prefix, images, labels in (
    ("", data.test_images, data.test_labels),
    ("holdout_", data.holdout_images, data.holdout_labels),
  ):
    inputs = ((images - mean) / std).astype(np.float32)
    logits, _ = jax.jit(lambda s, x: encoder.apply_eval(model, s, x))(state, inputs)
    hits = (np.asarray(logits).argmax(axis=1) == labels).mean()
    assert float(scores[f"{prefix}accuracy"]) == pytest.approx(hits)
    loss = cross_entropies(logits, labels).mean()
    assert float(scores[f"{prefix}loss"]) == pytest.approx(loss, rel=1e-4)
  stage = make(mesh)
  without = jax.eval_shape(stage.evaluate, state, stage.shared, ())
  assert set(without) == {"loss", "accuracy"}


class Colours:
  """Images of one colour each: every crop of them is the same."""

  def __init__(self, colours):
    self.colours = colours

  def __len__(self):
    return len(self.colours)

  def __getitem__(self, index):
    return Image.fromarray(np.broadcast_to(self.colours[index], (9, 11, 3)).astype(np.uint8))


def test_streamed_images_train_as_those_in_memory(mesh):
  """Whole sets as batches, of images that no crop changes."""
  lazy = LazyImages(Colours(np.random.default_rng(0).integers(0, 256, (14, 3))), SIZE)
  given = dataclasses.replace(ENCODER, input=InputConfig((0.5,) * 3, (0.25,) * 3, "bgr"))
  made = {}
  for name, images in (("memory", lazy[:]), ("stream", lazy)):
    data = data_of(images)
    assert data.streamed == (name == "stream")
    stage = make(mesh, data=data, encoder_config=given)
    assert (stage.evaluate is None) == (stage.batches is not None) == data.streamed
    assert ("images" in stage.shared) == (not data.streamed)
    made[name] = steps(stage, 3)
  for ours, theirs in zip(made["stream"][0], made["memory"][0], strict=True):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4),
      (ours.params, ours.model_state),
      (theirs.params, theirs.model_state),
    )
  losses_of = [[m["loss"] for m in metrics] for _, metrics in made.values()]
  np.testing.assert_allclose(*losses_of, rtol=1e-3)
  assert len(set(losses_of[0])) == 3


def test_streams_differ_by_seed_and_stage_and_go_on_at_a_step():
  lazy = LazyImages(Colours(np.arange(42).reshape(14, 3)), SIZE)
  data, config = data_of(lazy), CONFIG

  def batch(name, seed, step):
    iterator = image_batches.host_batches(data, 7, config.stream, name)(seed, step)
    first = next(iterator)
    iterator.close()
    colours = first["images"][:, 0, 0, 0]
    np.testing.assert_array_equal(first["labels"], data.train_labels[colours // 3])
    return colours.tolist()

  assert batch("a", 0, 1) == batch("a", 0, 1)
  drawn = [batch("a", 0, 0), batch("a", 0, 1), batch("a", 1, 0), batch("b", 0, 0)]
  assert len({tuple(colours) for colours in drawn}) == 4
  assert sorted(drawn[0] + drawn[1]) == list(range(0, 42, 3))  # two halves of an epoch
  assert image_batches.host_batches(data_of(), 7, config.stream, "a") is None
