"""LDMLR's two rows: what they train on, how errors weigh, and that the engine carries them."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from memdiff import config as config_lib
from memdiff.diffusion.sampler import SAMPLERS, model_time
from memdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig
from memdiff.memory import exemplars as exemplars_lib
from memdiff.memory.feature_space import Standardizer
from memdiff.runtime.train_state import OptimizerConfig
from memdiff.synthesis import ldmlr
from memdiff.synthesis.ldmlr import ROWS, NoiseFromSample, TrainingRows
from tests.synthesis.tiny_denoiser import TinyDenoiser

CLASSES, DIM = 2, 4
COUNTS = (40, 12)
CENTRES = np.array([[2.0, -1.0, -2.0, 1.0], [-2.0, 1.0, 2.0, -1.0]])
STANDARDIZER = Standardizer(
  mean=jnp.array([0.5, 1.0, 0.2, 0.4]), scale=jnp.array([0.2, 3, 1, 0.5]), lowest=jnp.zeros(4)
)
BOTH = sorted(ROWS)


def small(name, **fields):
  settings = {"width": 8, "multipliers": (1,), "batch_size": 32, "num_steps": 200} | fields
  return dataclasses.replace(ROWS[name], **settings)


@pytest.fixture
def tiny(monkeypatch):
  monkeypatch.setattr(ldmlr, "make_denoiser", lambda config, c, dim: TinyDenoiser(c, dim))


def make_exemplars(seed=0, padding=3):
  rng = np.random.default_rng(seed)
  labels = np.repeat(np.arange(CLASSES), COUNTS)
  features = CENTRES[labels] + 0.3 * rng.normal(size=(len(labels), DIM))
  features = np.concatenate([features, np.full((padding, DIM), 1e6)]).astype(np.float32)
  labels = np.concatenate([labels, np.full(padding, CLASSES)])
  return exemplars_lib.make(features, labels, CLASSES)


def stacked(*runs):
  return jax.tree.map(lambda *leaves: np.stack(leaves), *runs)


def make_stage(name, mesh, **fields):
  return ldmlr.make_stage(
    name, small(name, **fields), stacked(make_exemplars(0), make_exemplars(1)),
    stacked(STANDARDIZER, STANDARDIZER), CLASSES, mesh,
  )  # fmt: skip


# --- as published ----------------------------------------------------------------------------


def test_the_published_plan_is_a_fifth_of_each_class_and_five_at_least():
  counts = np.array([500, 62, 63, 13, 25, 24, 5, 1, 0])
  expected = [max(round(n * 0.2), 5) if n else 0 for n in counts.tolist()]
  np.testing.assert_array_equal(ldmlr.published_numbers(counts), expected)
  assert expected[:3] == [100, 12, 13]


@pytest.mark.parametrize("name", BOTH)
def test_rows_are_valid_settings(name):
  row = ROWS[name]
  assert row.units in ldmlr.UNITS and row.sampler in SAMPLERS
  assert config_lib.build(OptimizerConfig, config_lib.as_dict(row.optimizer)) == row.optimizer
  with pytest.raises(ValueError, match="multiple of 8"):
    dataclasses.replace(row, width=12)


def test_published_units_are_twice_the_encoders_less_one():
  raw = np.array([[0.0, 0.5, 1.0, 3.0]], np.float32)
  standardized = STANDARDIZER.forward(raw)
  published, mended = ROWS["ldmlr_published"], ROWS["ldmlr"]
  inside = ldmlr.to_denoiser(published, STANDARDIZER, standardized)
  np.testing.assert_allclose(inside, [[-1, 0, 1, 5]], atol=1e-6)
  for config in (published, mended):
    there = ldmlr.to_denoiser(config, STANDARDIZER, standardized)
    back = ldmlr.from_denoiser(config, STANDARDIZER, there)
    np.testing.assert_allclose(back, standardized, atol=1e-6)
  np.testing.assert_array_equal(ldmlr.to_denoiser(mended, STANDARDIZER, standardized), standardized)


class Half(nn.Module):
  """A denoiser whose x0 is half of what it sees."""

  @nn.compact
  def __call__(self, x_t, t, label, memory):
    return x_t / 2, label


@pytest.mark.parametrize("num_steps", [1000, 50, 333])
def test_an_error_of_the_implied_noise_is_that_of_x0_times_signal_to_noise(num_steps):
  config = ScheduleConfig("cosine", num_steps)
  schedule = NoiseSchedule(config)
  t = np.arange(num_steps)
  x0, eps = np.random.default_rng(0).normal(size=(2, num_steps, 3)).astype(np.float32)
  x_t = schedule.noise(x0, t, eps)
  implied, _ = NoiseFromSample(Half(), config).apply({}, x_t, model_time(t, schedule), t, ())
  snr = schedule.alphas_bar / (1 - schedule.alphas_bar)
  expected = snr[:, None] * (x_t / 2 - x0) ** 2
  np.testing.assert_allclose((implied - eps) ** 2, expected, rtol=2e-3, atol=1e-5)


# --- minibatches -----------------------------------------------------------------------------


def make_rows(number=23, padding=4):
  index = np.arange(number + padding)
  labels = np.where(index < number, index % CLASSES, CLASSES)
  return TrainingRows(jnp.asarray(index[:, None] * 1.0), jnp.asarray(labels), jnp.int32(number))


def draw_many(name, draws=400):
  config = small(name, batch_size=10)
  draw = jax.jit(jax.vmap(lambda key: ldmlr.draw_batch(key, make_rows(), config)))
  batch = draw(jax.random.split(jax.random.key(0), draws))
  index = np.asarray(batch.x0)[:, :, 0].astype(int)
  np.testing.assert_array_equal(batch.label, index % CLASSES)
  return index


def test_published_minibatches_are_the_same_in_every_epoch():
  index = draw_many("ldmlr_published")
  expected = [tuple(range(10)), tuple(range(10, 20)), (20, 21, 22, *range(7))]
  counts = [int((index == np.array(batch)).all(axis=1).sum()) for batch in expected]
  assert sum(counts) == len(index)
  assert stats.chisquare(counts).pvalue > 1e-3


def test_mended_minibatches_are_drawn_at_random():
  index = draw_many("ldmlr")
  assert index.max() < 23  # no padding
  assert stats.chisquare(np.bincount(index.ravel(), minlength=23)).pvalue > 1e-3
  assert len({tuple(row) for row in index.tolist()}) == len(index)


@pytest.mark.parametrize("name", BOTH)
def test_rows_keep_features_with_their_labels_and_padding_last(name, mesh):
  per_seed = make_stage(name, mesh).per_seed
  for run in (0, 1):
    exemplars, count = make_exemplars(run), sum(COUNTS)
    units = np.asarray(ldmlr.to_denoiser(ROWS[name], STANDARDIZER, jnp.asarray(exemplars.features)))
    expected = np.concatenate([units, exemplars.labels[:, None]], axis=1)
    labels = np.asarray(per_seed.labels[run])
    mine = np.concatenate([per_seed.features[run], labels[:, None]], axis=1)
    assert sorted(mine.tolist()) == sorted(expected.tolist())
    assert per_seed.count[run] == count and (labels[:count] < CLASSES).all()
    assert 0 < (labels[:20] == 1).sum() < 12  # classes are mixed


# --- training and sampling -------------------------------------------------------------------


def train(stage, num_steps):
  """The first run: its state and losses."""
  per_seed = jax.tree.map(lambda leaf: leaf[0], stage.per_seed)

  @jax.jit
  def steps(state):
    return jax.lax.scan(lambda s, _: stage.step(s, stage.shared, per_seed), state, None, num_steps)

  state, metrics = steps(jax.jit(stage.init)(jax.random.key(0), per_seed))
  return state, np.asarray(metrics["loss"])


def sample(config, params, labels, seed=0):
  labels = jnp.asarray(labels)
  draw = jax.jit(lambda key, p: ldmlr.sample(key, config, p, STANDARDIZER, labels, CLASSES))
  return np.asarray(draw(jax.random.key(seed), params))


@pytest.mark.slow
def test_the_mended_row_learns_the_mean_of_every_class_and_dimension(mesh):
  optimizer = dataclasses.replace(ROWS["ldmlr"].optimizer, learning_rate=3e-3)
  fields = {"optimizer": optimizer, "ema_decay": 0.9, "sample_steps": 10}
  stage = make_stage("ldmlr", mesh, **fields)
  assert stage.name == "ldmlr" and stage.num_steps == 200
  state, losses = train(stage, 200)
  assert losses[-20:].mean() < 0.4 * losses[:5].mean()
  labels = np.repeat([0, 1], 100)
  drawn = sample(small("ldmlr", **fields), state.ema_params, labels)
  for label in (0, 1):
    np.testing.assert_allclose(drawn[labels == label].mean(axis=0), CENTRES[label], atol=0.4)


def test_a_row_trains_the_network_it_describes():
  for name, number in (("ldmlr_published", 7_804_801), ("ldmlr", 7_804_801 + 64 * 64)):
    net = ldmlr.make_denoiser(ROWS[name], 100, 64)
    zero = jnp.zeros((1, 64))
    shapes = jax.eval_shape(net.init, jax.random.key(0), zero, zero[:, 0], jnp.zeros(1, int), ())
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == number


@pytest.mark.parametrize("name", BOTH)
def test_sampling_in_chunks_under_vmap_equals_sampling_alone(name, tiny, monkeypatch):
  monkeypatch.setattr(ldmlr, "_CHUNK", 6)  # the last of three chunks is short
  config, labels = small(name, sample_steps=3), np.array([0, 1] * 8)
  net, zero = TinyDenoiser(CLASSES, DIM), jnp.zeros((1, DIM))
  params = net.init(jax.random.key(0), zero, zero[:, 0], labels[:1], ())["params"]
  params = {"denoiser": params} if config.snr_weighted else params
  runs = [jax.tree.map(lambda leaf, s=s: s * leaf, params) for s in (0.1, 0.2)]
  together = jax.jit(
    jax.vmap(
      lambda key, p: ldmlr.sample(key, config, p, STANDARDIZER, jnp.asarray(labels), CLASSES)
    )
  )(jnp.stack([jax.random.key(0), jax.random.key(1)]), stacked(*runs))
  for run in (0, 1):
    alone = sample(config, runs[run], labels, run)
    assert alone.shape == (16, DIM)
    np.testing.assert_allclose(together[run], alone, atol=1e-4)
    assert len(np.unique(alone, axis=0)) == len(labels)  # chunks draw other noise


def test_the_published_row_trains_without_average_and_samples_within_its_range(mesh, tiny):
  state, losses = train(make_stage("ldmlr_published", mesh), 4)
  assert np.isfinite(losses).all()
  jax.tree.map(np.testing.assert_array_equal, state.params, state.ema_params)
  drawn = sample(small("ldmlr_published"), state.ema_params, np.zeros(30, int))
  raw = drawn * np.asarray(STANDARDIZER.scale) + np.asarray(STANDARDIZER.mean)
  assert raw.min() >= -1e-5 and raw.max() <= 1 + 1e-5


def test_the_published_row_weighs_small_noise_and_the_mended_all_noise_alike(mesh, tiny):
  """An x0 of t / T costs its squared error, times signal over noise as published."""
  schedule = ScheduleConfig("linear", 8)
  abar, t = NoiseSchedule(schedule).alphas_bar, np.arange(8)
  for name in BOTH:
    stage = make_stage(name, mesh, schedule=schedule, batch_size=4000)
    per_seed = jax.tree.map(lambda leaf: leaf[0], stage.per_seed)
    state = jax.jit(stage.init)(jax.random.key(0), per_seed)
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    loss = float(jax.jit(stage.step)(state.replace(params=zeros), (), per_seed)[1]["loss"])
    x0 = np.asarray(per_seed.features, float)[: int(per_seed.count)]
    error = ((t[:, None, None] / 8 - x0[None]) ** 2).mean(axis=(1, 2))
    weight = abar / (1 - abar) if name == "ldmlr_published" else 1.0
    assert loss == pytest.approx(np.mean(weight * error), rel=0.1), name


def test_the_published_rows_optimiser_is_plain_gradient_descent():
  """lr 1e-4, and nothing else, at any time."""
  row = ROWS["ldmlr_published"]
  assert row.optimizer == OptimizerConfig(
    name="sgd", learning_rate=1e-4, schedule="constant", milestones=(), factors=(), momentum=0.0,
    nesterov=False, weight_decay=0.0, warmup=0.0, clip_norm=0.0, accumulate=1,
  )  # fmt: skip
  assert row.num_steps == 201 * -(-10_847 // row.batch_size)
