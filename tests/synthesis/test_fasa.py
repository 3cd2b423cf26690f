"""FASA's running statistics, groups and probabilities, against loops in NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.cluster

from memdiff.memory import exemplars as exemplars_lib
from memdiff.runtime.random import stream
from memdiff.runtime.train_state import OptimizerConfig
from memdiff.synthesis import fasa
from memdiff.synthesis.fasa import Adapted, FASAConfig, Statistics

CLASSES, DIM = 5, 3
COUNTS = np.array([20, 9, 0, 4, 1])  # one class is empty, one has a single exemplar
HELD_OUT = np.array([6, 3, 0, 2, 0])  # ... and nothing held out
CONFIG = FASAConfig(
  num_epochs=5,
  batch_size=8,
  optimizer=OptimizerConfig("sgd", 0.2, "constant", (), (), 0.0, False, 0.0, 0.0, 0.0, 1),
)
GROUPS = np.array([0, 1, 2, 1, 4])


def make_exemplars(counts, seed=0, padding=0):
  """Well separated classes in a random order, then rows of padding that would be noticed."""
  rng = np.random.default_rng(seed)
  labels = rng.permutation(np.repeat(np.arange(CLASSES), counts))
  centres = np.random.default_rng(9).normal(size=(CLASSES, DIM)) * 2
  features = centres[labels] + rng.normal(size=(len(labels), DIM)) * (1 + labels[:, None])
  features = np.concatenate([features, np.full((padding, DIM), 1e6)]).astype(np.float32)
  labels = np.concatenate([labels, np.full(padding, CLASSES)])
  return jax.tree.map(jnp.asarray, exemplars_lib.make(features, labels, CLASSES))


def unknown():
  nothing, no = np.zeros((CLASSES, DIM)), np.zeros(CLASSES, bool)
  return Statistics(nothing, nothing.copy(), no, no.copy())


# --- running statistics ----------------------------------------------------------------------


def update_by_loop(s, features, labels):
  """Class by class, as the paper states it."""
  s = jax.tree.map(np.copy, s)
  for c in range(CLASSES):
    own = features[labels == c].astype(float)
    if len(own) > 0:
      mean = own.mean(axis=0)
      s.mean[c] = 0.9 * s.mean[c] + 0.1 * mean if s.has_mean[c] else mean
      s.has_mean[c] = True
    if len(own) > 1:
      variance = own.var(axis=0, ddof=1)
      s.variance[c] = 0.9 * s.variance[c] + 0.1 * variance if s.has_variance[c] else variance
      s.has_variance[c] = True
  return s


def test_running_statistics_follow_the_minibatches():
  rng = np.random.default_rng(0)
  update = jax.jit(fasa.update_statistics)
  state, expected = jax.tree.map(jnp.asarray, unknown()), unknown()
  for _ in range(12):
    # Label CLASSES is padding; classes come many times, once, or not at all.
    labels = rng.choice(CLASSES + 1, size=9, p=[0.5, 0.2, 0.0, 0.1, 0.05, 0.15])
    features = rng.normal(size=(9, DIM)).astype(np.float32)
    state, expected = update(state, features, labels), update_by_loop(expected, features, labels)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), state, expected)
  assert not expected.has_mean[2] and expected.has_mean[4]


# --- groups ----------------------------------------------------------------------------------


def test_classes_near_one_another_are_one_group():
  rng = np.random.default_rng(0)
  truth = np.array([0, 0, 1, 1, 1, 2, 2, 0, 2, 1])
  means = np.array([[0.0, 0], [20, 0], [0, 20]])[truth] + rng.normal(size=(10, 2))
  counts = np.ones(10)
  counts[[3, 8]] = 0  # empty classes, whose means mean nothing
  groups = fasa.group_classes(means, counts)
  filled = counts > 0
  for a in range(10):
    for b in range(10):
      together = truth[a] == truth[b] if filled[a] and filled[b] else a == b
      assert (groups[a] == groups[b]) == together, (a, b)
  assert groups.dtype == np.int32 and groups.min() >= 0 and groups.max() < 10


@pytest.mark.parametrize("means", [[[1.0]], [[0.0], [3.0]], [[0.0], [0.0], [0.0]]])
def test_groups_of_few_or_equal_classes(means):
  groups = fasa.group_classes(np.array(means), np.ones(len(means)))
  assert groups.shape == (len(means),) and groups.max() < len(means) and groups.min() >= 0


def test_without_convergence_each_class_is_a_group(monkeypatch):
  class Never(sklearn.cluster.AffinityPropagation):
    def fit(self, similarity):
      super().fit(similarity)
      self.n_iter_ = self.max_iter
      return self

  monkeypatch.setattr(sklearn.cluster, "AffinityPropagation", Never)
  groups = fasa.group_classes(np.array([[0.0], [0.1], [9.0]]), np.ones(3))
  np.testing.assert_array_equal(groups, [0, 1, 2])


# --- probabilities ---------------------------------------------------------------------------


def test_probabilities_start_inverse_to_the_counts():
  p = np.asarray(fasa.initial_probability(jnp.asarray(COUNTS)))
  inverse = [1 / n if n else 0 for n in COUNTS]
  np.testing.assert_allclose(p, np.array(inverse) / sum(inverse), rtol=1e-6)


def test_groups_move_together_and_never_beyond_one():
  p = jnp.array([0.5, 0.95, 0.2, 0.3, 0.4])
  groups = jnp.array([0, 1, 0, 3, 1])
  before, now = jnp.array([1.0, 2, 1, 5, 2]), jnp.array([2.0, 1, 0.5, 5, 2.5])
  # group 0 has risen by 0.5, group 1 fallen by 0.5, group 3 stands still
  moved = fasa.adapt_probability(p, groups, before, now)
  np.testing.assert_allclose(moved, [0.45, 1.0, 0.18, 0.3, 0.44], rtol=1e-5)


# --- the whole -------------------------------------------------------------------------------


def adapt(train, held_out, config=CONFIG, seed=0, groups=GROUPS):
  run = jax.jit(functools.partial(fasa.adapt, config=config))
  return run(jax.random.key(seed), train, held_out, jnp.asarray(groups))


def log_softmax(z):
  z = z - z.max(axis=-1, keepdims=True)
  return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def adapt_by_loop(train, held_out, config, seed):
  """The same training step by step, with the same random numbers."""
  key, s = jax.random.key(seed), unknown()
  w, b = np.zeros((DIM, CLASSES)), np.zeros(CLASSES)
  inverse = np.where(COUNTS > 0, 1 / np.maximum(COUNTS, 1), 0)
  p, losses = inverse / inverse.sum(), []
  x, y = np.asarray(train.features, float), np.asarray(train.labels)
  rate = config.optimizer.learning_rate

  def gradient(features, labels):  # of the mean cross-entropy
    error = np.exp(log_softmax(features @ w + b)) - np.eye(CLASSES)[labels]
    return features.T @ error / len(labels), error.mean(axis=0)

  for epoch in range(config.num_epochs):
    epoch_key = stream(key, "epoch", epoch)
    order_key = stream(epoch_key, "order")
    place = [float(jax.random.uniform(jax.random.fold_in(order_key, i))) for i in range(len(y))]
    order = np.argsort(place)
    for step, start in enumerate(range(0, len(y), config.batch_size)):
      rows = order[start : start + config.batch_size]
      s = update_by_loop(s, x[rows], y[rows])
      z = np.asarray(jax.random.normal(stream(epoch_key, "virtual", step), (CLASSES, DIM)))
      u = np.asarray(jax.random.uniform(stream(epoch_key, "chosen", step), (CLASSES,)))
      chosen = np.flatnonzero((u < p) & s.has_mean & (epoch >= 1))
      virtual = s.mean + np.sqrt(s.variance) * z
      moves = [(1.0, gradient(x[rows], y[rows]))]
      if len(chosen):
        moves.append((0.1, gradient(virtual[chosen], chosen)))
      for weight, (gw, gb) in moves:
        w, b = w - rate * weight * gw, b - rate * weight * gb
    hx, hy = np.asarray(held_out.features, float), np.asarray(held_out.labels)
    row = -log_softmax(hx @ w + b)[np.arange(len(hy)), hy]
    losses.append([row[hy == c].sum() / len(hy) for c in range(CLASSES)])
    if epoch > 0:
      for group in set(GROUPS):
        change = sum(losses[-1][c] - losses[-2][c] for c in range(CLASSES) if GROUPS[c] == group)
        factor = 0.9 if change > 0 else 1.1 if change < 0 else 1.0
        p = np.where(group == GROUPS, np.clip(p * factor, 0, 1), p)
  return s, p, np.array(losses)


def test_adaptation_is_that_of_a_loop():
  train, held_out = make_exemplars(COUNTS), make_exemplars(HELD_OUT, seed=1)
  config = dataclasses.replace(CONFIG, num_epochs=7)
  adapted = adapt(train, held_out, config, seed=4)
  statistics, probability, losses = adapt_by_loop(train, held_out, config, seed=4)
  np.testing.assert_allclose(adapted.losses, losses, atol=2e-4)
  np.testing.assert_allclose(adapted.probability, probability, rtol=1e-5)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-3), adapted.statistics, statistics
  )
  change = np.diff(losses.sum(axis=1))
  assert (change > 0).any() and (change < 0).any()  # both directions were taken


def test_padding_and_runs_change_nothing():
  """With padding enough for minibatches that hold nothing else."""
  runs = [(make_exemplars(COUNTS, s), make_exemplars(HELD_OUT, s + 5)) for s in (0, 1)]
  padded = [(make_exemplars(COUNTS, s, 21), make_exemplars(HELD_OUT, s + 5, 4)) for s in (0, 1)]
  train, held_out = jax.tree.map(lambda *leaves: jnp.stack(leaves), *padded)
  keys = jnp.stack([jax.random.key(0), jax.random.key(1)])
  momentum = dataclasses.replace(CONFIG.optimizer, momentum=0.9)
  config = dataclasses.replace(CONFIG, optimizer=momentum)
  together = jax.jit(jax.vmap(functools.partial(fasa.adapt, config=config)))(
    keys, train, held_out, jnp.stack([GROUPS, GROUPS])
  )
  for run, (train, held_out) in enumerate(runs):
    alone = adapt(train, held_out, config, seed=run)
    mine = jax.tree.map(lambda leaf, run=run: leaf[run], together)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), mine, alone)


def test_an_epoch_passes_over_every_example_once():
  labels = jnp.array([0, 3, 1, 3, 2, 0, 1, 3])  # of three classes
  rows = np.asarray(fasa._epoch_rows(jax.random.key(0), labels, 3, 3))
  assert rows.shape == (3, 3)
  flat = rows.ravel()
  assert sorted(flat[:5]) == [0, 2, 4, 5, 6] and set(flat[5:]) == {1, 3, 7, 8}
  keys = map(jax.random.key, range(9))
  assert len({str(fasa._epoch_rows(key, labels, 3, 3)) for key in keys}) > 5


def test_virtual_features_have_the_running_moments():
  statistics = Statistics(
    mean=jnp.arange(6.0).reshape(2, 3),
    variance=jnp.array([[1.0, 4, 0], [0.25, 0, 9]]),
    has_mean=jnp.ones(2, bool),
    has_variance=jnp.ones(2, bool),
  )
  adapted = Adapted(statistics, jnp.array([0.02, 0.08]), jnp.zeros((1, 2)))
  drawn = np.asarray(fasa.sample(jax.random.key(0), adapted, jnp.repeat(jnp.arange(2), 20_000)))
  for label, rows in enumerate(drawn.reshape(2, -1, 3)):
    np.testing.assert_allclose(rows.mean(axis=0), statistics.mean[label], atol=0.09)
    np.testing.assert_allclose(rows.var(axis=0), statistics.variance[label], rtol=0.05, atol=1e-9)
  np.testing.assert_allclose(fasa.class_weights(adapted), [0.25, 1.0])
