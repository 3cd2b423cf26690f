"""Losses and class weights against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memdiff.classifier import losses, priors


def effective_number(counts, beta):
  """Cui et al. 2019: weights 1 / E_n with E_n = 1 + beta + ... + beta^(n - 1), mean 1."""
  weights = np.array([1 / sum(beta**k for k in range(n)) for n in counts])
  return weights / weights.mean()


@given(
  st.lists(st.integers(1, 300), min_size=2, max_size=8),
  st.sampled_from([0.0, 0.5, 0.9, 0.99, 0.9999]),
)
def test_effective_number_is_a_geometric_sum(counts, beta):
  weights = priors.effective_number(jnp.asarray(counts, jnp.float32), beta)
  np.testing.assert_allclose(weights, effective_number(counts, beta), rtol=2e-4)
  assert weights.dtype == jnp.float32 and float(weights.mean()) == pytest.approx(1, rel=1e-5)


def test_effective_number_between_uniform_and_inverse_counts():
  counts = jnp.array([100.0, 10.0, 1.0])
  np.testing.assert_allclose(priors.effective_number(counts, 0.0), 1.0)
  inverse = 1 / np.array([100, 10, 1])
  np.testing.assert_allclose(
    priors.effective_number(counts, 0.999999), inverse / inverse.mean(), rtol=1e-3
  )


def test_effective_number_normalises_every_row():
  counts = np.array([[5.0, 1.0, 40.0], [7.0, 7.0, 7.0]], np.float32)
  weights = priors.effective_number(jnp.asarray(counts), 0.9)
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
