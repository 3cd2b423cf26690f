"""Noise that is chosen by a gradient through the sampler."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdiff.diffusion import sampler, seed_select
from memdiff.diffusion.sampler import Solver
from memdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig
from memdiff.diffusion.seed_select import SeedSelectConfig

SCHEDULE = NoiseSchedule(ScheduleConfig("cosine", 100))
SHAPE = (6, 4)
CENTRES = jnp.array([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [-1.0, -1.0, 0, 0]])
CONFIG = SeedSelectConfig(iterations=12, learning_rate=0.5, tolerance=0.0)


def denoise(x, t):
  """The best prediction of x0 for noised points of three kinds, so that noise decides the kind."""
  step = jnp.round(t * (SCHEDULE.num_steps / 1000)).astype(int)
  signal, noise = SCHEDULE.scales(step, x)
  gaps = jnp.square(x[:, None] - signal[:, None] * CENTRES[None]).sum(axis=2)
  return jax.nn.softmax(-gaps / (2 * noise**2 + 1.0), axis=1) @ CENTRES


def draw(noise, last=3):
  solver = Solver("ddim", 8, "x0", last=last)
  return sampler.sample(denoise, SCHEDULE, noise.shape, jax.random.key(0), solver, noise=noise)


NOISE = jax.random.normal(jax.random.key(1), SHAPE)
TARGETS = jnp.tile(CENTRES[1][None], (6, 1))
LOSS = seed_select.loss_of(CONFIG, lambda x: x, TARGETS, TARGETS)


def test_the_sampler_begins_with_given_noise_and_gives_its_last_predictions():
  images, predicted = draw(NOISE)
  assert predicted.shape == (3, *SHAPE)
  np.testing.assert_allclose(images, predicted[-1], atol=1e-6)  # the last stride ends at x0
  again = draw(NOISE, last=0)
  np.testing.assert_array_equal(again, images)
  key = jax.random.key(7)
  drawn = sampler.sample(denoise, SCHEDULE, SHAPE, key, Solver("ddim", 8, "x0"))
  given = sampler.normal(jax.random.split(key)[0], SHAPE)
  np.testing.assert_allclose(draw(given, last=0), drawn, atol=1e-6)


def test_the_loss_is_its_formula():
  images, predicted = (np.asarray(x, float) for x in draw(NOISE))
  cosine = (predicted * np.asarray(TARGETS)).sum(-1) / np.linalg.norm(predicted, axis=-1)
  semantic = (np.array([0.05, 0.25, 0.7])[:, None] * (1 - cosine)).sum(axis=0)
  expected = 10 * semantic + ((images - np.asarray(TARGETS)) ** 2).mean(axis=1)
  np.testing.assert_allclose(LOSS(*draw(NOISE)), expected, rtol=1e-4)


def test_the_gradient_goes_through_every_step_and_does_not_vanish():
  gradient = jax.grad(lambda noise: LOSS(*draw(noise)).sum())(NOISE)
  assert np.isfinite(gradient).all() and (np.abs(gradient).max(axis=1) > 1e-4).all()
  step = 1e-3 * gradient / jnp.linalg.norm(gradient)
  slope = (LOSS(*draw(NOISE + step)).sum() - LOSS(*draw(NOISE - step)).sum()) / 2e-3
  np.testing.assert_allclose(slope, jnp.linalg.norm(gradient), rtol=0.05)


def test_losses_fall_and_images_come_to_be_of_the_class():
  chosen, losses = jax.jit(lambda noise: seed_select.select(CONFIG, draw, LOSS, noise))(NOISE)
  before, after = LOSS(*draw(NOISE)), LOSS(*draw(chosen))
  np.testing.assert_allclose(losses[0], before, rtol=1e-5)
  np.testing.assert_allclose(after, np.nanmin(losses, axis=0), rtol=1e-3)
  assert after.mean() < 0.7 * before.mean() and (after <= before + 1e-5).all()


def test_each_image_is_chosen_by_itself():
  together, _ = seed_select.select(CONFIG, draw, LOSS, NOISE)
  loss = seed_select.loss_of(CONFIG, lambda x: x, TARGETS[2:3], TARGETS[2:3])
  alone, _ = seed_select.select(CONFIG, draw, loss, NOISE[2:3])
  np.testing.assert_allclose(alone[0], together[2], atol=1e-4)


def test_it_stops_once_nothing_is_gained():
  strict = dataclasses.replace(CONFIG, tolerance=0.95)
  _, losses = seed_select.select(strict, draw, LOSS, NOISE)
  assert np.isnan(losses[4:]).all() and np.isfinite(losses[0]).all()


def test_without_updates_the_noise_stays():
  config = dataclasses.replace(CONFIG, iterations=0)
  chosen, losses = seed_select.select(config, draw, LOSS, NOISE)
  np.testing.assert_array_equal(chosen, NOISE)
  assert losses.shape == (1, 6)


@pytest.mark.parametrize("weight", ["semantic", "appearance"])
def test_either_part_may_be_left_out(weight):
  config = dataclasses.replace(CONFIG, **{weight: 0.0})
  loss = seed_select.loss_of(config, lambda x: x, TARGETS, TARGETS)
  assert (loss(*draw(NOISE)) < LOSS(*draw(NOISE))).all()  # none is at its target
