"""Noise schedules against step-by-step products and the forward process against its definition."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memdiff.diffusion.schedules import SCHEDULES, NoiseSchedule, ScheduleConfig, expand


def cosine_level(t, num_steps):
  return math.cos((t / num_steps + 0.008) / 1.008 * math.pi / 2) ** 2


def expected_beta(name, t, num_steps):
  """beta of step t = 0, 1, ..., from the papers' own formulas."""
  if name == "linear":
    first, last = 0.1 / num_steps, 20 / num_steps
    return min(first + (last - first) * t / (num_steps - 1), 0.999)
  return min(1 - cosine_level(t + 1, num_steps) / cosine_level(t, num_steps), 0.999)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("num_steps", [2, 50, 1000])
def test_abar_is_the_product_of_one_minus_beta(name, num_steps):
  schedule = NoiseSchedule(ScheduleConfig(name, num_steps))
  product = 1.0
  for t in range(num_steps):
    product *= 1 - expected_beta(name, t, num_steps)
    assert schedule.alphas_bar[t] == pytest.approx(product, rel=1e-9)
  assert schedule.alphas_bar.shape == (num_steps,) and schedule.alphas_bar.dtype == np.float64


def test_the_linear_schedule_is_that_of_ddpm():
  betas = SCHEDULES["linear"](1000)
  np.testing.assert_allclose(betas, np.linspace(1e-4, 0.02, 1000), rtol=1e-12)


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(2, 3000))
def test_abar_falls_strictly_between_one_and_zero(name, num_steps):
  alphas_bar = NoiseSchedule(ScheduleConfig(name, num_steps)).alphas_bar
  assert (np.diff(alphas_bar) < 0).all() and alphas_bar[-1] > 0 and alphas_bar[0] < 1


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_marginals_equal_noising_step_by_step(name):
  """x_t drawn at once has the mean and deviation of t + 1 single steps."""
  num_steps, t, x0 = 100, 37, 2.0
  mean, variance = x0, 0.0
  for step in range(t + 1):
    beta = expected_beta(name, step, num_steps)
    mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
  schedule = NoiseSchedule(ScheduleConfig(name, num_steps))
  at = jnp.array([t])
  without_noise = schedule.noise(jnp.full((1, 1), x0), at, jnp.zeros((1, 1)))
  only_noise = schedule.noise(jnp.zeros((1, 1)), at, jnp.ones((1, 1)))
  assert float(without_noise[0, 0]) == pytest.approx(mean, rel=1e-5)
  assert float(only_noise[0, 0]) == pytest.approx(math.sqrt(variance), rel=1e-5)


def test_every_sample_is_noised_by_its_own_step_whatever_its_shape():
  schedule = NoiseSchedule(ScheduleConfig("cosine", 100))
  rng = np.random.default_rng(0)
  x0, eps = rng.normal(size=(2, 5, 4, 3, 2)).astype(np.float32)
  t = np.array([0, 99, 50, 3, 3])
  abar = schedule.alphas_bar[t].reshape(5, 1, 1, 1)
  expected = np.sqrt(abar) * x0 + np.sqrt(1 - abar) * eps
  np.testing.assert_allclose(schedule.noise(x0, jnp.asarray(t), eps), expected, atol=1e-5)
  flat = schedule.noise(x0.reshape(5, -1), jnp.asarray(t), eps.reshape(5, -1))
  np.testing.assert_allclose(flat, expected.reshape(5, -1), atol=1e-5)


def test_expand_adds_trailing_axes():
  assert expand(jnp.arange(3), jnp.zeros((3, 2, 2, 1))).shape == (3, 1, 1, 1)
  assert jax.eval_shape(expand, jnp.arange(3), jnp.zeros((3,))).shape == (3,)
