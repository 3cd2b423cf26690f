"""A class that training never saw is sampled from its exemplars alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig
from memdiff.diffusion.terms import ObjectiveConfig
from memdiff.memory import memory_bank
from memdiff.runtime.train_state import OptimizerConfig
from memdiff.synthesis import feature_diffusion, hallucination
from memdiff.synthesis.denoisers import DenoiserConfig
from memdiff.synthesis.feature_diffusion import DENOISERS, DiffusionConfig
from memdiff.synthesis.hallucination import SamplerConfig, TrainedDenoiser

CLASSES, MEMBERS, DIM, SLOTS, NEW, SPREAD, STEPS = 20, 30, 6, 8, 4, 0.3, 400
CONFIG = DiffusionConfig(
  schedule=ScheduleConfig("cosine", 100),
  prediction="v",
  objective=ObjectiveConfig(),
  ema_decay=0.99,
  num_steps=STEPS,
  optimizer=OptimizerConfig("adamw", 2e-3, "cosine", (), (), 0.9, False, 0.0, 0.05, 1.0, 1),
  denoiser=DenoiserConfig("mlp", width=48, num_blocks=1, embedding_dim=16, num_heads=2),
  condition="memory",
  class_exponent=0.5,
  label_dropout=0.1,
  anonymous=0.5,
  displacement=1.0,
  batch_size=64,
)
SAMPLING = SamplerConfig(
  sampler="dpm++",
  num_steps=20,
  condition="memory",
  guidance=(1.0,),
  start=(1.0,),
  x0_limit=0.0,
  chunk_size=1000,
)


def make_classes():
  """Means [CLASSES + NEW, D] and members [CLASSES + NEW, MEMBERS, D]; deviation SPREAD."""
  rng = np.random.default_rng(0)
  means = rng.normal(size=(CLASSES + NEW, 1, DIM)).astype(np.float32)
  noise = rng.normal(size=(CLASSES + NEW, MEMBERS, DIM)).astype(np.float32)
  return means[:, 0], means + SPREAD * noise


def fill_bank(members, mesh):
  """A bank of these classes [C, n, D] and no others."""
  classes, number, _ = members.shape
  labels = jnp.repeat(jnp.arange(classes), number)
  update = jax.jit(functools.partial(memory_bank.update, horizon=1000, mesh=mesh))
  empty = memory_bank.create(classes, SLOTS, DIM)
  valid = jnp.ones(labels.shape, bool)
  return update(empty, jnp.asarray(members.reshape(-1, DIM)), labels, valid, jax.random.key(0))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(DENOISERS))
def test_a_class_never_seen_is_sampled_from_its_exemplars(mesh, name):
  means, members = make_classes()
  denoiser_config = dataclasses.replace(CONFIG.denoiser, name=name)
  config = dataclasses.replace(CONFIG, denoiser=denoiser_config)
  features, labels = members[:CLASSES].reshape(1, -1, DIM), np.repeat(np.arange(CLASSES), MEMBERS)
  bank = jax.tree.map(lambda x: x[None], fill_bank(members[:CLASSES], mesh))
  own = feature_diffusion.make_data(features, labels, bank, CLASSES, 0.5, mesh)
  stage = feature_diffusion.make_stage(config, own, CLASSES, mesh)

  @jax.jit
  def train(key, own):
    def step(state, _):
      return stage.step(state, (), own)

    return jax.lax.scan(step, stage.init(key, own), None, length=STEPS)[0].ema_params

  params = train(jax.random.key(0), jax.tree.map(lambda x: x[0], own))
  denoiser = feature_diffusion.make_denoiser(config, CLASSES, DIM)
  new_bank = fill_bank(members[CLASSES:, :SLOTS], mesh)  # knows the new classes only, as 0, 1, ...
  wanted = jnp.repeat(jnp.arange(NEW), 200)

  @jax.jit
  def sample(params, bank):
    trained = TrainedDenoiser(denoiser, params, NoiseSchedule(config.schedule), "v")
    return hallucination.sample_features(trained, bank, wanted, jax.random.key(1), SAMPLING, mesh)

  samples = np.asarray(sample(params, new_bank)).reshape(NEW, 200, DIM)
  error_of_exemplars = SPREAD * np.sqrt(DIM / SLOTS)  # of their mean, as expected
  for own_mean, drawn in zip(means[CLASSES:], samples, strict=True):
    distance = np.linalg.norm(drawn - own_mean, axis=1)
    others = np.linalg.norm(drawn[:, None] - means[None, :CLASSES], axis=2).min(axis=1)
    assert (distance < others).mean() > 0.85
    assert np.linalg.norm(drawn.mean(axis=0) - own_mean) < 2 * error_of_exemplars
    spread = np.sqrt(drawn.var(axis=0).mean())
    assert 0.7 * SPREAD < spread < 1.5 * SPREAD
