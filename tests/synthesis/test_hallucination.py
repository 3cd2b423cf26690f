"""Hallucination: what the denoiser may be asked, how far it is guided, chunk by chunk."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memdiff.config import as_dict, build
from memdiff.diffusion import sampler
from memdiff.diffusion.sampler import Solver
from memdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig
from memdiff.diffusion.terms import ObjectiveConfig
from memdiff.errors import ConfigError
from memdiff.memory.memory_bank import Memory, MemoryBank
from memdiff.runtime.train_state import OptimizerConfig
from memdiff.synthesis import hallucination
from memdiff.synthesis.denoisers import DenoiserConfig
from memdiff.synthesis.feature_diffusion import CONDITIONS, DENOISERS, DiffusionConfig
from memdiff.synthesis.hallucination import SamplerConfig, Steering, TrainedDenoiser
from tests.support import moved, normal

CLASSES, ROWS, SLOTS, DIM = 3, 4, 4, 5
SAMPLING = SamplerConfig(
  sampler="ddpm", num_steps=4, condition="class_and_memory", guidance=(1.0,), start=(1.0,),
  x0_limit=6.0, chunk_size=4,
)  # fmt: skip
TRAINING = DiffusionConfig(
  schedule=ScheduleConfig("cosine", 20), prediction="v", objective=ObjectiveConfig(), ema_decay=0.9,
  num_steps=10,
  optimizer=OptimizerConfig("adamw", 1e-3, "cosine", (), (), 0.9, False, 0.0, 0.0, 1.0, 1),
  denoiser=DenoiserConfig("mlp", width=16, num_blocks=1, embedding_dim=8, num_heads=2),
  condition="class_and_memory", class_exponent=0.5, label_dropout=0.1, anonymous=0.5,
  displacement=1.0, batch_size=8,
)  # fmt: skip
SCHEDULE = NoiseSchedule(TRAINING.schedule)
LABELS = np.array([0, 1, 2, 1, 0, 2, 2])  # pairs, and one that is half empty


def make_bank():
  """Classes with all slots full, with two filled, with one; and the row of no class."""
  return MemoryBank(
    prototype=jnp.asarray(normal(1, ROWS, DIM)), slots=jnp.asarray(normal(2, ROWS, SLOTS, DIM)),
    seen=jnp.array([30, 2, 1, 0]),
  )  # fmt: skip


@functools.cache
def make_denoiser(name):
  """Untrained, with random weights everywhere."""
  config = dataclasses.replace(TRAINING.denoiser, name=name)
  model = DENOISERS[name](CLASSES, DIM, config)
  memory = Memory(jnp.zeros((1, DIM)), jnp.zeros((1, SLOTS, DIM)), jnp.ones((1, SLOTS), bool),
                  jnp.ones(1))  # fmt: skip
  params = jax.jit(model.init)(
    jax.random.key(0), jnp.zeros((1, DIM)), jnp.zeros(1), jnp.zeros(1, int), memory
  )["params"]
  return model, moved(params, 0.3)


@pytest.fixture(params=sorted(DENOISERS))
def made(request):
  return make_denoiser(request.param)


@pytest.fixture
def mlp():
  return make_denoiser("mlp")


# --- settings --------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [(1.0,), (0.0, 1.0, 3.5), (2,)])
def test_guidance_is_one_scale_or_several(guidance):
  config = build(SamplerConfig, as_dict(SAMPLING) | {"guidance": guidance})
  assert config.guidance == tuple(map(float, guidance))
  assert dataclasses.replace(SAMPLING, guidance=config.guidance) == config


@pytest.mark.parametrize("guidance", [(), (-0.5,), (1.0, -1.0), 1.0, ("1",)])
def test_guidance_is_nothing_else(guidance):
  with pytest.raises(ConfigError, match="guidance"):
    build(SamplerConfig, as_dict(SAMPLING) | {"guidance": guidance})


# Trained condition, share of anonymous rows, of rows without anything -> what may be sampled.
LEARNED = [
  ("class_and_memory", 0.5, 0.1, {"class_and_memory", "memory"}),
  ("class_and_memory", 0.0, 0.1, {"class_and_memory"}),
  ("class_and_memory", 1.0, 0.1, {"memory"}),
  ("class_and_memory", 0.5, 1.0, set()),
  ("memory", 0.5, 0.1, {"memory"}),
  ("class", 0.5, 0.0, {"class"}),
]


@pytest.mark.parametrize(("condition", "anonymous", "dropout", "learned"), LEARNED)
@pytest.mark.parametrize("sampled", CONDITIONS)
def test_only_what_was_learned_may_be_sampled(condition, anonymous, dropout, learned, sampled):
  trained = dataclasses.replace(
    TRAINING, condition=condition, anonymous=anonymous, label_dropout=dropout
  )
  config = dataclasses.replace(SAMPLING, condition=sampled)
  if sampled in learned:
    hallucination.check_conditions(trained, config)
    return
  with pytest.raises(ValueError, match=f"condition is '{sampled}'") as error:
    hallucination.check_conditions(trained, config)
  words = " and ".join(c for c in CONDITIONS if c in learned) or "no condition"
  assert f"the denoiser learns {words};" in str(error.value)


@pytest.mark.parametrize(
  ("guidance", "dropout", "allowed"),
  [
    ((1.0,), 0.0, True), ((1.0, 1.0), 0.0, True), ((2.0,), 0.1, True), ((0.0, 1.0), 0.1, True),
    ((2.0,), 0.0, False), ((1.0, 2.0), 0.0, False), ((0.0,), 0.0, False),
  ],
)  # fmt: skip
def test_guidance_needs_rows_without_a_label_in_training(guidance, dropout, allowed):
  trained = dataclasses.replace(TRAINING, label_dropout=dropout)
  config = dataclasses.replace(SAMPLING, guidance=guidance)
  if allowed:
    hallucination.check_conditions(trained, config)
  else:
    with pytest.raises(ValueError, match=r"hallucination\.guidance is .*label_dropout"):
      hallucination.check_conditions(trained, config)


# --- guidance --------------------------------------------------------------------------------


def read_by_indexing(bank, labels):
  stored = jnp.arange(SLOTS)[None] < bank.seen[labels][:, None]
  return Memory(
    bank.prototype[labels], bank.slots[labels], stored, bank.seen[labels].astype(jnp.float32)
  )


def nothing_known(number):
  return Memory(
    jnp.zeros((number, DIM)), jnp.zeros((number, SLOTS, DIM)), jnp.zeros((number, SLOTS), bool),
    jnp.zeros(number),
  )  # fmt: skip


def predict_in_two(made, labels, memory, scale):
  """Guidance by its formula, from two calls of the whole denoiser."""
  model, params = made

  def predict(x, t):
    number = x.shape[0]
    time = jnp.tile(t, number)
    no_class = jnp.full((number,), CLASSES)
    told = model.apply({"params": params}, x, time, labels, memory)[0]
    untold = model.apply({"params": params}, x, time, no_class, nothing_known(number))[0]
    return (1 - scale) * untold + scale * told

  return predict


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_the_guided_denoiser_is_that_of_the_formula(made, scale):
  memory, x, t = (
    read_by_indexing(make_bank(), LABELS),
    normal(5, len(LABELS), DIM),
    jnp.array([3.0]),
  )
  expected = jax.jit(predict_in_two(made, LABELS, memory, scale))(x, t)

  def predict(scale):
    return hallucination.guided_denoiser(*made, LABELS, memory, scale)(x, t)

  static, traced = jax.jit(lambda: predict(scale))(), jax.jit(predict)(scale)
  np.testing.assert_allclose(static, expected, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(traced, expected, rtol=1e-4, atol=1e-4)


# --- samples ---------------------------------------------------------------------------------


def sample(made, mesh, bank, labels, guidance, key=0, **fields):
  config = dataclasses.replace(SAMPLING, **fields)
  return hallucination.sample_features(
    TrainedDenoiser(*made, SCHEDULE, "v"), bank, labels, jax.random.key(key), config, mesh,
    Steering(guidance),
  )  # fmt: skip


@pytest.mark.parametrize(
  ("labels", "chunk_size", "groups", "place", "size"),
  [
    ([0, 1, 2, 1, 0, 2, 2], 4, [0, 1, 2, 2], [0, 2, 4, 3, 1, 5, 6], 2),
    ([0, 1, 2, 1], 4, [0, 1, 1, 2], [0, 1, 3, 2], 1),  # pairs would leave a third empty
    ([5] * 16 + [3] * 16, 64, [3, 5], [*range(16, 32), *range(16)], 16),
    ([5] * 16 + [3] * 16, 9, [3, 3, 5, 5], [*range(16, 32), *range(16)], 8),
    ([7] * 15, 64, [7], [*range(15)], 16),
    ([7], 64, [7], [0], 1),
    ([7] * 10, 64, [7], [*range(10)], 10),
    ([7] * 5, 64, [7], [*range(5)], 5),
    ([7] * 5, 5, [7], [*range(5)], 5),
  ],
)
def test_samples_of_a_class_lie_in_groups(labels, chunk_size, groups, place, size):
  found = hallucination.group(np.array(labels), chunk_size)
  assert (found[0].tolist(), found[1].tolist(), found[2]) == (groups, place, size)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=200), st.integers(1, 100))
def test_every_sample_has_a_place_in_a_group_of_its_class(labels, chunk_size):
  groups, place, size = hallucination.group(np.array(labels), chunk_size)
  assert len(set(place.tolist())) == len(labels)
  assert groups[place // size].tolist() == labels
  assert size <= chunk_size and len(groups) * size <= 1.25 * len(labels)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_samples_are_those_of_the_guided_denoiser_chunk_by_chunk(mlp, mesh, condition):
  """Each with a memory of its own here; what is left of the last pair is thrown away."""
  bank, scale = make_bank(), 1.7
  result = jax.jit(lambda b: sample(mlp, mesh, b, LABELS, scale, condition=condition))(bank)
  assert result.shape == (7, DIM) and result.dtype == jnp.float32

  @jax.jit
  def of_chunk(number, labels):
    memory = nothing_known(4) if condition == "class" else read_by_indexing(bank, labels)
    told = jnp.full_like(labels, CLASSES) if condition == "memory" else labels
    return sampler.sample(
      predict_in_two(mlp, told, memory, scale), SCHEDULE, (4, DIM),
      jax.random.fold_in(jax.random.key(0), number), Solver("ddpm", 4, "v", 6.0),
    )  # fmt: skip

  chunks = [of_chunk(0, jnp.array([0, 0, 1, 1])), of_chunk(1, jnp.array([2, 2, 2, 2]))]
  expected = np.concatenate(chunks)[[0, 2, 4, 3, 1, 5, 6]]
  np.testing.assert_allclose(result, expected, rtol=1e-3, atol=1e-3)


def test_origins_stay_with_their_labels(mlp, mesh):
  """A start of 0 gives every origin back."""
  origins = normal(9, len(LABELS), DIM)
  denoiser = TrainedDenoiser(*mlp, SCHEDULE, "v")
  made = jax.jit(
    lambda origins: hallucination.sample_features(
      denoiser, make_bank(), LABELS, jax.random.key(0), SAMPLING, mesh, Steering(1.0, 0.0, origins)
    )
  )(origins)
  np.testing.assert_allclose(made, origins, rtol=1e-5, atol=1e-5)


def test_a_chunk_may_be_larger_than_what_there_is_to_make(mlp, mesh):
  bank = make_bank()
  small = jax.jit(lambda: sample(mlp, mesh, bank, LABELS[:4], 1.0, chunk_size=4))()
  large = jax.jit(lambda: sample(mlp, mesh, bank, LABELS[:4], 1.0, chunk_size=1000))()
  np.testing.assert_array_equal(small, large)


def test_samples_differ_from_each_other_and_repeat_with_their_key(mlp, mesh):
  run = jax.jit(lambda key: sample(mlp, mesh, make_bank(), np.zeros(9, int), 1.0, key=key))
  first, again, other = (np.asarray(run(key)) for key in (0, 0, 1))
  assert np.isfinite(first).all() and len(np.unique(first, axis=0)) == 9  # across chunks too
  np.testing.assert_array_equal(first, again)
  assert (first != other).any(axis=1).all()


SCALES = (0.0, 1.0, 2.5)


@functools.cache
def one_scale_at_a_time(name, mesh):
  """Each static, which spares the pair at 1."""
  run = functools.partial(sample, make_denoiser(name), mesh, make_bank(), LABELS)
  return [np.asarray(jax.jit(functools.partial(run, scale))()) for scale in SCALES]


@pytest.mark.parametrize("name", sorted(DENOISERS))
@pytest.mark.parametrize("sweep", [jax.vmap, lambda f: functools.partial(jax.lax.map, f)])
def test_guidance_swept_in_one_program_equals_one_scale_at_a_time(mesh, name, sweep):
  run = functools.partial(sample, make_denoiser(name), mesh, make_bank(), LABELS)
  together = np.asarray(jax.jit(sweep(run))(jnp.array(SCALES)))
  np.testing.assert_allclose(together, one_scale_at_a_time(name, mesh), rtol=1e-3, atol=1e-3)
  apart = np.abs(together[:, None] - together[None]).max(axis=3)  # [3, 3, M]
  assert (apart[[0, 0, 1], [1, 2, 2]] > 1e-2).all()


def test_without_guidance_by_the_class_all_classes_are_one(mlp, mesh):
  """A scale of 0 asks for features of no class; with 1 the label decides."""
  bank, run = make_bank(), jax.jit(functools.partial(sample, mlp, mesh), static_argnums=1)
  for scale, same in ((0.0, True), (1.0, False)):
    a, b = (np.asarray(run(bank, labels, scale)) for labels in ((0, 1, 1, 0), (1, 2, 2, 1)))
    np.testing.assert_array_equal(np.isclose(a, b, atol=1e-4).all(axis=1), same)


def test_predicted_features_are_clipped(mlp, mesh):
  """At the last step of ddim the sample is the predicted x0."""
  run = functools.partial(sample, mlp, mesh, make_bank(), LABELS, 3.0, sampler="ddim")
  free = np.asarray(jax.jit(lambda: run(x0_limit=0.0))())
  clipped = np.asarray(jax.jit(lambda: run(x0_limit=0.5))())
  assert np.abs(free).max() > 1
  assert np.abs(clipped).max() <= 0.5 + 1e-5


def test_only_one_of_guidance_and_start_has_candidates():
  assert dataclasses.replace(SAMPLING, guidance=(1.0, 2.0)).strengths == (1.0, 2.0)
  several = dataclasses.replace(SAMPLING, start=(0.5, 1.0))
  assert several.strengths == (0.5, 1.0) and several.at(0.5) == Steering(1.0, 0.5)
  with pytest.raises(ValueError, match="only one of them may have several"):
    dataclasses.replace(SAMPLING, guidance=(1.0, 2.0), start=(0.5, 1.0))
