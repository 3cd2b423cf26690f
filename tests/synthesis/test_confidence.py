"""How far synthetic features are trusted, by NumPy; where they come from, by brute force."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memdiff.memory import exemplars as exemplars_lib
from memdiff.synthesis import confidence as confidence_lib
from memdiff.synthesis.confidence import ConfidenceConfig

DIM = 5
COUNTS = np.array([15, 6, 2, 1])  # an odd number, even ones, and a class of one exemplar
CLASSES = len(COUNTS)
NAMES = sorted(confidence_lib.CONFIDENCES)
JUDGING = [name for name in NAMES if name != "none"]


def config(name="cosine", power=1.0, calibrate=False, normalize=False):
  return ConfidenceConfig(name, power, calibrate, normalize)


def make_case(seed=0, num=40, counts=COUNTS, padding=0):
  """Synthetic rows of all classes, exemplars in a random order, and a head."""
  rng = np.random.default_rng(seed)
  real_labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
  centres = rng.normal(size=(len(counts), DIM))
  real = centres[real_labels] + 0.7 * rng.normal(size=(len(real_labels), DIM)) + 2
  real = np.concatenate([real, np.full((padding, DIM), 1e3)]).astype(np.float32)
  real_labels = np.concatenate([real_labels, np.full(padding, len(counts))])
  filled = np.flatnonzero(counts)
  labels = filled[np.sort(np.arange(num) % len(filled))].astype(np.int32)
  features = (centres[labels] + rng.normal(size=(num, DIM)) + 2).astype(np.float32)
  head = {
    "kernel": 0.3 * rng.normal(size=(DIM, len(counts))),
    "bias": rng.normal(size=len(counts)),
  }
  exemplars = exemplars_lib.make(real, real_labels, len(counts))
  head = {name: value.astype(np.float32) for name, value in head.items()}
  return jax.tree.map(jnp.asarray, (features, labels, exemplars, head))


@functools.cache
def compiled(settings):
  return jax.jit(functools.partial(judge, settings=settings))


def judge(features, labels, exemplars, head, settings):
  known = confidence_lib.class_statistics(exemplars, head, settings)
  return confidence_lib.confidence(features, labels, known, head, settings)


def confidence(case, **fields):
  return np.asarray(compiled(config(**fields))(*case))


# --- the formulas ----------------------------------------------------------------------------


def softmax(logits):
  p = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return p / p.sum(axis=-1, keepdims=True)


def class_mean(case, label, without=None):
  real, real_labels = np.asarray(case[2].features, float), np.asarray(case[2].labels)
  rows = [i for i in np.flatnonzero(real_labels == label) if i != without]
  return real[rows].mean(axis=0)


def judge_by_loop(name, case, feature, label, mean):
  """Of one feature, held against this mean of its class."""
  head = {key: np.asarray(value, float) for key, value in case[3].items()}
  p = softmax(feature @ head["kernel"] + head["bias"])
  entropy = -(p * np.log(p)).sum()
  if name == "cosine":
    filled = [c for c, n in enumerate(np.asarray(case[2].by_class.counts)) if n]
    centre = np.mean([class_mean(case, c) for c in filled], axis=0)
    a, b = feature - centre, mean - centre
    return max(a @ b / np.linalg.norm(a) / np.linalg.norm(b), 0)
  return {
    "certainty": 1 - entropy / np.log(len(p)),
    "entropy_literal": entropy,
    "probability": p[label],
    "none": 1.0,
  }[name]


def expected_confidence(name, case):
  features, labels = np.asarray(case[0], float), np.asarray(case[1])
  return np.array(
    [
      judge_by_loop(name, case, feature, label, class_mean(case, label))
      for feature, label in zip(features, labels, strict=True)
    ]
  )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("power", [1.0, 2.5])
def test_confidences_equal_their_formulas(name, power):
  case = make_case()
  expected = expected_confidence(name, case)
  np.testing.assert_allclose(
    confidence(case, name=name, power=power), expected**power, rtol=2e-4, atol=1e-5
  )
  assert name == "none" or expected.std() > 0.05


def test_every_named_confidence_is_tested_and_some_need_a_head():
  assert set(NAMES) == {"cosine", "certainty", "entropy_literal", "probability", "none"}
  features, labels, exemplars, head = case = make_case()
  other = features, labels, exemplars, {"kernel": 2 * head["kernel"], "bias": -head["bias"]}
  for name in NAMES:
    changed = np.abs(confidence(case, name=name) - confidence(other, name=name)).max() > 1e-3
    assert changed == (name in confidence_lib.NEED_A_HEAD)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("calibrate", [False, True])
def test_padding_and_empty_classes_change_nothing(name, calibrate):
  plain = confidence(make_case(), name=name, calibrate=calibrate, normalize=True)
  padded = confidence(make_case(padding=7), name=name, calibrate=calibrate, normalize=True)
  np.testing.assert_allclose(padded, plain, rtol=1e-4, atol=1e-6)
  case = make_case(counts=np.array([15, 0, 6, 2, 1, 0]))
  result = confidence(case, name=name)
  np.testing.assert_allclose(result, expected_confidence(name, case), rtol=2e-4, atol=1e-5)
  assert np.isfinite(confidence(case, name=name, calibrate=True, normalize=True)).all()


def test_literal_entropy_rewards_uncertainty_and_certainty_the_opposite():
  features, labels, exemplars, _ = make_case(num=3)
  features = jnp.zeros_like(features).at[:, 0].set(jnp.array([9.0, 1.0, 0.0]))  # less and less sure
  head = {"kernel": jnp.zeros((DIM, CLASSES)).at[0, 0].set(1.0), "bias": jnp.zeros(CLASSES)}
  literal = confidence((features, labels, exemplars, head), name="entropy_literal")
  certain = confidence((features, labels, exemplars, head), name="certainty")
  assert (np.diff(literal) > 0).all() and (np.diff(certain) < 0).all()
  assert literal[2] == pytest.approx(np.log(CLASSES)) and certain[0] > 0.99
  assert abs(certain[2]) < 1e-6


@pytest.mark.parametrize("num_classes", [2, 3, 10, 12, 16, 20, 100])
def test_a_classifier_without_a_clue_gives_no_negative_certainty(num_classes):
  """A power of a negative rounding error would be NaN."""
  features, labels, exemplars, head = make_case(num=2, counts=np.ones(num_classes, int))
  case = features, labels, exemplars, jax.tree.map(jnp.zeros_like, head)
  result = confidence(case, name="certainty", power=0.5)
  assert np.isfinite(result).all() and (result >= 0).all() and (result < 1e-2).all()


# --- calibration -----------------------------------------------------------------------------


def typical_confidences(name, case):
  """The lower median of each class's real features, each held against the others."""
  exemplars = case[2]
  real, real_labels = np.asarray(exemplars.features, float), np.asarray(exemplars.labels)
  counts = np.bincount(real_labels, minlength=CLASSES)[:CLASSES]
  medians = np.full(CLASSES, np.nan)
  for label in np.flatnonzero(counts > 1):
    values = sorted(
      judge_by_loop(name, case, real[i], label, class_mean(case, label, without=i))
      for i in np.flatnonzero(real_labels == label)
    )
    medians[label] = values[(len(values) - 1) // 2]
  return np.where(np.isnan(medians), np.nanmedian(medians), medians)


@pytest.mark.parametrize("name", JUDGING)
@pytest.mark.parametrize("seed", [1, 5])
def test_calibration_divides_by_what_is_typical_of_real_features_and_cuts_at_one(name, seed):
  case = make_case(seed)
  typical = typical_confidences(name, case)[np.asarray(case[1])]
  assert (typical > 0).all()
  expected = np.minimum(expected_confidence(name, case) / typical, 1)
  assert 0 < (expected == 1).sum() < len(expected)
  result = confidence(case, name=name, calibrate=True)
  np.testing.assert_allclose(result, expected, rtol=1e-3, atol=1e-5)
  sharp = confidence(case, name=name, calibrate=True, power=3.0)
  np.testing.assert_allclose(sharp, expected**3, rtol=3e-3, atol=1e-5)


def test_a_class_of_one_exemplar_takes_the_common_median():
  """Its own leave-one-out confidence would be against nothing."""
  case = make_case(1)
  typical = typical_confidences("cosine", case)
  assert typical[3] == np.median(typical[:3])  # of three classes, an odd number
  own = np.asarray(case[1]) == 3
  expected = np.minimum(expected_confidence("cosine", case)[own] / typical[3], 1)
  np.testing.assert_allclose(confidence(case, calibrate=True)[own], expected, rtol=1e-3)


def test_without_any_class_of_two_calibration_leaves_confidences_alone():
  case = make_case(2, counts=np.ones(3, int))
  np.testing.assert_allclose(confidence(case, calibrate=True), confidence(case), rtol=1e-5)


def test_real_features_are_held_against_the_others_of_their_class():
  """A class of two far from the middle: each alone would look perfectly typical to itself."""
  case = make_case()
  exemplars = case[2]
  real, real_labels = np.asarray(exemplars.features, float), np.asarray(exemplars.labels)
  values = np.asarray(confidence_lib.real_confidence("cosine", exemplars, case[3]))
  for i in np.flatnonzero(COUNTS[real_labels] > 1):
    mean = class_mean(case, real_labels[i], without=i)
    expected = judge_by_loop("cosine", case, real[i], real_labels[i], mean)
    assert values[i] == pytest.approx(expected, rel=1e-3, abs=1e-5)


# --- what holds for all ----------------------------------------------------------------------


@pytest.mark.parametrize("name", JUDGING)
@pytest.mark.parametrize("calibrate", [False, True])
def test_normalised_confidence_has_mean_one_in_each_class(name, calibrate):
  case = make_case(3)
  raw = confidence(case, name=name, calibrate=calibrate, power=2.0)
  values = confidence(case, name=name, calibrate=calibrate, power=2.0, normalize=True)
  for label in range(CLASSES):
    own = np.asarray(case[1]) == label
    assert values[own].mean() == pytest.approx(1, rel=1e-4)
    np.testing.assert_allclose(values[own], raw[own] / raw[own].mean(), rtol=1e-4)


def test_a_class_whose_features_are_worth_nothing_keeps_them_all_alike():
  features, labels, exemplars, head = make_case()
  # Opposite to their class's mean, seen from the middle, so that no cosine is above 0.
  means = np.asarray(exemplars_lib.class_means(exemplars))
  centre = means.mean(axis=0)
  opposite = 2 * centre - means[2] + 0.01 * np.asarray(features)
  features = jnp.where((labels == 2)[:, None], jnp.asarray(opposite), features)
  case, own = (features, labels, exemplars, head), np.asarray(labels) == 2
  assert not confidence(case)[own].any()
  np.testing.assert_array_equal(confidence(case, normalize=True)[own], 1)
  for label in range(CLASSES):  # others are not touched
    assert confidence(case, normalize=True)[np.asarray(labels) == label].mean() == pytest.approx(1)


@pytest.mark.parametrize("calibrate", [False, True])
def test_a_class_that_the_head_all_but_rules_out_is_judged_like_the_others(calibrate):
  """Its probabilities are below 1e-8, as those of rare classes are, once a power is taken."""
  features, labels, exemplars, head = make_case()
  ruled_out = head | {"bias": head["bias"].at[2].add(-18.0)}
  own = np.asarray(labels) == 2
  raw = expected_confidence("probability", (features, labels, exemplars, ruled_out))[own]
  if calibrate:
    typical = typical_confidences("probability", (features, labels, exemplars, ruled_out))[2]
    raw = np.minimum(raw / typical, 1)
  values = confidence(
    (features, labels, exemplars, ruled_out), name="probability", power=2.0, normalize=True,
    calibrate=calibrate,
  )  # fmt: skip
  np.testing.assert_allclose(values[own], raw**2 / (raw**2).mean(), rtol=1e-3)
  assert values[own].std() > 0.1


@given(
  st.sampled_from(NAMES), st.sampled_from([0.5, 1.0, 3.0]), st.booleans(), st.booleans(),
  st.integers(0, 2**20),
)  # fmt: skip
def test_confidences_are_finite_and_never_negative(name, power, calibrate, normalize, seed):
  case = make_case(seed)
  values = confidence(case, name=name, power=power, calibrate=calibrate, normalize=normalize)
  assert values.shape == (40,) and np.isfinite(values).all() and (values >= 0).all()
  if calibrate and not normalize:
    assert values.max() <= 1


@pytest.mark.parametrize("name", NAMES)
def test_confidence_is_a_constant_for_the_gradient(name):
  features, labels, exemplars, head = make_case()

  def total(features, head, exemplars, normalize):
    moved = config(name, 2.0, calibrate=True, normalize=normalize)
    whole = exemplars_lib.Exemplars(exemplars, case_labels, by_class)
    return (judge(features, labels, whole, head, moved) ** 2).sum()

  case_labels, by_class = exemplars.labels, exemplars.by_class
  for normalize in (False, True):
    gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)), static_argnums=3)(
      features, head, exemplars.features, normalize
    )
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))


# --- provenance ------------------------------------------------------------------------------


def test_nearest_of_class_skips_nearer_features_of_other_classes():
  references = np.array([[0.0], [1.0], [5.0], [9.0]], np.float32)
  index, distance = confidence_lib.nearest_of_class(
    np.array([[1.1], [8.0]], np.float32), np.array([0, 1]), references, np.array([0, 1, 1, 0])
  )
  assert index.tolist() == [0, 2] and index.dtype == np.int32 and distance.dtype == np.float32
  np.testing.assert_allclose(distance, [1.1, 3.0], rtol=1e-6)


@pytest.mark.parametrize("pairs", [1, 40, 2**24])
def test_the_nearest_of_the_class_is_that_of_brute_force(pairs, monkeypatch):
  """However many pairs are in memory at a time, and with padding right where they are."""
  monkeypatch.setattr(confidence_lib, "_PAIRS", pairs)
  features, labels, exemplars, _ = jax.tree.map(np.asarray, make_case(num=300))
  references = np.concatenate([exemplars.features, features[:20]])
  reference_labels = np.concatenate([exemplars.labels, np.full(20, CLASSES)])
  index, distance = confidence_lib.nearest_of_class(features, labels, references, reference_labels)
  rows, others = np.asarray(features, float), np.asarray(exemplars.features, float)
  apart = np.linalg.norm(rows[:, None] - others[None], axis=2)
  apart = np.where(np.asarray(labels)[:, None] == np.asarray(exemplars.labels), apart, np.inf)
  np.testing.assert_array_equal(index, apart.argmin(axis=1))
  np.testing.assert_allclose(distance, apart.min(axis=1), rtol=1e-4)


def test_a_copy_is_at_no_distance_from_its_original():
  """Also where coordinates are large, and squares of them would cancel."""
  _, _, exemplars, _ = jax.tree.map(np.asarray, make_case())
  references = exemplars.features * 100 + 1000
  index, distance = confidence_lib.nearest_of_class(
    references, exemplars.labels, references, exemplars.labels
  )
  np.testing.assert_array_equal(distance, 0)
  np.testing.assert_array_equal(index, np.arange(len(references)))
