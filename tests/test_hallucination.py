"""Hallucination: how many, how trusted, where from, and never into the bank."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memdiff import hallucination, memory_bank
from memdiff.diffusion.denoisers import DenoiserConfig, MLPDenoiser
from memdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig
from memdiff.errors import ConfigError
from memdiff.feature_space import fit_standardizer
from memdiff.hallucination import HallucinationConfig, SyntheticFeatures
from memdiff.memory_bank import MemoryBank

CLASSES, ROWS, SLOTS, DIM = 3, 4, 4, 5
COUNTS = np.array([30, 6, 2])
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(CLASSES), COUNTS))
CONFIG = HallucinationConfig(
  tail_below=20, fill_to=10, sampler="ddpm", num_steps=5, guidance=1.0, x0_limit=6.0,
  condition="class_and_memory",
  chunk_size=5, confidence="cosine", confidence_power=1.0, normalize_confidence=True,
)  # fmt: skip


def change(**fields):
  return dataclasses.replace(CONFIG, **fields)


# --- the plan --------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 200), min_size=2, max_size=10), st.integers(1, 150),
       st.integers(1, 250))  # fmt: skip
def test_tail_classes_are_filled_up_to_the_target_and_no_others(counts, tail_below, fill_to):
  expected = [max(fill_to - n, 0) if n < tail_below else 0 for n in counts]
  config = change(tail_below=tail_below, fill_to=fill_to)
  if sum(expected) == 0:
    with pytest.raises(ConfigError, match=f"tail_below={tail_below} .*fill_to={fill_to}"):
      hallucination.plan(np.array(counts), config)
  else:
    assert hallucination.plan(np.array(counts), config).tolist() == expected


# --- confidences -----------------------------------------------------------------------------


def make_case(seed=0, num=40):
  """Random synthetic rows of all classes, a bank with an empty row, and logits."""
  rng = np.random.default_rng(seed)
  features = rng.normal(size=(num, DIM)).astype(np.float32) + 2
  labels = np.sort(rng.integers(0, CLASSES, num)).astype(np.int32)
  prototype = rng.normal(size=(ROWS, DIM)).astype(np.float32) + 2
  bank = MemoryBank(
    prototype=jnp.asarray(prototype), slots=jnp.zeros((ROWS, SLOTS, DIM)),
    seen=jnp.array([30, 6, 2, 0]),
  )  # fmt: skip
  logits = (rng.normal(size=(num, CLASSES)) * 2).astype(np.float32)
  return features, labels, bank, logits


def raw_confidence(name, case, **fields):
  config = change(confidence=name, normalize_confidence=False, **fields)
  features, labels, bank, logits = case
  return np.asarray(
    hallucination.confidence(
      jnp.asarray(features), jnp.asarray(labels), bank, jnp.asarray(logits), config
    )
  )


def softmax(logits):
  p = np.exp(logits.astype(float))
  return p / p.sum(axis=1, keepdims=True)


def expected_confidence(name, case):
  features, labels, bank, logits = case
  p = softmax(logits)
  entropy = -(p * np.log(p)).sum(axis=1)
  if name == "cosine":
    prototypes = np.asarray(bank.prototype, float)
    centre = prototypes[:CLASSES].mean(axis=0)  # the empty row is no class
    a, b = features - centre, prototypes[labels] - centre
    cosine = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return np.maximum(cosine, 0)
  return {
    "certainty": 1 - entropy / np.log(CLASSES),
    "entropy_literal": entropy,
    "probability": p[np.arange(len(labels)), labels],
  }[name]


@pytest.mark.parametrize("name", ["cosine", "certainty", "entropy_literal", "probability"])
@pytest.mark.parametrize("power", [1.0, 2.5])
def test_confidences_equal_their_formulas(name, power):
  case = make_case()
  expected = expected_confidence(name, case) ** power
  result = raw_confidence(name, case, confidence_power=power)
  np.testing.assert_allclose(result, expected, rtol=2e-4, atol=1e-5)
  assert expected.std() > 0.05


def test_every_named_confidence_is_tested():
  assert set(hallucination.CONFIDENCES) == {
    "cosine", "certainty", "entropy_literal", "probability"
  }  # fmt: skip


def test_literal_entropy_rewards_uncertainty_and_certainty_the_opposite():
  features, labels, bank, _ = make_case(num=3)
  logits = np.array([[9.0, 0, 0], [1.0, 0, 0], [0, 0, 0]], np.float32)  # less and less sure
  literal = raw_confidence("entropy_literal", (features, labels, bank, logits))
  certain = raw_confidence("certainty", (features, labels, bank, logits))
  assert (np.diff(literal) > 0).all() and (np.diff(certain) < 0).all()
  assert literal[2] == pytest.approx(np.log(3)) and certain[0] > 0.99
  assert abs(certain[2]) < 1e-6


def test_a_classifier_without_a_clue_gives_no_negative_certainty():
  """A power of a negative rounding error would be NaN."""
  features, labels, bank, _ = make_case(num=1)
  for num_classes in (2, 3, 10, 12, 16, 20, 100):
    case = features, labels, bank, np.zeros((1, num_classes), np.float32)
    result = raw_confidence("certainty", case, confidence_power=0.5)
    assert np.isfinite(result).all(), num_classes
    assert (result >= 0).all() and (result < 1e-2).all()


@pytest.mark.parametrize("name", ["cosine", "certainty", "entropy_literal", "probability"])
def test_normalised_confidence_has_mean_one_in_each_class(name):
  features, labels, bank, logits = make_case(3)
  raw = raw_confidence(name, (features, labels, bank, logits))
  values = np.asarray(
    hallucination.confidence(
      jnp.asarray(features), jnp.asarray(labels), bank, jnp.asarray(logits),
      change(confidence=name),
    )
  )  # fmt: skip
  for label in range(CLASSES):
    own = labels == label
    assert values[own].mean() == pytest.approx(1, rel=1e-4)
    np.testing.assert_allclose(values[own], raw[own] / raw[own].mean(), rtol=1e-4)


def test_confidence_is_a_constant_for_the_gradient():
  features, labels, bank, logits = make_case()

  def total(features, logits):
    return sum(
      hallucination.confidence(
        features, jnp.asarray(labels), bank, logits, change(confidence=name)
      ).sum()
      for name in hallucination.CONFIDENCES
    )

  gradients = jax.grad(total, argnums=(0, 1))(jnp.asarray(features), jnp.asarray(logits))
  assert not any(np.asarray(g).any() for g in gradients)


# --- the synthetic set -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(mesh):
  """A whole call on post-ReLU features with an untrained, randomised denoiser."""
  rng = np.random.default_rng(1)
  raw = np.maximum(rng.normal(size=(len(LABELS), DIM)) + LABELS[:, None] * 0.3, 0)
  raw = jnp.asarray(raw, jnp.float32)
  standardizer = fit_standardizer(raw)
  update = jax.jit(
    lambda f: memory_bank.update(
      memory_bank.create(CLASSES, SLOTS, DIM), f, jnp.asarray(LABELS), jnp.ones(len(LABELS), bool),
      jax.random.key(0), horizon=1000, mesh=mesh,
    )
  )  # fmt: skip
  train = standardizer.forward(raw)
  bank = update(train)
  model = MLPDenoiser(CLASSES, DIM, DenoiserConfig(16, 1, 8, 2))

  @jax.jit
  def make_params(bank):
    memory = memory_bank.read(bank, jnp.zeros(1, int), mesh=mesh)
    x, t, label = jnp.zeros((1, DIM)), jnp.zeros(1), jnp.zeros(1, int)
    leaves, treedef = jax.tree.flatten(model.init(jax.random.key(0), x, t, label, memory)["params"])
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(
      treedef, [x + 0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )

  params = make_params(bank)
  head = {
    "kernel": jax.random.normal(jax.random.key(8), (DIM, CLASSES)), "bias": jnp.zeros(CLASSES)
  }  # fmt: skip
  schedule = NoiseSchedule(ScheduleConfig("cosine", 20))
  numbers = hallucination.plan(COUNTS, CONFIG)
  before = jax.tree.map(lambda x: np.array(x), bank)

  @jax.jit
  def run(bank, key):
    return hallucination.hallucinate(
      model, params, schedule, bank, standardizer, head, train, jnp.asarray(LABELS), numbers, key,
      CONFIG, "eps", mesh,
    )  # fmt: skip

  synthetic = run(bank, jax.random.key(3))
  return {
    "synthetic": synthetic, "train": np.asarray(train), "standardizer": standardizer,
    "bank": bank, "before": before, "head": head, "run": run,
  }  # fmt: skip


def test_labels_and_numbers_follow_the_plan(made):
  synthetic = made["synthetic"]
  np.testing.assert_array_equal(synthetic.labels, [1] * 4 + [2] * 8)
  np.testing.assert_array_equal(synthetic.number, [*range(4), *range(8)])
  assert synthetic.features.shape == (12, DIM)
  assert all(np.isfinite(value).all() for value in vars(synthetic).values())


def test_features_of_a_relu_encoder_are_clamped_at_zero(made):
  features = np.asarray(made["synthetic"].features)
  assert (features >= 0).all() and (features == 0).any() and (features > 0).any()


def test_samples_differ_from_each_other_and_repeat_with_their_key(made):
  features = np.asarray(made["synthetic"].features)
  assert len(np.unique(features, axis=0)) == len(features)  # across chunks too
  again = made["run"](made["bank"], jax.random.key(3))
  other = made["run"](made["bank"], jax.random.key(4))
  np.testing.assert_array_equal(again.features, features)
  assert not np.allclose(other.features, features)


def test_provenance_names_the_nearest_training_feature_of_the_class(made):
  synthetic, train = made["synthetic"], made["train"]
  rows = np.asarray(made["standardizer"].forward(synthetic.features))
  for i, (row, label) in enumerate(zip(rows, np.asarray(synthetic.labels), strict=True)):
    distance = {j: np.linalg.norm(train[j] - row) for j in np.flatnonzero(label == LABELS)}
    nearest = min(distance, key=distance.get)
    assert synthetic.nearest_index[i] == nearest
    assert float(synthetic.nearest_distance[i]) == pytest.approx(distance[nearest], rel=1e-4)


def test_nearest_of_class_skips_nearer_features_of_other_classes():
  references = jnp.array([[0.0], [1.0], [5.0], [9.0]])
  index, distance = hallucination.nearest_of_class(
    jnp.array([[1.1], [8.0]]), jnp.array([0, 1]), references, jnp.array([0, 1, 1, 0])
  )
  assert index.tolist() == [0, 2]
  np.testing.assert_allclose(distance, [1.1, 3.0], rtol=1e-6)


def test_provenance_counts_the_exemplars_of_the_memory(made):
  expected = np.minimum(COUNTS, SLOTS)[np.asarray(made["synthetic"].labels)]
  np.testing.assert_array_equal(made["synthetic"].num_exemplars, expected)
  assert set(expected) == {4, 2}


def test_confidence_is_that_of_what_the_head_trains_on(made):
  synthetic = made["synthetic"]
  rows = made["standardizer"].forward(synthetic.features)
  expected = hallucination.confidence(
    rows, synthetic.labels, made["bank"], jnp.zeros((12, CLASSES)), CONFIG
  )
  np.testing.assert_allclose(synthetic.confidence, expected, rtol=1e-4, atol=1e-6)


def test_synthetic_features_never_enter_the_bank(made):
  jax.tree.map(np.testing.assert_array_equal, made["bank"], made["before"])
  assert isinstance(made["synthetic"], SyntheticFeatures)
  assert "bank" not in {field.name for field in dataclasses.fields(SyntheticFeatures)}
  stored = np.asarray(made["bank"].slots).reshape(-1, DIM)
  rows = np.asarray(made["standardizer"].forward(made["synthetic"].features))
  assert not (np.abs(stored[:, None] - rows[None]).max(axis=-1) < 1e-4).any()
