"""Guidance by its formulas, and conditions that fade in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdiff.diffusion import guidance, objectives
from memdiff.diffusion.guidance import AnnealingConfig
from memdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig

SCHEDULE = NoiseSchedule(ScheduleConfig("cosine", 100))
X, T = jnp.array([[1.0, 2.0], [3.0, -1.0]]), jnp.array([500.0])
POSITIVE, NOTHING, NEGATIVE = (jnp.array([[a], [b]]) for a, b in ((3, -1), (1, 1), (2, 2.0)))


def denoise(x, t, context):
  """A prediction that tells of all it was given."""
  return x * context + t[0] / 1000


def test_guidance_extrapolates_from_the_other_prediction():
  conditional, other = jnp.array([3.0, -1.0]), jnp.array([1.0, 1.0])
  np.testing.assert_allclose(guidance.guide(conditional, other, 1.0), conditional)
  np.testing.assert_allclose(guidance.guide(conditional, other, 0.0), other)
  np.testing.assert_allclose(guidance.guide(conditional, other, 2.5), [6.0, -4.0])


@pytest.mark.parametrize("changing", [False, True])
def test_the_other_condition_may_be_none_or_a_negative_one(changing):
  context = (lambda t: POSITIVE * t[0] / 500) if changing else POSITIVE
  for other in (NOTHING, NEGATIVE):
    found = guidance.guided(denoise, context, lambda other=other: other, jnp.float32(2.5))(X, T)
    expected = X * other + 2.5 * (X * POSITIVE - X * other) + 0.5
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_at_scale_one_nothing_else_is_asked():
  calls = []

  def spy(x, t, context):
    calls.append(x.shape)
    return denoise(x, t, context)

  def never():
    raise AssertionError

  for context in (POSITIVE, lambda t: POSITIVE):
    guidance.guided(spy, context, never, 1.0)(X, T)
  assert calls == [X.shape] * 2


@pytest.mark.parametrize("prediction", objectives.PREDICTIONS)
def test_contrastive_guidance_is_its_formula_whatever_is_predicted(prediction):
  """The samples' predictions are of one kind, the distances in its formula are of noise."""
  rng, scale, tau = np.random.default_rng(0), 1.7, 0.3
  eps = rng.normal(size=(3, 2, 2))  # of the condition, of none, of the negative one
  signal, noise = (float(v[0]) for v in SCHEDULE.scales(jnp.array([50]), T))
  a, b = objectives.eps_weights(prediction, signal, noise)
  outputs = (eps - a * np.asarray(X)) / b
  contexts = tuple(jnp.full((2, 1), i) for i in range(3))

  def known(x, t, context):
    return jnp.asarray(outputs, jnp.float32)[context[:, 0], jnp.arange(len(x)) % 2]

  factor = guidance.eps_factor(prediction, SCHEDULE)
  found = guidance.contrasted(known, contexts, scale, tau, factor)(X, T)
  positive, nothing, negative = eps
  towards, away = (((e - nothing) ** 2).sum(axis=1, keepdims=True) for e in (positive, negative))
  expected = (
    nothing
    + scale * 2 / (1 + np.exp(-tau * towards)) * (positive - nothing)
    - scale * 2 * np.exp(-tau * away) / (1 + np.exp(-tau * away)) * (negative - nothing)
  )
  np.testing.assert_allclose(a * np.asarray(X) + b * found, expected, rtol=1e-4)


def test_what_is_far_from_the_negative_condition_is_left_alone():
  pull, push = guidance.contrastive_weights(jnp.array([0.0, 5.0, 500.0]), 0.2)
  np.testing.assert_allclose(pull, [1, 2 / (1 + np.exp(-1)), 2], rtol=1e-6)
  np.testing.assert_allclose(push, [1, 2 / (1 + np.exp(1)), 0], rtol=1e-6, atol=1e-6)


CONTEXT = (jnp.linspace(-1, 5, 24).reshape(2, 12), jnp.ones((2, 3), bool))


@pytest.mark.parametrize("mix", [0.0, 0.5, 1.0])
def test_a_condition_is_whole_at_the_end_and_noise_at_the_beginning(mix):
  config = AnnealingConfig(noise=0.5, begin=0.4, end=0.8, mix=mix)
  at = jax.jit(guidance.annealed(config, CONTEXT, jax.random.key(0)))
  for late in (0.0, 390.0):
    np.testing.assert_allclose(at(jnp.array([late]))[0], CONTEXT[0], rtol=1e-5, atol=1e-5)
  early, mask = at(jnp.array([900.0]))
  np.testing.assert_array_equal(mask, CONTEXT[1])
  correlation = [np.corrcoef(a, b)[0, 1] for a, b in zip(early, CONTEXT[0], strict=True)]
  assert np.abs(correlation).max() < 0.7
  if mix == 1:  # each row keeps its own mean and deviation
    np.testing.assert_allclose(early.mean(axis=1), CONTEXT[0].mean(axis=1), atol=1e-4)
    np.testing.assert_allclose(early.std(axis=1), CONTEXT[0].std(axis=1), rtol=1e-4)
  if mix == 0:
    assert 0.2 < float(early.std()) < 0.8 and abs(float(early.mean())) < 0.5


def test_between_the_signal_falls_as_the_square_root():
  config = AnnealingConfig(noise=0.0, begin=0.4, end=0.8, mix=0.0)
  at = guidance.annealed(config, CONTEXT, jax.random.key(0))
  np.testing.assert_allclose(at(jnp.array([700.0]))[0], 0.5 * CONTEXT[0], rtol=1e-5)


def test_every_step_has_its_own_noise_and_the_same_one_again():
  config = AnnealingConfig(noise=0.5)
  at = guidance.annealed(config, CONTEXT, jax.random.key(0))
  first, again, other = (at(jnp.array([t]))[0] for t in (990.0, 990.0, 980.0))
  np.testing.assert_array_equal(first, again)
  assert not np.allclose(first, other)


def test_annealing_that_ends_before_it_begins_is_refused():
  with pytest.raises(ValueError, match="begin must be lower"):
    AnnealingConfig(begin=0.9, end=0.5)
