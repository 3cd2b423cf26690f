"""The diffusion stage: what it draws, what it minimises, and the average it keeps."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from input_pipeline.batches import draw_probabilities
from memdiff.diffusion import denoiser_training, objectives, terms
from memdiff.diffusion.denoiser_training import Batch
from memdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig
from memdiff.diffusion.terms import ObjectiveConfig
from memdiff.memory import memory_bank
from memdiff.runtime import train_state
from memdiff.runtime.train_state import OptimizerConfig
from memdiff.synthesis import feature_diffusion
from memdiff.synthesis.denoisers import DenoiserConfig
from memdiff.synthesis.feature_diffusion import DiffusionConfig

CLASSES, DIM, SLOTS = 3, 4, 6
COUNTS = (30, 8, 1)
LABELS = np.repeat(np.arange(CLASSES), COUNTS).astype(np.int32)
CONFIG = DiffusionConfig(
  schedule=ScheduleConfig("cosine", 50),
  prediction="eps",
  objective=ObjectiveConfig(),
  denoiser=DenoiserConfig("mlp", width=32, num_blocks=1, embedding_dim=8, num_heads=2),
  condition="class_and_memory",
  class_exponent=0.5,
  label_dropout=0.1,
  anonymous=0.0,
  displacement=0.0,
  ema_decay=0.9,
  batch_size=64,
  num_steps=120,
  optimizer=OptimizerConfig("adamw", 1e-2, "cosine", (), (), 0.9, False, 0.0, 0.05, 1.0, 1),
)


def make_own(mesh):
  """One run of well separated classes and the bank filled from them."""
  rng = np.random.default_rng(0)
  centres = rng.normal(size=(CLASSES, DIM)) * 2
  features = (centres[LABELS] + 0.1 * rng.normal(size=(len(LABELS), DIM))).astype(np.float32)
  update = jax.jit(functools.partial(memory_bank.update, horizon=1000, mesh=mesh))
  empty = memory_bank.create(CLASSES, SLOTS, DIM)
  bank = update(empty, features, LABELS, np.ones(len(LABELS), bool), jax.random.key(0))
  runs = features[None], LABELS[None], first_run(bank)
  return jax.tree.map(lambda x: x[0], feature_diffusion.make_data(*runs, CLASSES, 0.5, mesh))


def first_run(tree):
  return jax.tree.map(lambda x: x[None], tree)


# --- drawing ---------------------------------------------------------------------------------


def draw_many(mesh, labels, num_classes, exponent, number=20_000):
  """Rows drawn from each of R runs with labels [R, N]."""
  features = jnp.zeros((*labels.shape, 1))
  own = feature_diffusion.make_data(features, labels, (), num_classes, exponent, mesh)
  keys = jax.random.split(jax.random.key(1), len(labels))
  draw = jax.jit(jax.vmap(lambda key, own: feature_diffusion.draw_rows(key, own, number)))
  index, label = map(np.asarray, draw(keys, own))
  np.testing.assert_array_equal(label, np.take_along_axis(labels, index, axis=1))
  return index


def shuffled(counts):
  return np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_classes_are_drawn_by_their_tempered_count(mesh, exponent):
  counts = np.array([100, 30, 10, 2])
  labels = shuffled(counts)
  index = draw_many(mesh, labels[None], 4, exponent)[0]
  observed = np.bincount(labels[index], minlength=4)
  expected = counts**exponent / (counts**exponent).sum() * len(index)
  assert stats.chisquare(observed, expected).pvalue > 1e-3
  wrong = counts ** (exponent + 0.15)
  assert stats.chisquare(observed, wrong / wrong.sum() * len(index)).pvalue < 1e-6


def test_members_of_a_class_are_drawn_alike(mesh):
  labels = shuffled([40, 15, 5])
  index = draw_many(mesh, labels[None], 3, 0.0)[0]
  for label in range(3):
    members = np.flatnonzero(labels == label)
    observed = np.bincount(index[labels[index] == label], minlength=len(labels))[members]
    assert stats.chisquare(observed).pvalue > 1e-3


@pytest.mark.parametrize("counts", [[0, 5, 0, 3], [5, 0, 0, 3], [4, 3, 0, 0]])
def test_empty_classes_are_never_drawn(mesh, counts):
  labels = shuffled(counts)
  index = draw_many(mesh, labels[None], 4, 0.5, 5000)[0]
  assert set(labels[index]) == {c for c, n in enumerate(counts) if n}
  np.testing.assert_array_equal(draw_probabilities(np.array(counts), 0.0) > 0, np.array(counts) > 0)


def test_runs_draw_from_their_own_rows_and_never_from_padding(mesh):
  """Folds of different sizes in one array; 3 and more pad, wherever they stand."""
  runs = np.array([[0, 1, 2, 0, 1, 0, 3, 3], [3, 2, 2, 2, 2, 2, 2, 1], [1, 1, 3, 7, 0, 9, 2, 3]])
  index = draw_many(mesh, runs, 3, 1.0, 4000)
  for labels, drawn in zip(runs, index, strict=True):
    observed = np.bincount(drawn, minlength=8)
    assert not observed[labels >= 3].any()
    assert stats.chisquare(observed[labels < 3]).pvalue > 1e-3  # exponent 1: all rows alike


def test_runs_with_the_same_labels_may_share_them(mesh):
  features = jnp.zeros((2, len(LABELS), 1))
  shared = feature_diffusion.make_data(features, LABELS, (), CLASSES, 0.5, mesh)
  each = feature_diffusion.make_data(features, np.stack([LABELS] * 2), (), CLASSES, 0.5, mesh)
  jax.tree.map(np.testing.assert_array_equal, shared, each)


def draw_batch(mesh, label_dropout, seed=3, batch_size=512, **settings):
  own = make_own(mesh)
  config = dataclasses.replace(
    CONFIG, label_dropout=label_dropout, batch_size=batch_size, **settings
  )
  draw = functools.partial(
    feature_diffusion.draw_batch, config=config, num_classes=CLASSES, mesh=mesh
  )
  batch = jax.jit(draw)(jax.random.key(seed), own)
  return own, jax.tree.map(np.asarray, batch)


def test_a_batch_tells_the_counts_of_its_classes_if_targets_are_transferred(mesh):
  transfer = terms.TransferConfig(rule="t2h")
  objective = ObjectiveConfig(transfer=transfer)
  _, plain = draw_batch(mesh, 0.3, objective=objective)
  assert set(plain.class_count) == set(COUNTS)
  told = plain.label < CLASSES
  np.testing.assert_array_equal(plain.class_count[told], np.array(COUNTS)[plain.label[told]])
  _, moved = draw_batch(mesh, 0.0, objective=objective, anonymous=0.5, displacement=1.0)
  assert 0.3 < (moved.class_count == 0).mean() < 0.6  # classes that were made up
  assert draw_batch(mesh, 0.3)[1].class_count is None


def test_a_batch_carries_its_classes_memory_without_itself(mesh):
  own, batch = draw_batch(mesh, 0.0)
  features = np.asarray(own.exemplars.features)
  for x0, label, slots, mask, prototype, count in zip(
    batch.x0, batch.label, batch.memory.slots, batch.memory.mask, batch.memory.prototype,
    batch.memory.count, strict=True,
  ):  # fmt: skip
    row = np.flatnonzero((features == x0).all(axis=1))
    assert len(row) == 1 and LABELS[row[0]] == label
    context = slots[mask]
    assert not (context == x0).all(axis=1).any()
    members = features[label == LABELS]
    assert all((members == c).all(axis=1).any() for c in context)
    if label == 2:  # its only member is left out
      assert not mask.any() and count == 0 and not prototype.any()
    elif count == COUNTS[label] - 1:
      others = members[(members != x0).any(axis=1)]
      np.testing.assert_allclose(prototype, others.mean(axis=0), atol=1e-5)
    else:
      assert count == mask.sum() < COUNTS[label]
      np.testing.assert_allclose(prototype, context.mean(axis=0), atol=1e-5)
  sizes = set(batch.memory.mask.sum(axis=1)[batch.label == 1])
  assert {1, 2, 3} <= sizes  # few-exemplar contexts are in distribution


def test_label_dropout_takes_class_and_memory_away_together(mesh):
  _, batch = draw_batch(mesh, 0.3, batch_size=2000)
  dropped = batch.label == CLASSES
  assert stats.binomtest(int(dropped.sum()), 2000, 0.3).pvalue > 1e-3
  assert not batch.memory.mask[dropped].any() and not batch.memory.prototype[dropped].any()
  assert not batch.memory.slots[dropped].any() and not batch.memory.count[dropped].any()
  assert batch.memory.mask[batch.label < 2].any(axis=1).all()


@pytest.mark.parametrize(("share", "number"), [(0.0, 0), (1.0, 512)])
def test_label_dropout_of_none_and_of_all(mesh, share, number):
  _, batch = draw_batch(mesh, share)
  assert (batch.label == CLASSES).sum() == number


def test_anonymous_rows_keep_their_memory_and_lose_their_label(mesh):
  _, batch = draw_batch(mesh, 0.0, anonymous=0.4, batch_size=2000)
  hidden = batch.label == CLASSES
  assert stats.binomtest(int(hidden.sum()), 2000, 0.4).pvalue > 1e-3
  kept = batch.memory.count[hidden] > 0
  assert kept.mean() > 0.5  # all but the class of one example


def test_the_condition_memory_shows_no_label(mesh):
  """Otherwise the same batch: as many rows are moved, as many dropped."""
  settings = {"anonymous": 0.5, "displacement": 1.0}
  _, both = draw_batch(mesh, 0.2, **settings)
  _, batch = draw_batch(mesh, 0.2, condition="memory", **settings)
  assert (batch.label == CLASSES).all() and (both.label < CLASSES).any()
  jax.tree.map(np.testing.assert_array_equal, batch.memory, both.memory)
  np.testing.assert_array_equal(batch.x0, both.x0)


def test_the_condition_class_shows_no_memory_and_moves_nothing(mesh):
  own, batch = draw_batch(mesh, 0.3, condition="class", anonymous=0.5, displacement=1.0)
  assert not any(np.asarray(part).any() for part in jax.tree.leaves(batch.memory))
  dropped = batch.label == CLASSES
  assert stats.binomtest(int(dropped.sum()), len(dropped), 0.3).pvalue > 1e-3
  features = np.asarray(own.exemplars.features)
  for x0, label in zip(batch.x0[~dropped], batch.label[~dropped], strict=True):
    assert (features[label == LABELS] == x0).all(axis=1).any()


@pytest.mark.parametrize(
  ("settings", "learned"),
  [
    ({}, ("class_and_memory", "memory")),
    ({"anonymous": 0.0}, ("class_and_memory",)),
    ({"anonymous": 1.0}, ("memory",)),
    ({"condition": "memory", "anonymous": 0.0}, ("memory",)),
    ({"condition": "class"}, ("class",)),
    ({"label_dropout": 1.0}, ()),
    ({"condition": "class", "label_dropout": 1.0}, ()),
  ],
)
def test_what_a_denoiser_learns_is_what_its_batches_show(mesh, settings, learned):
  settings = {"anonymous": 0.5, "label_dropout": 0.1, **settings}
  config = dataclasses.replace(CONFIG, **settings)
  assert config.learned() == learned
  _, batch = draw_batch(mesh, settings.pop("label_dropout"), **settings)
  told, known = batch.label < CLASSES, batch.memory.count > 0
  shown = {"class_and_memory": told & known, "memory": ~told & known, "class": told & ~known}
  if config.condition != "class":  # else: the only member of a class has no memory to show
    del shown["class"]
  assert tuple(name for name, rows in shown.items() if rows.any()) == learned


def test_descriptions_take_the_place_of_labels_but_of_classes_that_are_moved(mesh):
  own = make_own(mesh)
  table = np.arange(1.0, 1 + len(own.bank.seen), dtype=np.float32)[:, None]
  own = own.replace(bank=own.bank.replace(class_embeddings=jnp.asarray(table)))
  config = dataclasses.replace(
    CONFIG, label_dropout=0.2, anonymous=0.5, displacement=1.0, batch_size=512,
    condition=feature_diffusion.DESCRIBED,
    objective=with_terms(supcon=1.0),
  )  # fmt: skip
  draw = functools.partial(
    feature_diffusion.draw_batch, config=config, num_classes=CLASSES, mesh=mesh
  )
  batch = jax.tree.map(np.asarray, jax.jit(draw)(jax.random.key(3), own))
  assert (batch.label == CLASSES).all()
  told, still = batch.memory.class_embeddings[:, 0], batch.true_label < CLASSES
  assert not told[~still].any()
  assert set(told[still] - batch.true_label[still] - 1) <= {0, *(-1.0 - np.arange(CLASSES))}
  assert 0.3 < (told > 0).mean() < 0.5  # (1 - 0.2) (1 - 0.5)
  np.testing.assert_array_equal(told[told > 0], batch.true_label[told > 0] + 1)


def test_displacement_moves_feature_and_memory_of_chosen_rows_alike():
  rng = np.random.default_rng(0)
  prototype = rng.normal(size=(6, DIM)).astype(np.float32)
  slots = rng.normal(size=(6, SLOTS, DIM)).astype(np.float32)
  mask = np.arange(SLOTS)[None] < np.array([6, 3, 1, 0, 6, 2])[:, None]
  count = mask.sum(axis=1).astype(np.float32)
  memory = memory_bank.Memory(*map(jnp.asarray, (prototype, slots, mask, count)))
  chosen = np.array([True, True, False, False, True, True])  # row 3 has no memory to move

  def shift_of(strength):
    key = jax.random.key(4)
    return np.asarray(feature_diffusion.displacements(key, memory, jnp.asarray(chosen), strength))

  shift = shift_of(1.0)
  assert not shift[~chosen].any()
  assert (np.abs(shift[chosen]).max(axis=1) > 1e-3).sum() >= 3  # two prototypes may coincide
  m = jax.tree.map(np.asarray, feature_diffusion.move(memory, jnp.asarray(shift)))
  np.testing.assert_allclose(m.prototype, prototype + shift, atol=1e-6)
  np.testing.assert_allclose(m.slots, slots + shift[:, None] * mask[:, :, None], atol=1e-6)
  # along differences of prototypes: shift = amount (p_i - p_j)
  differences = (prototype[:, None] - prototype[None]).reshape(-1, DIM)
  norms = np.linalg.norm(differences, axis=1)
  for row in shift[chosen]:
    if np.linalg.norm(row) > 1e-3:
      cosine = differences @ row / np.maximum(norms, 1e-9) / np.linalg.norm(row)
      assert np.abs(cosine).max() > 1 - 1e-5
  np.testing.assert_allclose(shift_of(2.0), 2 * shift, atol=1e-5)
  assert not shift_of(0.0).any()


def test_anonymous_rows_lie_as_far_from_their_memory_as_before(mesh):
  _, still = draw_batch(mesh, 0.0, anonymous=0.5)
  _, moved = draw_batch(mesh, 0.0, anonymous=0.5, displacement=1.0)
  shift = moved.x0 - still.x0
  hidden = (still.label == CLASSES) & (still.memory.count > 0)
  assert (np.abs(shift[hidden]).max(axis=1) > 1e-3).mean() > 0.5 and not shift[~hidden].any()
  np.testing.assert_allclose(moved.memory.prototype - still.memory.prototype, shift, atol=1e-5)


# --- what terms of the objective need ---------------------------------------------------------


def with_terms(**weights):
  """The plain objective with these weights of supcon and cbdm."""
  changed = {
    name: dataclasses.replace(getattr(CONFIG.objective, name), weight=weight)
    for name, weight in weights.items()
  }
  return ObjectiveConfig(**changed)


def test_true_labels_are_known_where_the_label_is_dropped(mesh):
  own, batch = draw_batch(mesh, 0.5, anonymous=0.5, objective=with_terms(supcon=1.0))
  features = np.asarray(own.exemplars.features)
  nearest = np.abs(features[None] - batch.x0[:, None]).max(axis=2).argmin(axis=1)
  np.testing.assert_array_equal(batch.true_label, LABELS[nearest])
  assert (batch.label == CLASSES).any()


def test_a_class_that_was_moved_is_a_class_of_its_own(mesh):
  settings = {"anonymous": 0.5, "objective": with_terms(supcon=1.0)}
  _, still = draw_batch(mesh, 0.1, **settings)
  _, batch = draw_batch(mesh, 0.1, displacement=1.0, **settings)
  chosen = (batch.label == CLASSES) & (batch.memory.count > 0)
  np.testing.assert_array_equal(batch.true_label[~chosen], still.true_label[~chosen])
  own = batch.true_label[chosen]
  assert chosen.sum() > 100 and len(set(own)) == len(own) and own.min() >= CLASSES


@pytest.mark.parametrize("labels", ["empirical", "uniform"])
def test_other_classes_come_with_their_memory(mesh, labels):
  objective = with_terms(cbdm=1.0)
  objective = dataclasses.replace(objective, other_labels=labels)
  own, batch = draw_batch(mesh, 0.0, batch_size=3000, objective=objective)
  probabilities = {"empirical": np.array(COUNTS) / sum(COUNTS), "uniform": np.full(3, 1 / 3)}
  observed = np.bincount(batch.other_label, minlength=CLASSES)
  assert stats.chisquare(observed, probabilities[labels] * 3000).pvalue > 1e-3
  assert abs(np.corrcoef(batch.label, batch.other_label)[0, 1]) < 0.08  # independent
  features = np.asarray(own.exemplars.features)
  for label, other, slots, mask in zip(
    batch.label[:100], batch.other_label, batch.other_memory.slots, batch.other_memory.mask,
    strict=False,
  ):  # fmt: skip
    stored = [(features[other == LABELS] == slot).all(axis=1).any() for slot in slots[mask]]
    assert all(stored) and (len(stored) > 0 or label == other == 2)


def test_the_other_condition_is_hidden_dropped_and_moved_like_the_own(mesh):
  objective = with_terms(cbdm=1.0)
  settings = {"anonymous": 0.5, "objective": objective, "batch_size": 1000}
  _, still = draw_batch(mesh, 0.3, **settings)
  _, batch = draw_batch(mesh, 0.3, displacement=1.0, **settings)
  np.testing.assert_array_equal(batch.label == CLASSES, batch.other_label == CLASSES)
  shift = batch.x0 - still.x0
  known = batch.other_memory.count > 0
  np.testing.assert_allclose(
    (batch.other_memory.prototype - still.other_memory.prototype)[known], shift[known], atol=1e-5
  )
  assert np.abs(shift[known]).max() > 1
  emptied = (batch.label == CLASSES) & ~known
  assert stats.binomtest(int(emptied.sum()), 1000, 0.3).pvalue > 1e-3
  told = batch.label < CLASSES
  same = told & (batch.other_label == batch.label)
  alike = (batch.memory.prototype == batch.other_memory.prototype).all(axis=1)
  assert same.sum() > 50 and alike[same].all() and not alike[told & ~same].any()


def test_the_unconditional_model_is_trained_on_the_data_themselves(mesh):
  """A row without label and memory has nothing to tell it that its class was moved."""
  own, batch = draw_batch(mesh, 0.5, anonymous=0.5, displacement=1.0)
  nothing_known = (batch.label == CLASSES) & ~batch.memory.mask.any(axis=1)
  features = np.asarray(own.exemplars.features)
  distance = np.abs(features[None] - batch.x0[nothing_known][:, None]).max(axis=2).min(axis=1)
  assert nothing_known.sum() > 100 and (distance < 1e-6).all()


# --- training --------------------------------------------------------------------------------


def train(stage, num_steps, own):
  """Plain steps of one seed: the states' params and averages, and the losses."""
  state = jax.jit(stage.init)(jax.random.key(0), own)
  history = [(state.params, state.ema_params)]
  step, losses = jax.jit(stage.step), []
  for _ in range(num_steps):
    state, metrics = step(state, stage.shared, own)
    history.append((state.params, state.ema_params))
    losses.append(float(metrics["loss"]))
  return state, history, losses


@pytest.fixture(scope="module")
def trained(mesh):
  own = make_own(mesh)
  stage = feature_diffusion.make_stage(CONFIG, first_run(own), CLASSES, mesh)
  return train(stage, 120, own)


def test_the_loss_starts_at_the_noise_and_falls(trained):
  _, _, losses = trained
  assert losses[0] == pytest.approx(1.0, abs=0.15)  # nothing is predicted: E eps^2
  assert np.mean(losses[-30:]) < 0.6 * np.mean(losses[:10])


def test_the_average_follows_its_formula_with_warm_up(trained):
  _, history, _ = trained
  leaf = jax.tree.leaves
  for step in (1, 2, 3, 60, 120):
    rate = min(CONFIG.ema_decay, (1 + step) / (10 + step))
    triples = zip(leaf(history[step - 1][1]), leaf(history[step][0]), leaf(history[step][1]),
                  strict=True)  # fmt: skip
    for before, params, after in triples:
      expected = rate * np.asarray(before) + (1 - rate) * np.asarray(params)
      np.testing.assert_allclose(after, expected, atol=1e-6)


def test_the_average_differs_from_the_weights_it_averages(mesh, trained):
  _, history, _ = trained
  params, average = history[20]
  gaps = [float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (params, average)),
                                                      strict=True)]  # fmt: skip
  assert max(gaps) > 1e-3
  one, other = history[0]
  jax.tree.map(np.testing.assert_array_equal, one, other)  # they start alike


def test_the_step_counts_itself(trained):
  assert int(trained[0].step) == 120


def test_update_ema_stops_warming_up_at_the_decay():
  for step, rate in ((0, 0.1), (8, 0.5), (10_000, 0.9)):
    new = train_state.update_ema({"w": jnp.zeros(2)}, {"w": jnp.ones(2)}, jnp.array(step), 0.9)
    np.testing.assert_allclose(new["w"], 1 - rate, rtol=1e-5)


def test_squared_error_is_a_mean_per_sample_of_any_shape():
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(2, 4, 3, 2, 5)).astype(np.float32)
  expected = ((a - b) ** 2).reshape(4, -1).mean(axis=1)
  np.testing.assert_allclose(objectives.mean_squared_error(a, b), expected, rtol=1e-5)


@pytest.mark.parametrize("prediction", objectives.PREDICTIONS)
def test_the_target_of_each_prediction_gives_x0_back(prediction):
  rng = np.random.default_rng(1)
  x0, eps = rng.normal(size=(2, 5, 3, 2))
  abar = rng.uniform(0.1, 0.9, size=(5, 1, 1))
  signal, noise = np.sqrt(abar), np.sqrt(1 - abar)
  target = objectives.target(prediction, x0, eps, signal, noise)
  a, b = objectives.x0_weights(prediction, signal, noise)
  np.testing.assert_allclose(a * (signal * x0 + noise * eps) + b * target, x0, atol=1e-9)
  if prediction == "v":
    np.testing.assert_allclose(target, signal * eps - noise * x0)


def test_predictions_are_trained_towards_different_targets(mesh):
  """A denoiser that returns nothing has the mean square of its target for a loss."""
  images = 3 + jax.random.normal(jax.random.key(0), (1, 4000, 2))

  class Nothing(nn.Module):
    @nn.compact
    def __call__(self, x_t, t, label, memory):
      return self.param("zero", nn.initializers.zeros, ()) * x_t, label

  def draw(key, shared, own):
    del key, shared
    return Batch(x0=own, label=jnp.zeros(own.shape[0], int), memory=())

  abar = NoiseSchedule(CONFIG.schedule).alphas_bar
  power = float(jnp.mean(images**2))
  expected = {"eps": 1.0, "x0": power, "v": np.mean(abar + (1 - abar) * power)}
  for prediction, value in expected.items():
    config = dataclasses.replace(CONFIG, prediction=prediction)
    stage = denoiser_training.make_stage(config, Nothing(), draw, (), images, mesh)
    losses = train(stage, 1, images[0])[2]
    assert losses[0] == pytest.approx(value, rel=0.06), prediction


class Spy(nn.Module):
  """A denoiser of images that gives back what it was shown, scaled."""

  @nn.compact
  def __call__(self, x_t, t, label, memory):
    assert memory == ()
    scale = self.param("scale", nn.initializers.ones, ())
    return scale * x_t, label


def test_the_engine_trains_on_images_as_on_vectors(mesh):
  """With the identity for a denoiser the loss is mean((x_t - eps)^2) of the noised images."""
  images = jax.random.normal(jax.random.key(0), (1, 500, 3, 3, 2))

  def draw(key, shared, own):
    del key, shared
    return Batch(x0=own, label=jnp.zeros(own.shape[0], int), memory=())

  stage = denoiser_training.make_stage(CONFIG, Spy(), draw, (), images, mesh)
  state, _, losses = train(stage, 5, images[0])
  abar = NoiseSchedule(CONFIG.schedule).alphas_bar
  power = float(jnp.mean(images**2))
  expected = np.mean(abar) * power + np.mean((np.sqrt(1 - abar) - 1) ** 2)
  assert losses[0] == pytest.approx(expected, rel=0.1)
  assert float(state.params["scale"]) < 1


# --- terms against NumPy ----------------------------------------------------------------------


def prediction(seed=0, size=6, dim=5, kind="v"):
  """A made-up prediction, one row of which is not told its class."""
  draw = np.random.default_rng(seed)
  schedule = NoiseSchedule(ScheduleConfig())
  t = draw.integers(0, schedule.num_steps, size)
  rows = {name: draw.normal(size=(size, dim)) for name in ("x0", "eps", "output", "other")}
  signal, noise = np.sqrt(schedule.alphas_bar[t]), np.sqrt(1 - schedule.alphas_bar[t])
  label = draw.integers(0, 3, size)
  told = np.where(np.arange(size) == 1, 3, label)
  other = np.where(np.arange(size) == 1, 3, (label + np.arange(size) % 2) % 3)
  batch = Batch(jnp.asarray(rows["x0"]), told, None, true_label=label, other_label=other)
  bottleneck = draw.normal(size=(size, 4))
  layer = {"kernel": draw.normal(size=(4, 3)), "bias": draw.normal(size=3)}
  return terms.Prediction(
    kind=kind,
    batch=batch,
    params={terms.PROJECTION: jax.tree.map(jnp.asarray, layer)},
    x_t=jnp.asarray(signal[:, None] * rows["x0"] + noise[:, None] * rows["eps"]),
    x0=jnp.asarray(rows["x0"]),
    eps=jnp.asarray(rows["eps"]),
    signal=jnp.asarray(signal[:, None]),
    noise=jnp.asarray(noise[:, None]),
    alpha=jnp.asarray(schedule.alphas[t]),
    time=jnp.asarray(t / schedule.num_steps),
    output=jnp.asarray(rows["output"]),
    bottleneck=jnp.asarray(bottleneck),
    denoise=lambda label, memory: jnp.asarray(rows["other"]),
  )


def as_numpy_noise(p, output):
  return np.asarray(p.noise) * np.asarray(p.x_t) + np.asarray(p.signal) * np.asarray(output)


def numpy_supcon(rows, labels, temperature):
  """SupCon of every anchor, in a loop; None without a positive."""
  z = rows / np.linalg.norm(rows, axis=1, keepdims=True)
  terms = []
  for i in range(len(z)):
    positives = [p for p in range(len(z)) if p != i and labels[p] == labels[i]]
    below = sum(np.exp(z[i] @ z[a] / temperature) for a in range(len(z)) if a != i)
    logs = [np.log(np.exp(z[i] @ z[p] / temperature) / below) for p in positives]
    terms.append(-np.mean(logs) if positives else None)
  return terms


@pytest.mark.parametrize("place", ["bottleneck", "image"])
@pytest.mark.parametrize("reading", ["paper", "code"])
def test_corals_term_equals_a_loop_in_numpy(place, reading):
  p = prediction()
  if place == "image":
    layer = {"kernel": jnp.asarray(np.random.default_rng(1).normal(size=(5, 3))),
             "bias": jnp.zeros(3)}  # fmt: skip
    p = dataclasses.replace(p, params={terms.PROJECTION: layer})
  supcon = terms.SupConConfig(
    weight=0.5, decay=0.3, temperature=0.4, projection_dim=3, place=place, reading=reading
  )
  value = terms._supcon(ObjectiveConfig(supcon=supcon), p)
  rows = np.asarray(p.bottleneck)
  if place == "image":  # x0 = s x_t - n v
    rows = np.asarray(p.signal) * np.asarray(p.x_t) - np.asarray(p.noise) * np.asarray(p.output)
  layer = p.params[terms.PROJECTION]
  embedded = rows @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])
  anchors = numpy_supcon(embedded, np.asarray(p.batch.true_label), 0.4)
  weights = 0.5 * np.exp((1 - np.asarray(p.time)) / 0.3)
  known = [i for i, term in enumerate(anchors) if term is not None]
  expected = np.mean([weights[i] * anchors[i] for i in known])
  if reading == "code":
    expected = weights.mean() * 0.4 * np.mean([anchors[i] for i in known])
  np.testing.assert_allclose(value, expected, rtol=1e-4)


def test_the_codes_reading_leaves_corals_term_out_without_labels():
  p = prediction()
  hidden = p.batch.replace(label=np.full(6, 3))
  config = ObjectiveConfig(supcon=terms.SupConConfig(weight=1.0, reading="code", projection_dim=3))
  assert terms._supcon(config, dataclasses.replace(p, batch=hidden)) == 0
  assert terms._supcon(config, p) > 0


def test_diffrops_term_equals_its_formula():
  p = prediction(size=200)
  config = ObjectiveConfig(separation=terms.SeparationConfig(weight=0.7, margin=0.02))
  value = terms._separation(config, p)
  gap = as_numpy_noise(p, p.output) - as_numpy_noise(p, p.denoise(None, None))
  alpha, noise = np.asarray(p.alpha), np.asarray(p.noise)[:, 0]
  kl = (1 - alpha) / (2 * alpha * noise**2) * np.square(gap).mean(axis=1)
  hinge = np.maximum(0.02 - kl, 0) * (np.asarray(p.batch.label) != np.asarray(p.batch.other_label))
  assert (hinge > 0).any() and (hinge == 0).any()
  np.testing.assert_allclose(value, 0.7 * hinge.mean(), rtol=1e-4)


def test_the_capacity_term_equals_its_formula():
  counts, label = np.array([60, 0, 20, 4]), np.array([0, 2, 3, 3, 0, 2])
  p, rng = prediction(), np.random.default_rng(2)
  share, rarity = objectives.capacity_weights(jnp.asarray(counts))
  general = rng.normal(size=p.output.shape)
  batch = p.batch.replace(class_share=share[label], class_rarity=rarity[label])
  p = dataclasses.replace(p, batch=batch, general=jnp.asarray(general))
  capacity = terms.CapacityConfig(consistency=1.5, diversity=0.2)
  value = terms._capacity(ObjectiveConfig(capacity=capacity), p)
  total = 0.0
  for i, y in enumerate(label):
    frequency = {c: counts[c] / 84 for c in (0, 2, 3)}
    inverse = (1 / frequency[y]) / sum(1 / f for f in frequency.values())
    gap = as_numpy_noise(p, p.output)[i] - as_numpy_noise(p, general)[i]
    total += 3 * (1.5 * frequency[y] - 0.2 * inverse) * np.mean(gap**2)
  np.testing.assert_allclose(value, total / 6, rtol=1e-4)
  assert share[1] == rarity[1] == 0


def test_diffrops_divergence_is_that_of_the_reverse_steps():
  """The KL of two Gaussians of variance beta whose means are DDPM's, eq. 11."""
  p = prediction()
  alpha, noise = np.asarray(p.alpha), np.asarray(p.noise)
  beta = 1 - alpha
  ours, other = (as_numpy_noise(p, x) for x in (p.output, p.denoise(None, None)))

  def mean(eps):
    return (np.asarray(p.x_t) - beta[:, None] / noise * eps) / np.sqrt(alpha)[:, None]

  kl = np.square(mean(ours) - mean(other)).sum(axis=1) / (2 * beta)
  hinge = objectives.separation(
    jnp.asarray(ours), jnp.asarray(other), p.alpha, p.noise[:, 0], margin=1e3
  )
  np.testing.assert_allclose((1e3 - hinge) * 5, kl, rtol=2e-2)  # float32 below a margin of 1000
