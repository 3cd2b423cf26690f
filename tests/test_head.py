"""The head stage: its prior, its start, its mixed minibatches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memdiff.classifier import head
from memdiff.classifier.head import HeadConfig, HeadData
from memdiff.feature_space import Standardizer, fit_standardizer
from memdiff.runtime.train_state import OptimizerConfig

CLASSES, DIM = 3, 4
LABELS = np.array([0] * 7 + [1] * 3 + [2] * 2, np.int32)
CONFIG = HeadConfig(
  start="encoder", beta=0.0, gamma_counts="effective", defer=0.0, batch_size=6,
  added_batch_size=4, num_steps=20,
  optimizer=OptimizerConfig("sgd", 0.1, "cosine", (), (), 0.0, True, 0.0, 0.0, 0.0),
)  # fmt: skip


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def make_data(num_added, seed=0):
  return HeadData(
    features=normal(seed, len(LABELS), DIM),
    added=normal(seed + 1, num_added, DIM),
    confidence=jnp.linspace(0.2, 1.0, num_added),
    test_features=normal(seed + 2, 9, DIM),
    start={"kernel": normal(seed + 3, DIM, CLASSES), "bias": normal(seed + 4, CLASSES)},
  )


def make_stage(mesh, config, data, added_labels, test_labels=None):
  if test_labels is None:
    test_labels = np.zeros(9, np.int32)
  own = jax.tree.map(lambda x: x[None], data)
  return head.make_stage("m", config, own, LABELS, added_labels, test_labels, CLASSES, mesh)


@given(st.lists(st.integers(0, 4), max_size=20), st.floats(0, 3), st.integers(0, 2**20))
def test_effective_counts_add_the_trusted_pool_in_units_of_real_rows(labels, share, seed):
  rng = np.random.default_rng(seed)
  counts, confidence = rng.integers(1, 50, 5), rng.uniform(0, 2, len(labels))
  expected = counts.astype(float)
  for label, trust in zip(labels, confidence, strict=True):
    expected[label] += share * counts.sum() / len(labels) * trust
  result = head.effective_counts(
    jnp.asarray(counts, jnp.float32), jnp.asarray(labels, jnp.int32),
    jnp.asarray(confidence, jnp.float32), share,
  )  # fmt: skip
  np.testing.assert_allclose(result, expected, rtol=1e-4)


def test_effective_counts_are_the_prior_of_the_mixed_minibatches(mesh):
  """Over whole epochs, the weight of a class in the loss is in proportion to its count."""
  added_labels = np.array([2, 1, 2, 2, 1, 2, 0, 2], np.int32)
  data = make_data(8)
  stage = make_stage(mesh, CONFIG, data, added_labels)
  state = stage.init(jax.random.key(0), data)
  weight = np.zeros(CLASSES)

  @jax.jit
  def bias_gradients(state):
    """With zero logits, d loss / d bias_c = sum_rows w (1/C - [y = c]) / rows."""
    return jax.grad(
      lambda b: stage.step(state.replace(params=state.params | {"bias": b}), stage.shared, data)[1][
        "loss"
      ]
    )(jnp.zeros(CLASSES))

  state = state.replace(params=jax.tree.map(jnp.zeros_like, state.params))
  for step in range(4):  # 4 x 6 real rows: two epochs; 4 x 4 of the pool: two epochs
    gradient = np.asarray(bias_gradients(state.replace(step=jnp.asarray(step, jnp.int32)))) * 10
    total = 6 + float(np.asarray(data.confidence).mean()) * 4
    weight += total / CLASSES - gradient
  counts = head.effective_counts(
    jnp.array([7.0, 3.0, 2.0]), jnp.asarray(added_labels), data.confidence, 4 / 6
  )
  shares = np.asarray(counts) / float(counts.sum())
  # The row total differs from batch to batch, which moves all classes alike: compare differences.
  scale = 2 * (12 + 8 * float(data.confidence.mean()))
  np.testing.assert_allclose(np.diff(weight), np.diff(shares * scale), rtol=1e-4)


def test_the_standardized_head_gives_identical_logits():
  features = jax.nn.relu(normal(0, 50, DIM)).at[:, 1].set(0.7)  # a constant dimension too
  standardizer = fit_standardizer(features)
  raw = {"kernel": normal(1, DIM, CLASSES), "bias": normal(2, CLASSES)}
  moved = head.standardized_head(raw, standardizer)
  np.testing.assert_allclose(
    head.logits_of(moved, standardizer.forward(features)), head.logits_of(raw, features), atol=1e-5
  )


def test_the_standardizer_gives_mean_zero_and_deviation_one_and_goes_back():
  features = jax.nn.relu(normal(3, 200, DIM) * 3 + 1).at[:, 2].set(0.0)
  standardizer = fit_standardizer(features)
  scaled = np.asarray(standardizer.forward(features))
  np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-5)
  np.testing.assert_allclose(scaled.std(axis=0), [1, 1, 0, 1], atol=1e-5)
  np.testing.assert_allclose(standardizer.backward(scaled), features, atol=1e-5)
  below = Standardizer(jnp.zeros(2), jnp.ones(2)).backward(jnp.array([[-3.0, 2.0]]))
  np.testing.assert_array_equal(below, [[0.0, 2.0]])


@pytest.mark.parametrize("start", ["encoder", "zeros"])
def test_training_starts_where_the_config_says(mesh, start):
  data = make_data(4)
  config = dataclasses.replace(CONFIG, start=start)
  stage = make_stage(mesh, config, data, np.zeros(4, np.int32))
  state = stage.init(jax.random.key(0), data)
  for name in ("kernel", "bias"):
    expected = data.start[name] if start == "encoder" else np.zeros_like(data.start[name])
    np.testing.assert_array_equal(state.params[name], expected)
    assert state.params[name] is not data.start[name]  # the state is donated
  assert state.bank is None  # nothing that trains on synthetics carries a bank


def test_the_control_trains_on_real_features_alone(mesh):
  data = make_data(0)
  stage = make_stage(mesh, CONFIG, data, np.zeros(0, np.int32))
  step = jax.jit(stage.step)
  state = stage.init(jax.random.key(0), data)
  losses = []
  for _ in range(20):
    state, metrics = step(state, stage.shared, data)
    losses.append(float(metrics["loss"]))
  assert np.isfinite(losses).all() and np.mean(losses[-5:]) < np.mean(losses[:5])


def test_batches_are_no_larger_than_what_there_is(mesh):
  data = make_data(2)
  config = dataclasses.replace(CONFIG, batch_size=1000, added_batch_size=1000)
  stage = make_stage(mesh, config, data, np.array([1, 2], np.int32))
  _, metrics = jax.jit(stage.step)(stage.init(jax.random.key(0), data), stage.shared, data)
  assert np.isfinite(metrics["loss"])


def test_accuracy_is_that_on_the_test_features(mesh):
  data = make_data(2)
  logits = np.asarray(data.test_features) @ np.asarray(data.start["kernel"])
  predicted = (logits + np.asarray(data.start["bias"])).argmax(axis=1)
  labels = predicted.copy()
  labels[:3] = (labels[:3] + 1) % CLASSES
  stage = make_stage(mesh, CONFIG, data, np.zeros(2, np.int32), labels.astype(np.int32))
  metrics = stage.evaluate(stage.init(jax.random.key(0), data), stage.shared, data)
  assert float(metrics["accuracy"]) == pytest.approx(6 / 9)
