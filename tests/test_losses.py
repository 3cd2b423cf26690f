"""Losses and class weights against NumPy; confidence reaches the gradient of a synthetic row."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memdiff.classifier import head, losses
from memdiff.classifier.head import HeadConfig, HeadData
from memdiff.runtime.train_state import OptimizerConfig


def effective_number(counts, beta):
  """Cui et al. 2019: weights 1 / E_n with E_n = 1 + beta + ... + beta^(n - 1), mean 1."""
  weights = np.array([1 / sum(beta**k for k in range(n)) for n in counts])
  return weights / weights.mean()


@given(
  st.lists(st.integers(1, 300), min_size=2, max_size=8),
  st.sampled_from([0.0, 0.5, 0.9, 0.99, 0.9999]),
)
def test_effective_number_is_a_geometric_sum(counts, beta):
  weights = losses.effective_number(jnp.asarray(counts, jnp.float32), beta)
  np.testing.assert_allclose(weights, effective_number(counts, beta), rtol=2e-4)
  assert weights.dtype == jnp.float32 and float(weights.mean()) == pytest.approx(1, rel=1e-5)


def test_effective_number_between_uniform_and_inverse_counts():
  counts = jnp.array([100.0, 10.0, 1.0])
  np.testing.assert_allclose(losses.effective_number(counts, 0.0), 1.0)
  inverse = 1 / np.array([100, 10, 1])
  np.testing.assert_allclose(
    losses.effective_number(counts, 0.999999), inverse / inverse.mean(), rtol=1e-3
  )


def test_effective_number_normalises_every_row():
  counts = np.array([[5.0, 1.0, 40.0], [7.0, 7.0, 7.0]], np.float32)
  weights = losses.effective_number(jnp.asarray(counts), 0.9)
  for row in range(2):
    expected = effective_number(counts[row].astype(int), 0.9)
    np.testing.assert_allclose(weights[row], expected, rtol=1e-5)


def test_weighted_cross_entropy_is_a_mean_over_rows():
  rng = np.random.default_rng(0)
  logits = (rng.normal(size=(7, 4)) * 5).astype(np.float32)
  labels, weights = rng.integers(0, 4, 7), rng.uniform(0, 3, 7).astype(np.float32)
  p = np.exp(logits.astype(float))
  rows = -np.log(p[np.arange(7), labels] / p.sum(axis=1))
  np.testing.assert_allclose(losses.cross_entropy(logits, labels), rows, rtol=1e-5)
  value = losses.weighted_cross_entropy(logits, labels, weights)
  assert float(value) == pytest.approx((weights * rows).sum() / 7, rel=1e-5)


def test_cross_entropy_of_huge_logits_is_finite():
  value = losses.cross_entropy(jnp.array([[1e4, -1e4], [0.0, 1e4]]), jnp.array([1, 1]))
  np.testing.assert_allclose(value, [2e4, 0.0])


@pytest.mark.parametrize(("step", "on"), [(0, False), (79, False), (80, True), (200, True)])
def test_weights_set_in_at_their_step(step, on):
  weights = jnp.array([0.5, 1.5])
  expected = weights if on else jnp.ones(2)
  np.testing.assert_array_equal(losses.deferred(weights, jnp.array(step), 80), expected)


# --- through the head stage's own step -------------------------------------------------------

CLASSES, DIM = 3, 4
LABELS = np.array([0] * 8 + [1] * 3 + [2], np.int32)
ADDED_LABELS = np.array([2, 1, 2], np.int32)
CONFIG = HeadConfig(
  start="encoder", beta=0.9, gamma_counts="real", defer=0.0, batch_size=12, added_batch_size=3,
  num_steps=10,
  optimizer=OptimizerConfig("sgd", 0.1, "cosine", (), (), 0.0, True, 0.0, 0.0, 0.0),
)  # fmt: skip


def make_data(confidence):
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  return HeadData(
    features=normal(len(LABELS), DIM), added=normal(len(ADDED_LABELS), DIM),
    confidence=jnp.asarray(confidence), test_features=normal(2, DIM),
    start={"kernel": normal(DIM, CLASSES), "bias": normal(CLASSES)},
  )  # fmt: skip


def make_stage(mesh, config, data):
  own = jax.tree.map(lambda x: x[None], data)
  labels = np.zeros(2, np.int32)
  return head.make_stage("test", config, own, LABELS, ADDED_LABELS, labels, CLASSES, mesh)


def added_gradient(mesh, confidence, config=CONFIG, step=0):
  """Gradient of the step's loss wrt the rows of the pool, and the data it was taken at."""
  data = make_data(confidence)
  stage = make_stage(mesh, config, data)
  state = stage.init(jax.random.key(0), data)
  state = state.replace(step=jnp.asarray(step, jnp.int32))

  def loss(added):
    return stage.step(state, stage.shared, data.replace(added=added))[1]["loss"]

  return data, np.asarray(jax.jit(jax.grad(loss))(data.added))


def cross_entropy_gradient(data):
  """d CE / d feature of every row of the pool."""
  kernel, bias = (np.asarray(data.start[name], float) for name in ("kernel", "bias"))
  logits = np.asarray(data.added, float) @ kernel + bias
  p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  return (p - np.eye(CLASSES)[ADDED_LABELS]) @ kernel.T


def test_the_gradient_of_a_synthetic_row_is_gamma_times_confidence(mesh):
  confidence = np.array([1.0, 0.25, 0.6], np.float32)
  data, gradient = added_gradient(mesh, confidence)
  gamma = effective_number([8, 3, 1], 0.9)[ADDED_LABELS]
  expected = (gamma * confidence)[:, None] * cross_entropy_gradient(data) / 15
  np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)


def test_half_the_confidence_is_half_the_gradient_and_none_is_none(mesh):
  _, full = added_gradient(mesh, np.array([0.8, 0.8, 0.8], np.float32))
  _, mixed = added_gradient(mesh, np.array([0.4, 0.0, 1.6], np.float32))
  np.testing.assert_allclose(mixed, full * np.array([[0.5], [0.0], [2.0]]), rtol=1e-5)
  assert np.abs(full).max(axis=1).min() > 1e-4


def test_gamma_may_come_from_the_effective_counts(mesh):
  config = dataclasses.replace(CONFIG, gamma_counts="effective")
  confidence = np.array([1.0, 0.25, 0.6], np.float32)
  data, gradient = added_gradient(mesh, confidence, config)
  # 3 rows of the pool per 12 real ones, so each is drawn as often as a real row.
  counts = np.array([8.0, 3.25, 2.6])
  gamma = (1 - 0.9) / (1 - 0.9**counts)
  gamma = (gamma / gamma.mean())[ADDED_LABELS]
  expected = (gamma * confidence)[:, None] * cross_entropy_gradient(data) / 15
  np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("step", "weighted"), [(0, False), (4, False), (5, True), (9, True)])
def test_deferring_keeps_the_confidence_and_drops_gamma(mesh, step, weighted):
  config = dataclasses.replace(CONFIG, defer=0.5)
  confidence = np.array([1.0, 0.25, 0.6], np.float32)
  data, gradient = added_gradient(mesh, confidence, config, step)
  gamma = effective_number([8, 3, 1], 0.9)[ADDED_LABELS] if weighted else np.ones(3)
  expected = (gamma * confidence)[:, None] * cross_entropy_gradient(data) / 15
  np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)


def test_the_step_descends_along_that_gradient(mesh):
  data = make_data(np.array([1.0, 0.25, 0.6], np.float32))
  stage = make_stage(mesh, CONFIG, data)
  state, metrics = jax.jit(stage.step)(stage.init(jax.random.key(0), data), stage.shared, data)
  features = np.concatenate([data.features, data.added]).astype(float)
  labels = np.concatenate([LABELS, ADDED_LABELS])
  weights = effective_number([8, 3, 1], 0.9)[labels]
  weights = weights * np.concatenate([np.ones(12), np.asarray(data.confidence)])
  kernel, bias = (np.asarray(data.start[name], float) for name in ("kernel", "bias"))
  p = np.exp(features @ kernel + bias)
  p = p / p.sum(axis=1, keepdims=True)
  loss = (weights * -np.log(p[np.arange(15), labels])).mean()
  gradient = weights[:, None] * (p - np.eye(CLASSES)[labels]) / 15
  assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-5)
  np.testing.assert_allclose(
    state.params["kernel"], kernel - 0.1 * features.T @ gradient, atol=1e-5
  )
  np.testing.assert_allclose(state.params["bias"], bias - 0.1 * gradient.sum(axis=0), atol=1e-5)
