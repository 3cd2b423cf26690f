"""Denoisers use the memory, all of it, nothing but it, and never the noised feature itself."""

import dataclasses
import math
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdiff.config import build
from memdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig, time_embedding
from memdiff.errors import ConfigError
from memdiff.memory import memory_bank
from memdiff.memory.memory_bank import Memory, MemoryBank
from memdiff.synthesis import denoisers, hallucination
from memdiff.synthesis.denoisers import DenoiserConfig
from memdiff.synthesis.feature_diffusion import DENOISERS
from memdiff.synthesis.hallucination import SamplerConfig, Steering, TrainedDenoiser
from tests.support import normal

CLASSES, SLOTS, DIM, BATCH = 3, 4, 5, 6
CONFIG = DenoiserConfig("mlp", width=16, num_blocks=2, embedding_dim=8, num_heads=2)


def make_memory(seed=0, stored=3):
  mask = jnp.tile(jnp.arange(SLOTS)[None] < stored, (BATCH, 1))
  return Memory(
    jnp.asarray(normal(seed, BATCH, DIM)),
    jnp.asarray(normal(seed + 1, BATCH, SLOTS, DIM)),
    mask,
    jnp.full((BATCH,), 3.0),
  )


X, T, LABEL = (
  jnp.asarray(normal(7, BATCH, DIM)),
  jnp.linspace(0, 999, BATCH),
  jnp.arange(BATCH) % CLASSES,
)
TIME = jnp.array([321.0])  # of all rows, as a sampler gives it
SAMPLING = SamplerConfig(
  sampler="ddim", num_steps=4, condition="class_and_memory", guidance=(1.0,), start=(1.0,),
  x0_limit=5.0, chunk_size=8,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Made:
  """A denoiser with random parameters: as initialised, the last layer is zero and shows nothing."""

  model: nn.Module
  params: Any
  predict: Any  # jitted (made, x, t, label, memory)


@pytest.fixture(scope="module", params=sorted(DENOISERS))
def made(request):
  model = DENOISERS[request.param](CLASSES, DIM, dataclasses.replace(CONFIG, name=request.param))

  shapes = jax.eval_shape(model.init, jax.random.key(0), X, T, LABEL, make_memory())["params"]
  leaves, treedef = jax.tree.flatten(shapes)
  params = jax.tree.unflatten(treedef, [0.4 * normal(i, *x.shape) for i, x in enumerate(leaves)])
  predict = jax.jit(lambda params, *inputs: model.apply({"params": params}, *inputs))
  return Made(model, params, predict)


def noise_of(made, memory, label=LABEL, x=X, t=T, params=None):
  return np.asarray(made.predict(params or made.params, x, t, label, memory)[0])


def changed_rows(one, other):
  return (np.abs(one - other) > 1e-4).any(axis=1)


def test_prediction_and_bottleneck_have_their_shapes(made):
  prediction, bottleneck = made.predict(made.params, X, T, LABEL, make_memory())
  assert prediction.shape == (BATCH, DIM) and bottleneck.shape == (BATCH, CONFIG.width)
  assert prediction.dtype == bottleneck.dtype == jnp.float32


def test_a_fresh_denoiser_predicts_no_noise(made):
  variables = jax.jit(made.model.init)(jax.random.key(0), X, T, LABEL, make_memory())
  assert not noise_of(made, make_memory(), params=variables["params"]).any()


@pytest.mark.parametrize("part", ["prototype", "slots", "count", "mask"])
def test_every_part_of_the_memory_matters(made, part):
  memory = make_memory()
  other = {
    "prototype": memory.prototype + 1,
    "slots": memory.slots + 1,
    "count": memory.count + 20,
    "mask": make_memory(stored=2).mask,
  }[part]
  changed = changed_rows(noise_of(made, memory), noise_of(made, memory.replace(**{part: other})))
  assert changed.all()


def test_class_time_and_noised_feature_matter(made):
  memory = make_memory()
  base = noise_of(made, memory)
  assert changed_rows(base, noise_of(made, memory, label=(LABEL + 1) % CLASSES)).all()
  assert changed_rows(base, noise_of(made, memory, label=jnp.full_like(LABEL, CLASSES))).all()
  assert changed_rows(base, noise_of(made, memory, t=(T + 300) % 1000)).all()
  assert changed_rows(base, noise_of(made, memory, x=X + 1)).all()


def test_rows_of_a_batch_do_not_mix(made):
  memory = make_memory()
  other = jax.tree.map(lambda a, b: a.at[2].set(b[2]), memory, make_memory(50))
  changed = changed_rows(noise_of(made, memory), noise_of(made, other))
  assert changed.tolist() == [row == 2 for row in range(BATCH)]


def test_the_order_of_the_slots_does_not_matter(made):
  memory = make_memory()
  order = jnp.array([2, 3, 0, 1])
  moved = memory.replace(slots=memory.slots[:, order], mask=memory.mask[:, order])
  np.testing.assert_allclose(noise_of(made, memory), noise_of(made, moved), atol=2e-5)


def test_masked_slots_have_no_influence(made):
  memory = make_memory()

  def total(slots):
    inputs = X, T, LABEL, memory.replace(slots=slots)
    prediction, bottleneck = made.predict(made.params, *inputs)
    return jnp.sum(jnp.sin(prediction)) + jnp.sum(jnp.sin(bottleneck))

  gradient = np.abs(jax.grad(total)(memory.slots)).max(axis=-1)
  filled = np.asarray(memory.mask)
  assert (gradient[~filled] == 0).all() and (gradient[filled] > 1e-6).all()
  junk = memory.replace(slots=jnp.where(memory.mask[..., None], memory.slots, 1e6))
  np.testing.assert_array_equal(noise_of(made, memory), noise_of(made, junk))


def test_an_empty_memory_gives_finite_predictions_and_gradients(made):
  empty = memory_bank.forget(make_memory(), jnp.ones((BATCH,), bool))

  def total(params):
    return jnp.sum(made.predict(params, X, T, LABEL, empty)[0])

  assert np.isfinite(noise_of(made, empty)).all()
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(jax.grad(total)(made.params)))


@pytest.mark.parametrize("own", [0, 2])
def test_the_noised_feature_is_not_in_its_own_context(made, own):
  """Through slots, prototype and all, the context has no gradient wrt the left-out feature."""
  members = normal(20, SLOTS, DIM)
  x_t = normal(21, 1, DIM)

  def prediction(members, leave_out):
    memory = Memory(
      members.mean(axis=0)[None], members[None], jnp.ones((1, SLOTS), bool), jnp.array([4.0])
    )
    if leave_out:
      memory = memory_bank.leave_one_out(memory, members[own][None])
    noise, _ = made.predict(made.params, x_t, jnp.array([300.0]), jnp.array([1]), memory)
    return jnp.sum(jnp.sin(noise))

  gradient_of = jax.jit(jax.grad(prediction), static_argnums=1)
  gradient = np.abs(gradient_of(members, True)).max(axis=1)
  others = np.arange(SLOTS) != own
  assert gradient[own] < 1e-6 < 1e-3 < gradient[others].min()
  assert np.abs(gradient_of(members, False)).max(axis=1)[own] > 1e-3


def in_two(made, x, t, memory=None):
  """Prediction and bottleneck by way of the encoded conditioning."""
  variables = {"params": made.params}

  @jax.jit
  def run(x, t, memory):
    context = made.model.apply(variables, LABEL, memory, method="condition")
    return made.model.apply(variables, x, t, context, method="denoise")

  return run(x, t, memory or make_memory())


def test_the_two_halves_equal_the_whole(made):
  whole = made.predict(made.params, X, T, LABEL, make_memory())
  for part, expected in zip(in_two(made, X, T), whole, strict=True):
    np.testing.assert_allclose(part, expected, atol=1e-5)


def test_one_time_for_all_rows_equals_the_same_time_for_each(made):
  shared, each = in_two(made, X, TIME), in_two(made, X, jnp.tile(TIME, BATCH))
  for one, other in zip(shared, each, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize("time", [TIME, jnp.linspace(0, 900, 8)])
def test_a_context_serves_several_rows_as_if_each_had_its_own(made, number, time):
  variables, x = {"params": made.params}, normal(8, 8, DIM)
  memory, label = jax.tree.map(lambda leaf: leaf[:number], make_memory()), LABEL[:number]

  @jax.jit
  def denoise(label, memory):
    context = made.model.apply(variables, label, memory, method="condition")
    return made.model.apply(variables, x, time, context, method="denoise")

  each = jax.tree.map(lambda leaf: jnp.repeat(leaf, 8 // number, axis=0), (label, memory))
  for part, expected in zip(denoise(label, memory), denoise(*each), strict=True):
    assert len(np.unique(expected, axis=0)) == 8
    np.testing.assert_allclose(part, expected, rtol=1e-4, atol=1e-5)


def test_a_sampling_step_embeds_the_time_once_for_all_rows(made):
  """As the compiled program says; with a time for each row it computes as many waves as rows."""
  predict = jax.jit(lambda x, t: in_two(made, x, t)[0])
  for time, rows in ((TIME, 1), (jnp.tile(TIME, BATCH), BATCH)):
    program = predict.lower(X, time).compile().as_text()
    waves = re.findall(r"= f32\[([\d,]+)\]\S* (?:cosine|sine)\(", program)
    sizes = [math.prod(map(int, shape.split(","))) for shape in waves]
    assert sizes == [rows * CONFIG.embedding_dim // 2] * 2


# --- guidance --------------------------------------------------------------------------------


def guided(made, scale):
  """[B, D] at the scale, which is static for a number and traced for an array."""

  def predict(params, scale):
    denoise = hallucination.guided_denoiser(made.model, params, LABEL, make_memory(), scale)
    return denoise(X, TIME)

  if isinstance(scale, float):
    return jax.jit(lambda params: predict(params, scale))(made.params)
  return jax.jit(predict)(made.params, scale)


def conditional(made):
  return noise_of(made, make_memory(), t=jnp.tile(TIME, BATCH))


def unconditional(made):
  nothing = memory_bank.forget(make_memory(), jnp.ones((BATCH,), bool))
  label = jnp.full_like(LABEL, CLASSES)
  return noise_of(made, nothing, label, t=jnp.tile(TIME, BATCH))


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guidance_extrapolates_from_nothing_known_to_the_class(made, scale):
  base = unconditional(made)
  expected = base + scale * (conditional(made) - base)
  np.testing.assert_allclose(guided(made, scale), expected, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(guided(made, jnp.array(scale)), expected, rtol=1e-4, atol=1e-4)
  assert changed_rows(base, conditional(made)).all()


def test_the_pair_runs_where_the_scale_is_traced_or_is_not_one(made):
  rows = []

  @dataclasses.dataclass(frozen=True)
  class Spy:
    num_classes: int = CLASSES

    def apply(self, variables, *inputs, method):
      if method == "denoise":
        rows.append(len(inputs[0]))
      return made.model.apply(variables, *inputs, method=method)

  spy = dataclasses.replace(made, model=Spy())
  guided(spy, 1.0)
  guided(spy, 2.0)
  guided(spy, jnp.array(1.0))
  assert rows == [BATCH, 2 * BATCH, 2 * BATCH]


def make_bank():
  return MemoryBank(
    prototype=jnp.asarray(normal(1, 4, DIM)),
    slots=jnp.asarray(normal(2, 4, SLOTS, DIM)),
    seen=jnp.full((4,), 4),
  )


def sample(made, mesh, bank, labels, config, guidance=1.0):
  schedule = NoiseSchedule(ScheduleConfig("cosine", 100))
  denoiser = TrainedDenoiser(made.model, made.params, schedule, "v")
  key, steering = jax.random.key(0), Steering(guidance)
  return hallucination.sample_features(denoiser, bank, labels, key, config, mesh, steering)


def test_several_scales_share_a_program_and_equal_each_alone(made, mesh):
  bank, labels = make_bank(), np.array([0, 1, 2, 1, 0])
  scales = jnp.array([0.0, 1.0, 2.5])
  sweep = jax.jit(
    jax.vmap(lambda scale: sample(made, mesh, bank, labels, SAMPLING, scale))
  )(scales)  # fmt: skip
  assert sweep.shape == (3, 5, DIM)
  for scale, samples in zip(scales, sweep, strict=True):
    alone = jax.jit(lambda b, g=float(scale): sample(made, mesh, b, labels, SAMPLING, g))(bank)
    np.testing.assert_allclose(samples, alone, rtol=1e-3, atol=1e-4)
  assert changed_rows(sweep[0], sweep[2]).all()


def test_changing_the_bank_changes_the_samples(made, mesh):
  labels, bank = np.array([0, 1, 2, 0, 1, 2, 0]), make_bank()
  samples = jax.jit(lambda bank: sample(made, mesh, bank, labels, SAMPLING))
  base = np.asarray(samples(bank))
  assert base.shape == (7, DIM) and np.isfinite(base).all()
  for other in (
    bank.replace(slots=bank.slots.at[1].add(1.0)),
    bank.replace(prototype=bank.prototype.at[1].add(1.0)),
  ):
    changed = changed_rows(base, np.asarray(samples(other)))
    assert changed.tolist() == (labels == 1).tolist()


@pytest.mark.parametrize(
  ("condition", "sees_label", "sees_bank"),
  [("class_and_memory", True, True), ("memory", False, True), ("class", True, False)],
)
def test_samples_depend_on_what_the_condition_names(made, mesh, condition, sees_label, sees_bank):
  config = dataclasses.replace(SAMPLING, condition=condition, x0_limit=0.0)
  row = normal(2, 1, SLOTS, DIM)
  same = MemoryBank(  # classes 0 and 1 hold the same memory
    prototype=jnp.zeros((4, DIM)), slots=jnp.tile(row, (4, 1, 1)), seen=jnp.full((4,), 4)
  )
  samples = jax.jit(lambda bank, labels: sample(made, mesh, bank, labels, config), static_argnums=1)
  base = np.asarray(samples(same, (0, 0)))
  relabelled = np.asarray(samples(same, (1, 1)))
  assert changed_rows(base, relabelled).all() == sees_label
  other = np.asarray(samples(same.replace(slots=same.slots + 1), (0, 0)))
  assert changed_rows(base, other).all() == sees_bank


# --- the parts -------------------------------------------------------------------------------


def test_time_embedding_is_that_of_the_transformer():
  t, dim = np.array([0.0, 1.0, 37.5, 999.0]), 8
  angle = t[:, None] / 10_000 ** (np.arange(4) / 4)
  expected = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
  np.testing.assert_allclose(time_embedding(jnp.asarray(t), dim), expected, atol=2e-4)


def test_an_odd_embedding_is_refused():
  with pytest.raises(ConfigError, match=r"embedding_dim is 9, .*even"):
    build(
      DenoiserConfig,
      {"name": "mlp", "width": 8, "num_blocks": 1, "embedding_dim": 9, "num_heads": 2},
    )


def test_denoisers_are_chosen_by_the_names_of_the_settings():
  assert tuple(DENOISERS) == denoisers.NAMES


@pytest.mark.parametrize("features", [(7,), (2, 3)])
def test_an_affine_layer_is_a_dense_one_on_its_parts_side_by_side(features):
  """Same parameters from the same key, same result, also for a part of one row."""
  parts = normal(0, BATCH, 4), normal(1, BATCH, 3), normal(2, 1, 5)
  whole = [jnp.broadcast_to(part, (BATCH, part.shape[1])) for part in parts]
  dense, joint = nn.DenseGeneral(features), jnp.concatenate(whole, axis=1)
  variables = dense.init(jax.random.key(0), joint)
  ours = denoisers.Affine(features)
  jax.tree.map(np.testing.assert_array_equal, ours.init(jax.random.key(0), *parts), variables)
  expected = dense.apply(variables, joint)
  np.testing.assert_array_equal(ours.apply(variables, *whole), expected)
  np.testing.assert_allclose(ours.apply(variables, *parts), expected, rtol=1e-5, atol=1e-6)
