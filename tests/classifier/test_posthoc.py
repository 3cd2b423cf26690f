"""Heads that need no training, against loops over examples and classes."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memdiff.classifier import posthoc
from memdiff.memory.feature_space import linear_logits

rng = np.random.default_rng(0)
HEAD = {"kernel": rng.normal(size=(6, 4)), "bias": rng.normal(size=4)}
FEATURES = rng.normal(size=(9, 6))
COUNTS = np.array([50, 20, 7, 2])
F32 = {name: jnp.asarray(value, jnp.float32) for name, value in HEAD.items()}
X = jnp.asarray(FEATURES, jnp.float32)


def by_pair(f):
  return np.array([[f(x, c) for c in range(4)] for x in FEATURES])


def test_post_hoc_logit_adjustment_subtracts_the_log_prior():
  logits = rng.normal(size=(9, 4))
  expected = [[z[c] - 1.5 * np.log(COUNTS[c] / 79) for c in range(4)] for z in logits]
  ours = posthoc.adjusted_logits(jnp.asarray(logits, jnp.float32), jnp.asarray(COUNTS * 1.0), 1.5)
  np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tau", [0.0, 0.7, 1.0, 2.0])
def test_tau_normalisation_divides_by_the_length_to_the_power_of_tau(tau):
  kernel = HEAD["kernel"]
  expected = by_pair(lambda x, c: x @ kernel[:, c] / np.linalg.norm(kernel[:, c]) ** tau)
  np.testing.assert_allclose(posthoc.tau_normalized_logits(F32, X, tau), expected, rtol=1e-4,
                             atol=1e-5)  # fmt: skip


def test_lws_scales_each_class():
  scale = np.array([1.0, 0.5, 2.0, -1.0])
  expected = by_pair(lambda x, c: scale[c] * (x @ HEAD["kernel"][:, c] + HEAD["bias"][c]))
  ours = posthoc.scaled_logits(F32, jnp.asarray(scale, jnp.float32), X)
  np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_linear_head_is_a_matrix_and_a_bias():
  expected = by_pair(lambda x, c: x @ HEAD["kernel"][:, c] + HEAD["bias"][c])
  np.testing.assert_allclose(linear_logits(F32, X), expected, rtol=1e-4, atol=1e-5)


def test_the_nearest_mean_is_by_cosine():
  means = rng.normal(size=(4, 6))
  expected = by_pair(lambda x, c: x @ means[c] / np.linalg.norm(x) / np.linalg.norm(means[c]))
  ours = posthoc.nearest_mean_logits(X, jnp.asarray(means, jnp.float32))
  np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)
  zero = posthoc.nearest_mean_logits(jnp.zeros((1, 6)), jnp.zeros((4, 6)))
  assert np.isfinite(zero).all()


@given(st.lists(st.integers(0, 3), min_size=21, max_size=21))
def test_tau_is_the_best_and_of_equals_the_smallest(scores):
  table = dict(zip(posthoc.TAUS, scores, strict=True))
  chosen = posthoc.select_tau(posthoc.TAUS, table.__getitem__)
  best = [tau for tau in posthoc.TAUS if table[tau] == max(scores)]
  assert chosen == min(best)


def test_the_sweep_is_that_of_the_paper():
  assert len(posthoc.TAUS) == 21 and posthoc.TAUS[0] == 0.0 and posthoc.TAUS[-1] == 2.0
