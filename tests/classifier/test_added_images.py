"""Generated images beside real ones: which rows a batch has, what they weigh, what they change."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdiff.classifier import added_images, encoder, encoder_training, losses
from memdiff.classifier.added_images import AddedImagesConfig
from memdiff.classifier.encoder_training import Recipe
from memdiff.memory.memory_bank import BankConfig
from memdiff.runtime import mesh as mesh_lib
from tests.classifier import test_encoder_training as training

REAL, GENERATED, PLACES = 14, 6, 9  # images; places of the pool
CONFIG = dataclasses.replace(training.CONFIG, batch_size=7, num_epochs=10.0)  # 20 steps
ROWS = np.arange(REAL)[None]


@pytest.fixture(scope="module")
def mesh():
  return mesh_lib.make_mesh()


def data_of():
  """Real images are dark, so that generated ones are told apart by their pixels."""
  data = training.data_of()
  return dataclasses.replace(data, train_images=data.train_images // 2)


def pool(confidence=None, used=GENERATED, rows=ROWS[0], places=PLACES):
  images = np.full((used, *data_of().train_images.shape[1:]), 255, np.uint8)
  confidence = np.ones(used) if confidence is None else confidence
  labels = np.array([1, 1, 2, 2, 2, 0])[:used]
  return added_images.make_pool(images, labels, confidence, places, rows, num_train=REAL)


def stage_of(mesh, config, made=None, *, bank=None, loss="cross_entropy", mixup=0.0, counts="real"):
  classifier = dataclasses.replace(CONFIG, augment=dataclasses.replace(CONFIG.augment, mixup=mixup))
  data = data_of()
  shared = encoder.device_data(training.ENCODER.input, data, mesh)
  recipe = Recipe(classifier, training.ENCODER, loss, bank, images=config, counts=counts)
  stage = encoder_training.make_stage(recipe, data, shared, mesh, ROWS)
  pools = added_images.stack_pools([made if made is not None else pool()])
  return dataclasses.replace(
    stage, per_seed=stage.per_seed | {"images": mesh_lib.replicate(mesh, pools)}
  )


def fold_of(stage):
  return jax.tree.map(lambda x: x[0], stage.per_seed)


def drawn(stage, number):
  """The rows of the first steps."""
  state, fold = jax.jit(stage.init)(training.KEY, ()), fold_of(stage)
  draw = jax.jit(lambda step: stage.batch(state.replace(step=step), stage.shared, fold).rows)
  return [jax.tree.map(np.asarray, draw(jnp.int32(step))) for step in range(number)]


# --- which rows ------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "number"), [(1.0, 7), (0.5, 4), (2.0, 14), (0.01, 1)])
def test_joint_batches_have_generated_rows_behind_the_real_ones(mesh, share, number):
  rows = drawn(stage_of(mesh, AddedImagesConfig(share=share)), 8)
  for batch in rows:
    assert batch.real.tolist() == [True] * 7 + [False] * number
  seen = np.concatenate([batch.labels[~batch.real] for batch in rows])
  assert set(seen) <= {0, 1, 2}
  real = np.concatenate([batch.labels[batch.real] for batch in rows])
  counts = np.bincount(data_of().train_labels)
  assert np.bincount(real).tolist() == (4 * counts).tolist()  # four epochs, as without a pool


def test_merged_batches_take_what_comes_and_every_image_once_in_an_epoch(mesh):
  config = AddedImagesConfig(way="merged")
  rows = drawn(stage_of(mesh, config, pool(places=GENERATED)), 20)
  assert all(len(batch.labels) == 7 for batch in rows)
  real = np.concatenate([batch.real for batch in rows])
  assert (~real).sum() == 7 * GENERATED  # 140 rows are seven epochs of 20
  labels = np.concatenate([batch.labels for batch in rows])
  expected = np.bincount(data_of().train_labels, minlength=3) + np.array([1, 2, 3])
  assert np.bincount(labels).tolist() == (7 * expected).tolist()


def test_a_pool_says_which_of_its_places_are_used():
  made = pool(used=4, rows=np.arange(0, REAL, 2))
  own = [*range(0, REAL, 2), *range(REAL, REAL + 4)]
  assert made.union.tolist() == own + [0] * (REAL + PLACES - len(own))
  assert made.number == 4
  assert made.trust[4:].tolist() == [0] * 5


@pytest.mark.parametrize("way", added_images.WAYS)
def test_images_of_a_pool_that_is_not_full_are_drawn_evenly(mesh, way):
  """Five of nine places are used; no class of the first ones comes more often."""
  stage = stage_of(mesh, AddedImagesConfig(way=way), pool(used=5))
  state, fold = jax.jit(stage.init)(training.KEY, ()), fold_of(stage)
  draw = jax.vmap(lambda step: stage.batch(state.replace(step=step), stage.shared, fold).rows)
  rows = jax.tree.map(np.asarray, jax.jit(draw)(jnp.arange(1000)))
  labels = rows.labels[~rows.real]
  shares = np.bincount(labels, minlength=3) / len(labels)
  np.testing.assert_allclose(shares, [0, 2 / 5, 3 / 5], atol=0.03)
  expected = 7 if way == "joint" else 7 * 5 / (REAL + 5)
  assert len(labels) / 1000 == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("reason", ["an empty pool", "a warm-up"])
def test_without_generated_images_a_step_is_that_of_real_ones(mesh, reason):
  """Batch normalisation sees real images alone, and the loss and the bank do, too."""
  bank = BankConfig(num_slots=4)
  warm_up = AddedImagesConfig(share=2.0, warm_up=0.5 if reason == "a warm-up" else 0.0)
  made = pool(used=0 if reason == "an empty pool" else GENERATED)
  ours, alone = stage_of(mesh, warm_up, made, bank=bank), stage_of(mesh, None, bank=bank)
  (_, ours), (metrics,) = training.steps(ours, 1, fold_of(ours))
  (_, alone), (plain,) = training.steps(alone, 1, fold_of(alone))
  assert metrics["generated"] == 0 and metrics["loss"] == pytest.approx(plain["loss"], rel=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    (ours.params, ours.model_state, ours.bank),
    (alone.params, alone.model_state, alone.bank),
  )


def test_pixels_and_labels_belong_together_in_both_ways(mesh):
  for way in added_images.WAYS:
    made = pool()
    config = AddedImagesConfig(way=way)
    key, data = jax.random.key(0), data_of()
    if way == "joint":
      real = added_images.Drawn(data.train_images[:7], data.train_labels[:7])
      rows = added_images.beside(config, key, real, made, jnp.float32(1))
    else:
      places = jnp.arange(REAL + PLACES)
      rows = added_images.merged(
        config, places, data.train_images, jnp.asarray(data.train_labels), made, jnp.float32(1)
      )
    bright = np.asarray(rows.images).reshape(len(rows.labels), -1).min(axis=1) == 255
    assert bright.tolist() == (~np.asarray(rows.real)).tolist(), way


# --- what they weigh -------------------------------------------------------------------------


def test_trust_has_mean_one_within_each_class():
  confidence = np.array([0.2, 0.6, 0.5, 0.1, 0.9, 0.3])
  trust = pool(confidence).trust[:GENERATED]
  np.testing.assert_allclose(trust, [0.5, 1.5, 1.0, 0.2, 1.8, 1.0], rtol=1e-6)


@pytest.mark.parametrize(
  ("warm_up", "ramp", "expected"),
  [
    (0.0, 0.0, [0.5] * 20),
    (0.5, 0.0, [0.0] * 10 + [0.5] * 10),
    (0.5, 1.0, [0.0] * 10 + [0.05 * i for i in range(1, 11)]),
    (0.0, 0.5, [0.05 * i for i in range(1, 11)] + [0.5] * 10),
  ],
)
def test_a_curriculum_warms_up_and_rises(warm_up, ramp, expected):
  config = AddedImagesConfig(weight=0.5, warm_up=warm_up, ramp=ramp)
  weights = [float(config.weight_at(jnp.int32(step), 20)) for step in range(20)]
  np.testing.assert_allclose(weights, expected, atol=1e-6)


def test_weights_reach_the_rows_and_confidence_is_left_out_if_asked(mesh):
  confidence = np.array([0.2, 0.6, 0.5, 0.1, 0.9, 0.3])
  trusted = {0: {1.0}, 1: {0.5, 1.5}, 2: {1.0, 0.2, 1.8}}
  for trust in (True, False):
    config = AddedImagesConfig(weight=0.5, trust=trust)
    for batch in drawn(stage_of(mesh, config, pool(confidence)), 3):
      assert (batch.weight[batch.real] == 1).all()
      for label, weight in zip(batch.labels[~batch.real], batch.weight[~batch.real], strict=True):
        allowed = trusted[int(label)] if trust else {1.0}
        assert min(abs(weight / 0.5 - a) for a in allowed) < 1e-5


def test_gamma_times_confidence_reaches_the_loss():
  """The value of a batch is the sum of gamma_y weight CE over the sum of the weights, by hand."""
  random, counts = np.random.default_rng(0), np.array([50.0, 10.0, 2.0])
  logits, labels = random.normal(size=(6, 3)), np.array([0, 0, 1, 1, 2, 2])
  weight = np.array([1, 1, 1, 0.5, 1.5, 0.0])
  config = dataclasses.replace(losses.LossConfig(), defer=0.0, beta=0.99)
  objective = losses.make("csl", config, counts, scale=1.0, num_steps=10, steps_per_epoch=1)
  batch = losses.Batch(
    logits=jnp.asarray(logits, jnp.float32), features=jnp.zeros((6, 1)),
    labels=jnp.asarray(labels), weight=jnp.asarray(weight, jnp.float32),
  )  # fmt: skip
  value, _ = objective(batch, {}, jnp.int32(5))
  gamma = (1 - 0.99) / (1 - 0.99**counts)
  gamma /= gamma.mean()
  rows = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(6), labels]
  expected = (gamma[labels] * weight * rows).sum() / weight.sum()
  assert float(value) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", ["cs_inverse", "csl"])
def test_a_row_without_weight_changes_nothing_and_a_weighted_mean_divides_by_weights(loss):
  logits, labels = jnp.asarray(np.random.default_rng(1).normal(size=(6, 3)), jnp.float32), [0, 1, 2]
  objective = losses.make(
    loss, losses.LossConfig(), np.array([9.0, 3.0, 1.0]), scale=1.0, num_steps=10,
    steps_per_epoch=1,
  )  # fmt: skip

  def value(rows, weight):
    batch = losses.Batch(
      logits=logits[:rows], features=jnp.zeros((rows, 1)),
      labels=jnp.asarray((labels * 2)[:rows]), weight=weight,
    )  # fmt: skip
    return float(objective(batch, {}, jnp.int32(0))[0])

  assert value(6, jnp.array([1.0, 1, 1, 0, 0, 0])) == pytest.approx(value(3, None), rel=1e-6)


@pytest.mark.parametrize(
  ("way", "share", "often"),
  # Merged, a generated image is drawn as often as a real one; joint, 6 share the places of 14.
  [("merged", 1.0, 1.0), ("joint", 1.0, 14 / 6), ("joint", 0.5, 4 / 7 * 14 / 6)],
)
def test_effective_counts_add_what_generated_images_weigh_as_often_as_they_are_drawn(
  way, share, often
):
  confidence = np.array([0.2, 0.6, 0.5, 0.1, 0.9, 0.3])
  real = jnp.array([8.0, 4.0, 2.0])
  for trust in (True, False):
    config = AddedImagesConfig(way=way, share=share, trust=trust)
    found = added_images.effective_counts(config, real, pool(confidence), jnp.float32(0.5), 7)
    expected = np.array([8, 4, 2]) + often * 0.5 * np.array([1, 2, 3])
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("way", added_images.WAYS)
def test_effective_counts_are_in_proportion_to_the_weights_that_the_loss_sees(mesh, way):
  config = AddedImagesConfig(way=way, weight=0.5)
  made, real = pool(used=5), np.bincount(data_of().train_labels)
  stage = stage_of(mesh, config, made)
  state, fold = jax.jit(stage.init)(training.KEY, ()), fold_of(stage)
  draw = jax.vmap(lambda step: stage.batch(state.replace(step=step), stage.shared, fold).rows)
  rows = jax.tree.map(np.asarray, jax.jit(draw)(jnp.arange(1000)))
  seen = np.bincount(rows.labels.ravel(), rows.weight.ravel())
  counts = added_images.effective_counts(config, jnp.asarray(real), made, jnp.float32(0.5), 7)
  np.testing.assert_allclose(counts / counts.sum(), seen / seen.sum(), atol=0.01)


def test_the_loss_sees_the_counts_that_are_asked_for(mesh):
  values = {}
  for counts in ("real", "effective"):
    stage = stage_of(mesh, AddedImagesConfig(), loss="balanced_softmax", counts=counts)
    _, (metrics,) = training.steps(stage, 1, fold_of(stage))
    values[counts] = metrics["loss"]
  assert values["real"] != values["effective"]


# --- what they change ------------------------------------------------------------------------


def test_generated_images_never_enter_the_bank(mesh):
  bank = BankConfig(num_slots=4)
  for way in added_images.WAYS:
    stage = stage_of(mesh, AddedImagesConfig(way=way), bank=bank)
    states, metrics = training.steps(stage, 4, fold_of(stage))
    rows = drawn(stage, 4)
    real = np.concatenate([batch.labels[batch.real] for batch in rows])
    seen = np.asarray(states[-1].bank.seen)[:3]
    assert seen.tolist() == np.bincount(real, minlength=3).tolist()
    assert np.isfinite(metrics[-1]["loss"])


def test_mixup_mixes_both_kinds_with_the_weights_of_their_labels(mesh):
  stage = stage_of(mesh, AddedImagesConfig(weight=0.3), mixup=0.5)
  _, metrics = training.steps(stage, 2, fold_of(stage))
  assert all(np.isfinite(m["loss"]) for m in metrics)


def test_merged_images_have_no_curriculum_and_no_share():
  with pytest.raises(ValueError, match="set warm_up and ramp to 0"):
    AddedImagesConfig(way="merged", ramp=0.5)
  with pytest.raises(ValueError, match="share to 1, or way to joint"):
    AddedImagesConfig(way="merged", share=2.0)


def test_more_images_than_places_are_refused():
  with pytest.raises(ValueError, match="cannot hold 6"):
    added_images.make_pool(
      np.zeros((6, 4, 4, 1), np.uint8), np.zeros(6, int), np.ones(6), 5, np.arange(3), num_train=3
    )
