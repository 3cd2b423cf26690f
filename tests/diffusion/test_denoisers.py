"""The denoiser uses the memory, all of it, nothing but it, and never the noised feature itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdiff import hallucination, memory_bank
from memdiff.config import build
from memdiff.diffusion import denoisers
from memdiff.diffusion.denoisers import DenoiserConfig, MLPDenoiser
from memdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig
from memdiff.errors import ConfigError
from memdiff.hallucination import HallucinationConfig
from memdiff.memory_bank import Memory, MemoryBank

CLASSES, SLOTS, DIM, BATCH = 3, 4, 5, 6
CONFIG = DenoiserConfig(width=16, num_blocks=2, embedding_dim=8, num_heads=2)
MODEL = MLPDenoiser(CLASSES, DIM, CONFIG)


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def make_memory(seed=0, stored=3):
  mask = jnp.tile(jnp.arange(SLOTS)[None] < stored, (BATCH, 1))
  return Memory(
    normal(seed, BATCH, DIM), normal(seed + 1, BATCH, SLOTS, DIM), mask, jnp.full((BATCH,), 3.0)
  )


X, T, LABEL = normal(7, BATCH, DIM), jnp.linspace(0, 999, BATCH), jnp.arange(BATCH) % CLASSES


@pytest.fixture(scope="module")
def params():
  """Random ones: as initialised, the last layer is zero and nothing could be seen."""

  @jax.jit
  def make():
    tree = MODEL.init(jax.random.key(0), X, T, LABEL, make_memory())["params"]
    leaves, treedef = jax.tree.flatten(tree)
    noisy = [x + 0.3 * normal(i, *x.shape) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(treedef, noisy)

  return make()


@jax.jit
def predict(params, x, t, label, memory):
  return MODEL.apply({"params": params}, x, t, label, memory)


def noise_of(params, memory, label=LABEL, x=X, t=T):
  return np.asarray(predict(params, x, t, label, memory)[0])


def changed_rows(one, other):
  return (np.abs(one - other) > 1e-4).any(axis=1)


def test_prediction_and_bottleneck_have_their_shapes(params):
  prediction, bottleneck = predict(params, X, T, LABEL, make_memory())
  assert prediction.shape == (BATCH, DIM) and bottleneck.shape == (BATCH, CONFIG.width)
  assert prediction.dtype == bottleneck.dtype == jnp.float32


def test_a_fresh_denoiser_predicts_no_noise():
  variables = jax.jit(MODEL.init)(jax.random.key(0), X, T, LABEL, make_memory())
  assert not noise_of(variables["params"], make_memory()).any()


@pytest.mark.parametrize("part", ["prototype", "slots", "count", "mask"])
def test_every_part_of_the_memory_matters(params, part):
  memory = make_memory()
  other = {
    "prototype": memory.prototype + 1,
    "slots": memory.slots + 1,
    "count": memory.count + 20,
    "mask": make_memory(stored=2).mask,
  }[part]
  changed = changed_rows(
    noise_of(params, memory), noise_of(params, memory.replace(**{part: other}))
  )
  assert changed.all()


def test_class_time_and_noised_feature_matter(params):
  memory = make_memory()
  base = noise_of(params, memory)
  assert changed_rows(base, noise_of(params, memory, label=(LABEL + 1) % CLASSES)).all()
  assert changed_rows(base, noise_of(params, memory, label=jnp.full_like(LABEL, CLASSES))).all()
  assert changed_rows(base, noise_of(params, memory, t=(T + 300) % 1000)).all()
  assert changed_rows(base, noise_of(params, memory, x=X + 1)).all()


def test_rows_of_a_batch_do_not_mix(params):
  memory = make_memory()
  other = jax.tree.map(lambda a, b: a.at[2].set(b[2]), memory, make_memory(50))
  changed = changed_rows(noise_of(params, memory), noise_of(params, other))
  assert changed.tolist() == [row == 2 for row in range(BATCH)]


def test_the_order_of_the_slots_does_not_matter(params):
  memory = make_memory()
  order = jnp.array([2, 3, 0, 1])
  moved = memory.replace(slots=memory.slots[:, order], mask=memory.mask[:, order])
  np.testing.assert_allclose(noise_of(params, memory), noise_of(params, moved), atol=2e-5)


def test_masked_slots_have_no_influence(params):
  memory = make_memory()

  def total(slots):
    prediction, bottleneck = predict(params, X, T, LABEL, memory.replace(slots=slots))
    return jnp.sum(jnp.sin(prediction)) + jnp.sum(jnp.sin(bottleneck))

  gradient = np.abs(jax.grad(total)(memory.slots)).max(axis=-1)
  filled = np.asarray(memory.mask)
  assert (gradient[~filled] == 0).all() and (gradient[filled] > 1e-6).all()
  junk = memory.replace(slots=jnp.where(memory.mask[..., None], memory.slots, 1e6))
  np.testing.assert_array_equal(noise_of(params, memory), noise_of(params, junk))


def test_an_empty_memory_gives_finite_predictions_and_gradients(params):
  empty = memory_bank.forget(make_memory(), jnp.ones((BATCH,), bool))

  def total(params):
    return jnp.sum(predict(params, X, T, LABEL, empty)[0])

  assert np.isfinite(noise_of(params, empty)).all()
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(jax.grad(total)(params)))


@pytest.mark.parametrize("own", [0, 2])
def test_the_noised_feature_is_not_in_its_own_context(params, own):
  """Through slots, prototype and all, the context has no gradient wrt the left-out feature."""
  members = normal(20, SLOTS, DIM)
  x_t = normal(21, 1, DIM)

  def prediction(members, leave_out):
    memory = Memory(
      members.mean(axis=0)[None], members[None], jnp.ones((1, SLOTS), bool), jnp.array([4.0])
    )
    if leave_out:
      memory = memory_bank.leave_one_out(memory, members[own][None])
    noise, _ = MODEL.apply({"params": params}, x_t, jnp.array([300.0]), jnp.array([1]), memory)
    return jnp.sum(jnp.sin(noise))

  gradient_of = jax.jit(jax.grad(prediction), static_argnums=1)
  gradient = np.abs(gradient_of(members, True)).max(axis=1)
  others = np.arange(SLOTS) != own
  assert gradient[own] < 1e-6 < 1e-3 < gradient[others].min()
  assert np.abs(gradient_of(members, False)).max(axis=1)[own] > 1e-3


def test_the_two_halves_equal_the_whole(params):
  memory, variables = make_memory(), {"params": params}
  context = MODEL.apply(variables, LABEL, memory, method="condition")
  in_two, bottleneck = MODEL.apply(variables, X, T, context, method="denoise")
  whole = predict(params, X, T, LABEL, memory)
  np.testing.assert_allclose(in_two, whole[0], atol=1e-5)
  np.testing.assert_allclose(bottleneck, whole[1], atol=1e-5)


# --- guidance --------------------------------------------------------------------------------


def guided(params, scale):
  @jax.jit
  def predict(params):
    return hallucination.guided_denoiser(MODEL, params, LABEL, make_memory(), scale)(X, T)

  return predict(params)


def unconditional(params):
  nothing = memory_bank.forget(make_memory(), jnp.ones((BATCH,), bool))
  return noise_of(params, nothing, label=jnp.full_like(LABEL, CLASSES))


def test_guidance_of_one_is_the_plain_conditional_prediction(params):
  np.testing.assert_allclose(guided(params, 1.0), noise_of(params, make_memory()), atol=1e-5)


def test_guidance_of_zero_ignores_class_and_memory(params):
  np.testing.assert_allclose(guided(params, 0.0), unconditional(params), atol=1e-5)
  assert changed_rows(unconditional(params), noise_of(params, make_memory())).all()


def test_stronger_guidance_extrapolates(params):
  conditional, base = noise_of(params, make_memory()), unconditional(params)
  expected = base + 3.0 * (conditional - base)
  np.testing.assert_allclose(guided(params, 3.0), expected, rtol=1e-4, atol=1e-4)


def test_changing_the_bank_changes_the_samples(params, mesh):
  config = HallucinationConfig(
    tail_below=10, fill_to=10, sampler="ddim", num_steps=4, guidance=1.0, x0_limit=5.0,
    condition="class_and_memory",
    chunk_size=8, confidence="cosine", confidence_power=1.0, normalize_confidence=True,
  )  # fmt: skip
  schedule = NoiseSchedule(ScheduleConfig("cosine", 100))
  labels = jnp.array([0, 1, 2, 0, 1, 2, 0])
  empty = memory_bank.create(CLASSES, SLOTS, DIM)
  bank = empty.replace(
    prototype=normal(1, 4, DIM), slots=normal(2, 4, SLOTS, DIM), seen=jnp.full((4,), 4)
  )

  @jax.jit
  def samples(bank):
    return hallucination.sample_features(
      MODEL, params, schedule, bank, labels, jax.random.key(0), config, "eps", mesh
    )

  base = np.asarray(samples(bank))
  assert base.shape == (7, DIM) and np.isfinite(base).all()
  for other in (
    bank.replace(slots=bank.slots.at[1].add(1.0)),
    bank.replace(prototype=bank.prototype.at[1].add(1.0)),
  ):
    changed = changed_rows(base, np.asarray(samples(other)))
    assert changed.tolist() == (np.asarray(labels) == 1).tolist()


@pytest.mark.parametrize(
  ("condition", "sees_label", "sees_bank"),
  [("class_and_memory", True, True), ("memory", False, True), ("class", True, False)],
)
def test_samples_depend_on_what_the_condition_names(params, mesh, condition, sees_label, sees_bank):
  config = HallucinationConfig(
    tail_below=10, fill_to=10, sampler="ddim", num_steps=3, guidance=1.0, x0_limit=None,
    condition=condition, chunk_size=8, confidence="cosine", confidence_power=1.0,
    normalize_confidence=True,
  )  # fmt: skip
  schedule = NoiseSchedule(ScheduleConfig("linear", 100))
  row = normal(2, 1, SLOTS, DIM)
  same = MemoryBank(  # classes 0 and 1 hold the same memory
    prototype=jnp.zeros((4, DIM)), slots=jnp.tile(row, (4, 1, 1)), seen=jnp.full((4,), 4)
  )
  samples = jax.jit(
    lambda bank, labels: hallucination.sample_features(
      MODEL, params, schedule, bank, labels, jax.random.key(0), config, "v", mesh
    )
  )
  base = np.asarray(samples(same, jnp.zeros(2, int)))
  relabelled = np.asarray(samples(same, jnp.ones(2, int)))
  assert changed_rows(base, relabelled).all() == sees_label
  other = np.asarray(samples(same.replace(slots=same.slots + 1), jnp.zeros(2, int)))
  assert changed_rows(base, other).all() == sees_bank


# --- the parts -------------------------------------------------------------------------------


def test_time_embedding_is_that_of_the_transformer():
  t, dim = np.array([0.0, 1.0, 37.5, 999.0]), 8
  angle = t[:, None] / 10_000 ** (np.arange(4) / 4)
  expected = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
  np.testing.assert_allclose(denoisers.time_embedding(jnp.asarray(t), dim), expected, atol=2e-4)


def test_an_odd_embedding_is_refused():
  with pytest.raises(ConfigError, match=r"embedding_dim is 9, .*even"):
    build(DenoiserConfig, {"width": 8, "num_blocks": 1, "embedding_dim": 9, "num_heads": 2})
