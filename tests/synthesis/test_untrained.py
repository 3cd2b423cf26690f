"""Generators without training: each against the law that its formula states."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from memdiff.memory import exemplars as exemplars_lib
from memdiff.synthesis import gaussian
from memdiff.synthesis.untrained import UNTRAINED

COUNTS = np.array([30, 0, 12, 1, 3, 8])  # an empty class and one of a single exemplar
CLASSES, DIM = len(COUNTS), 4
LABELS = np.random.default_rng(1).permutation(np.repeat(np.arange(CLASSES), COUNTS))
HEAD = {0, 2}  # the third with most exemplars
NUM = 10_000  # samples per class
FILLED = np.flatnonzero(COUNTS)
ROWS = NUM * len(FILLED)  # of every draw, so that each generator compiles once


def make_features(seed=0):
  """Classes of different place, shape and size; the last dimension is constant."""
  rng = np.random.default_rng(seed)
  centres, shapes = rng.normal(size=(CLASSES, DIM)) * 2, rng.normal(size=(CLASSES, DIM, DIM))
  noise = rng.normal(size=(len(LABELS), DIM))
  features = centres[LABELS] + np.einsum("nd,nde->ne", noise, shapes[LABELS])
  features[:, -1] = 0.5
  return features.astype(np.float32)


FEATURES = make_features()


def make_exemplars(features=FEATURES, labels=LABELS, padding=0):
  """With further rows of padding that would be noticed."""
  features = np.concatenate([features, np.full((padding, features.shape[1]), 1e6, np.float32)])
  labels = np.concatenate([labels, np.full(padding, CLASSES)])
  return jax.tree.map(jnp.asarray, exemplars_lib.make(features, labels, CLASSES))


def fit_and_sample(name):
  """(key, exemplars, labels, strength) -> samples."""
  generator = UNTRAINED[name][1]

  def draw(key, exemplars, labels, strength):
    return generator.sample(key, exemplars, generator.fit(exemplars), labels, strength)

  return draw


@functools.cache
def sampler(name):
  return jax.jit(fit_and_sample(name))


def draw(name, labels, strength, exemplars=None, seed=0):
  """As many samples of these labels as make ROWS."""
  exemplars = make_exemplars() if exemplars is None else exemplars
  labels = jnp.asarray(np.resize(labels, ROWS), jnp.int32)
  return np.asarray(sampler(name)(jax.random.key(seed), exemplars, labels, strength))


# --- what each generator should draw from: (mean, covariance) of equally likely components -----

MEMBERS = [FEATURES[label == LABELS].astype(float) for label in range(CLASSES)]
MEANS = [m.mean(axis=0) if len(m) else None for m in MEMBERS]
POOLED = sum((m - m.mean(axis=0)).T @ (m - m.mean(axis=0)) for m in MEMBERS if len(m)) / (
  COUNTS.sum() - (COUNTS > 0).sum()
)


def own_covariance(label):
  return np.cov(MEMBERS[label].T) if COUNTS[label] > 1 else np.zeros((DIM, DIM))


def components(name, label, strength):
  n, mean, members = COUNTS[label], MEANS[label], MEMBERS[label]
  if name == "duplicate":
    return [(x, np.zeros((DIM, DIM))) for x in members]
  if name == "kernel_jitter":
    return [(x, strength**2 * POOLED) for x in members]
  if name == "gaussian_diagonal":
    covariance = own_covariance(label) if n > 1 else POOLED
    return [(mean, strength**2 * np.diag(np.diag(covariance)))]
  if name == "gaussian_shared":
    return [(mean, strength**2 * POOLED)]
  if name == "gaussian_shrunk":
    covariance = ((n - 1) * own_covariance(label) + strength * POOLED) / (n - 1 + strength)
    return [(mean, covariance)]
  if name == "gaussian_shrunk_means":
    centre = np.mean([m for m in MEANS if m is not None], axis=0)
    return [(centre + n / (n + strength) * (mean - centre), POOLED)]
  found = []
  for x in members:  # distribution_calibration
    nearest = sorted(HEAD, key=lambda c: np.linalg.norm(MEANS[c] - x))[:2]
    covariance = sum(own_covariance(c) for c in nearest) / 2 + strength * np.eye(DIM)
    found.append(((x + sum(MEANS[c] for c in nearest)) / 3, covariance))
  return found


LAWS = [
  ("duplicate", 0.0), ("kernel_jitter", 0.7), ("gaussian_diagonal", 0.6), ("gaussian_shared", 0.8),
  ("gaussian_shrunk", 4.0), ("gaussian_shrunk_means", 0.0), ("gaussian_shrunk_means", 5.0),
  ("distribution_calibration", 0.0), ("distribution_calibration", 0.3),
]  # fmt: skip


@pytest.mark.parametrize(("name", "strength"), LAWS)
def test_samples_have_the_moments_of_their_law(name, strength):
  samples = draw(name, np.repeat(FILLED, NUM), strength).reshape(len(FILLED), NUM, DIM)
  for label, drawn in zip(FILLED, samples.astype(float), strict=True):
    means, covariances = map(np.array, zip(*components(name, label, strength), strict=True))
    mean = means.mean(axis=0)
    covariance = covariances.mean(axis=0) + (means - mean).T @ (means - mean) / len(means)
    deviation = np.sqrt(np.diag(covariance))
    error = np.abs(drawn.mean(axis=0) - mean)
    assert (error <= 4.5 * deviation / NUM**0.5 + 1e-4).all(), (label, error)
    error = np.abs(np.cov(drawn.T) - covariance)
    assert (error <= 0.08 * np.outer(deviation, deviation) + 1e-4).all(), (label, error)


@pytest.mark.parametrize("name", ["gaussian_shared", "gaussian_shrunk", "gaussian_diagonal"])
def test_gaussian_generators_are_normal(name):
  drawn = draw(name, [2], 1.0)[:, 0]
  assert stats.kstest((drawn - drawn.mean()) / drawn.std(), "norm").pvalue > 1e-3


def test_calibration_takes_the_nearest_of_many_head_classes():
  """Nine classes on a line, most exemplars in 0, 4 and 8; the tail class 3 sits at 4.4."""
  counts = np.array([20, 2, 2, 1, 30, 2, 2, 2, 25])
  labels = np.repeat(np.arange(9), counts)
  places = np.array([0.0, 1, 2, 4.4, 4, 5, 6, 7, 8])
  features = places[labels][:, None].astype(np.float32)
  exemplars = jax.tree.map(jnp.asarray, exemplars_lib.make(features, labels, 9))
  np.testing.assert_array_equal(
    np.flatnonzero(gaussian.head_classes(exemplars.by_class.counts)), [0, 4, 8]
  )
  drawn = draw("distribution_calibration", [3], 0.0, exemplars)
  np.testing.assert_allclose(drawn, (4.4 + 4 + 8) / 3, rtol=1e-5)


@pytest.mark.parametrize("counts", [[5, 0, 0], [4, 3]])
def test_calibration_makes_do_with_few_classes(counts):
  labels = np.repeat(np.arange(len(counts)), counts)
  features = (labels * 2.0)[:, None].astype(np.float32)
  exemplars = jax.tree.map(jnp.asarray, exemplars_lib.make(features, labels, len(counts)))
  drawn = draw("distribution_calibration", [0], 0.0, exemplars)
  means = [2.0 * c for c, n in enumerate(counts) if n]
  np.testing.assert_allclose(drawn, sum(means) / (1 + len(means)), rtol=1e-5)


def of_one_class(columns):
  """Exemplars with these columns [N, D], and their unbiased covariance."""
  columns = np.asarray(columns, np.float32)
  exemplars = exemplars_lib.make(columns, np.zeros(len(columns), int), 1)
  return jax.tree.map(jnp.asarray, exemplars), np.atleast_2d(np.cov(columns.astype(float).T))


def columns_of(kind):
  x = np.random.default_rng(3).normal(size=(60, 40))
  if kind == "full rank":
    return x
  if kind == "fewer rows than columns":
    return x[:7]
  if kind == "many copies of one column":
    return np.repeat(x[:, :1], 300, axis=1)
  if kind == "constant columns":  # at 0, as standardised ones are
    return np.c_[np.zeros(60), x[:, :3], np.zeros(60)]
  return np.c_[1e-4 * x[:, 0], 1e4 * (x[:, 0] + x[:, 1]), x[:, 1], x[:, 0]]  # "units"


@pytest.mark.parametrize(
  "kind",
  [
    "full rank",
    "fewer rows than columns",
    "many copies of one column",
    "constant columns",
    "units",
  ],
)
def test_the_factor_is_that_of_the_pooled_covariance_of_any_rank(kind):
  """But for the ridge, and rounding in proportion to the deviations of the columns."""
  exemplars, covariance = of_one_class(columns_of(kind))
  factor = np.asarray(jax.jit(gaussian.within_factor)(exemplars), float)
  deviation = np.sqrt(np.diag(covariance))
  error = np.abs(factor @ factor.T - covariance)
  assert (error <= 2e-3 * np.outer(deviation, deviation)).all(), error.max()
  assert not factor[deviation == 0].any()


def test_the_factor_of_what_is_not_finite_is_not_finite_but_comes_to_an_end():
  exemplars, _ = of_one_class(np.full((5, 2), np.nan))
  assert np.isnan(jax.jit(gaussian.within_factor)(exemplars)).any()


# --- resampling ------------------------------------------------------------------------------


def test_duplicates_are_exemplars_of_their_class_each_as_often():
  drawn = draw("duplicate", [2], 0.0)
  rows = (drawn[:, None] == MEMBERS[2].astype(np.float32)[None]).all(axis=2)
  assert (rows.sum(axis=1) == 1).all()
  assert stats.chisquare(rows.sum(axis=0)).pvalue > 1e-3


def test_mixtures_lie_between_an_exemplar_and_any_other():
  strength, x = 0.4, MEMBERS[3][0]  # of a class of one
  drawn = draw("feature_mixup", [3], strength)[:6000]
  others = FEATURES[LABELS != 3].astype(float)
  directions = (others - x) / np.linalg.norm(others - x, axis=1, keepdims=True)
  step = drawn - x
  moved = np.linalg.norm(step, axis=1) > 1e-4  # the stranger may be x itself
  cosine = (step[moved] / np.linalg.norm(step[moved], axis=1, keepdims=True)) @ directions.T
  which = cosine.argmax(axis=1)
  np.testing.assert_allclose(cosine.max(axis=1), 1, atol=1e-4)
  share = np.linalg.norm(step[moved], axis=1) / np.linalg.norm(others - x, axis=1)[which]
  assert stats.kstest(share / strength, "uniform").pvalue > 1e-3
  assert stats.chisquare(np.bincount(which, minlength=len(others))).pvalue > 1e-3
  assert stats.binomtest(int((~moved).sum()), 6000, 1 / len(FEATURES)).pvalue > 1e-4


@pytest.mark.parametrize("name", ["kernel_jitter", "feature_mixup"])
def test_without_strength_exemplars_come_back(name):
  drawn = draw(name, np.repeat(FILLED, NUM), 0.0).reshape(-1, NUM, DIM)
  for label, rows in zip(FILLED, drawn, strict=True):
    np.testing.assert_array_equal(
      np.unique(rows, axis=0), np.unique(MEMBERS[label].astype(np.float32), axis=0)
    )


# --- what holds for all ----------------------------------------------------------------------

ALL = sorted(UNTRAINED)


def strongest(name):
  return UNTRAINED[name][1].strengths[-1]


@pytest.mark.parametrize("name", ALL)
def test_padding_and_runs_change_nothing(name):
  """Two runs of different data and padding under vmap, against each alone and unpadded."""
  data = [FEATURES, make_features(3)]
  runs = [make_exemplars(features, padding=9) for features in data]
  together = jax.jit(jax.vmap(fit_and_sample(name), in_axes=(0, 0, None, None)))(
    jnp.stack([jax.random.key(0), jax.random.key(1)]),
    jax.tree.map(lambda *leaves: jnp.stack(leaves), *runs),
    jnp.asarray(np.resize(FILLED, ROWS)),
    strongest(name),
  )
  for run, features in enumerate(data):
    alone = draw(name, FILLED, strongest(name), make_exemplars(features), seed=run)
    np.testing.assert_allclose(together[run], alone, atol=1e-3)


@pytest.mark.parametrize("name", ALL)
def test_classes_of_one_exemplar_alone_have_no_spread_to_learn(name):
  """Nothing but mixing, shrinking and calibration leaves the exemplars."""
  features = FEATURES[:CLASSES] + np.arange(CLASSES)[:, None].astype(np.float32)
  padding = len(FEATURES) - CLASSES
  exemplars = make_exemplars(features, np.arange(CLASSES), padding)
  drawn = draw(name, np.arange(CLASSES), strongest(name), exemplars)
  assert np.isfinite(drawn).all()
  if name not in ("feature_mixup", "distribution_calibration", "gaussian_shrunk_means"):
    np.testing.assert_allclose(drawn[:CLASSES], features, atol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_keys_decide_draws(name):
  first, again = (draw(name, FILLED, strongest(name), seed=5) for _ in range(2))
  np.testing.assert_array_equal(first, again)
  assert first.dtype == np.float32
  other = draw(name, FILLED, strongest(name), seed=6)
  assert (first != other).any(axis=1).mean() > 0.6  # a class of one has one duplicate


@pytest.mark.parametrize("name", ALL)
def test_there_may_be_nothing_to_make(name):
  nothing = jnp.zeros((0,), jnp.int32)
  made = jax.eval_shape(fit_and_sample(name), jax.random.key(0), make_exemplars(), nothing, 1.0)
  assert made.shape == (0, DIM)


@pytest.mark.parametrize("name", ["gaussian_shrunk", "distribution_calibration"])
def test_no_generator_holds_a_covariance_per_class(name):
  """100 classes of 192 dimensions in 5 runs would be 74 MB."""
  runs, rows, classes, dim, number = 5, 1000, 100, 192, 500
  shape = jax.ShapeDtypeStruct
  exemplars = exemplars_lib.Exemplars(
    shape((runs, rows, dim), jnp.float32),
    shape((runs, rows), jnp.int32),
    exemplars_lib.ByClass(shape((runs, rows), jnp.int32), shape((runs, classes), jnp.int32),
                          shape((runs, classes), jnp.int32)),
  )  # fmt: skip
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), runs))
  sample = jax.jit(jax.vmap(fit_and_sample(name), in_axes=(0, 0, None, None)))
  compiled = sample.lower(keys, exemplars, shape((number,), jnp.int32), 1.0).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 40e6


def test_the_table_is_fit_for_reports_and_selection():
  assert len({description for description, _ in UNTRAINED.values()}) == len(UNTRAINED)
  for name, (_, generator) in UNTRAINED.items():
    assert list(generator.strengths) == sorted(set(generator.strengths)), name
    assert all(s >= 0 for s in generator.strengths)
  assert min(UNTRAINED["gaussian_shrunk"][1].strengths) > 0
  assert max(UNTRAINED["feature_mixup"][1].strengths) <= 1
