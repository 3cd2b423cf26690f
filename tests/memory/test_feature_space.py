"""The feature space: units there and back, runs that padding does not touch, the refilled bank."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memdiff.memory import feature_space, memory_bank
from memdiff.memory.feature_space import Standardizer, fit_standardizer, linear_logits
from memdiff.memory.memory_bank import BankConfig
from memdiff.runtime.random import base_keys

CLASSES, DIM = 3, 5
BANK = BankConfig(num_slots=4, horizon=10_000)


def make_features(num, seed=0):
  """Dimension 0 ends in a ReLU, 1 is constant, 2 has negative values, the others none."""
  rng = np.random.default_rng(seed)
  features = 3 * rng.normal(size=(num, DIM)) + 1
  features[:, 0] = np.maximum(features[:, 0], 0)
  features[:, 1] = 0.7
  features[:, 3:] = np.abs(features[:, 3:]) + 2
  return features.astype(np.float32)


def make_head(seed=0):
  rng = np.random.default_rng(seed)
  kernel, bias = rng.normal(size=(DIM, CLASSES)), rng.normal(size=CLASSES)
  return {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}


# --- units -----------------------------------------------------------------------------------


def test_the_standardizer_gives_mean_zero_and_deviation_one_and_goes_back():
  features = make_features(200)
  standardizer = fit_standardizer(jnp.asarray(features), jnp.ones(200, bool))
  scaled = np.asarray(standardizer.forward(features))
  np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-5)
  np.testing.assert_allclose(scaled.std(axis=0), [1, 0, 1, 1, 1], atol=1e-5)
  np.testing.assert_allclose(standardizer.backward(jnp.asarray(scaled)), features, atol=1e-5)


@given(st.lists(st.booleans(), min_size=12, max_size=12).filter(any), st.integers(0, 2**20))
def test_only_valid_rows_are_fitted(valid, seed):
  features, valid = make_features(12, seed), np.array(valid)
  hidden = np.where(valid[:, None], features, -1e6).astype(np.float32)
  fitted = fit_standardizer(jnp.asarray(hidden), jnp.asarray(valid))
  inside = features[valid].astype(float)
  deviation = inside.std(axis=0)
  np.testing.assert_allclose(fitted.mean, inside.mean(axis=0), rtol=1e-5, atol=1e-5)
  expected = np.where(deviation < 1e-5, 1, deviation)
  np.testing.assert_allclose(fitted.scale, expected, rtol=1e-4)
  lowest = np.where((inside < 0).any(axis=0), -np.inf, 0)
  np.testing.assert_array_equal(fitted.lowest, lowest)


def test_only_dimensions_without_negative_training_features_are_cut_at_zero():
  standardizer = fit_standardizer(jnp.asarray(make_features(50)), jnp.ones(50, bool))
  np.testing.assert_array_equal(standardizer.lowest, [0, 0, -np.inf, 0, 0])
  far_below, far_above = jnp.full((1, DIM), -50.0), jnp.full((1, DIM), 50.0)
  low = np.asarray(standardizer.backward(far_below))[0]
  np.testing.assert_array_equal(np.delete(low, 2), 0)
  expected = standardizer.mean - 50 * standardizer.scale
  assert low[2] == pytest.approx(float(expected[2]), rel=1e-6) and low[2] < 0
  high = np.asarray(standardizer.backward(far_above))[0]
  np.testing.assert_allclose(high, standardizer.mean + 50 * standardizer.scale, rtol=1e-6)


def test_units_do_not_matter_for_what_counts_as_constant():
  features = make_features(60)
  for unit in (1e-6, 1.0, 1e6):
    fitted = fit_standardizer(jnp.asarray(features * np.float32(unit)), jnp.ones(60, bool))
    expected = np.where(np.arange(DIM) == 1, 1, features.std(axis=0) * unit)
    np.testing.assert_allclose(fitted.scale, expected, rtol=1e-4)


def deviating(seed, rows=50, dim=4):
  """Columns of mean 0 and deviation 1, float64."""
  x = np.random.default_rng(seed).normal(size=(rows, dim))
  return (x - x.mean(axis=0)) / x.std(axis=0)


def fit(features):
  return fit_standardizer(features, np.ones(len(features), bool))


UNITS = st.floats(-25, 25).map(lambda exponent: 10.0**exponent)


@given(st.integers(0, 2**20), st.lists(UNITS, min_size=4, max_size=4), st.floats(-1e3, 1e3))
def test_units_and_offsets_of_a_column_change_nothing_in_any(seed, units, offset):
  """Each column has a unit of its own, and an offset of so many deviations."""
  plain = deviating(seed)
  features = (np.array(units) * (plain + offset)).astype(np.float32)
  standardizer = fit(features)
  scaled = np.asarray(standardizer.forward(jnp.asarray(features)))
  # float32 features of an offset of 1000 deviations are rounded to 6e-5 of them
  np.testing.assert_allclose(scaled, plain, atol=2e-7 * (abs(offset) + 10))
  back = np.asarray(standardizer.backward(jnp.asarray(scaled)))
  np.testing.assert_allclose(back, features, rtol=1e-5, atol=0) if abs(offset) > 10 else (
    np.testing.assert_allclose(back / units, features / units, atol=1e-5)
  )
  lowest = np.where((features < 0).any(axis=0), -np.inf, 0)
  np.testing.assert_array_equal(standardizer.lowest, lowest)


@pytest.mark.parametrize(("offset", "tolerance"), [(1e5, 1e-2), (-1e6, 0.1), (1e7, 0.2)])
def test_deviations_beside_a_large_offset_are_those_of_what_float32_holds(offset, tolerance):
  features = (deviating(0, 400) + offset).astype(np.float32)
  exact = features.astype(float)
  standardizer = fit(features)
  np.testing.assert_allclose(standardizer.scale, exact.std(axis=0), rtol=1e-6)
  np.testing.assert_allclose(standardizer.mean, exact.mean(axis=0), rtol=1e-7)
  np.testing.assert_allclose(standardizer.scale, 1, atol=tolerance)


@given(st.floats(1e-20, 1e20), st.booleans())
def test_rounding_around_one_number_is_no_deviation(size, negative):
  """A column that holds two neighbouring float32 numbers, beside one that hardly varies more."""
  constant = np.float32(-size if negative else size)
  features = np.full((40, 4), constant)
  features[::2, 1] = np.nextafter(constant, np.float32(0))
  features[:, 2] = constant * (1 + 1e-6 * np.arange(40))
  features[:, 3] = np.arange(40)
  standardizer = fit(features)
  np.testing.assert_array_equal(standardizer.scale[:2], 1)
  deviation = features.astype(float).std(axis=0)
  np.testing.assert_allclose(standardizer.scale[2:], deviation[2:], rtol=1e-6)
  np.testing.assert_array_equal(feature_space.constant_columns(features), [0, 1])


def test_columns_of_zeros_and_of_less_than_a_head_can_be_divided_by_are_constant():
  features = np.c_[np.zeros(20), 1e-33 * np.arange(20), 1e-28 * np.arange(20)].astype(np.float32)
  np.testing.assert_array_equal(feature_space.constant_columns(features), [0, 1])
  np.testing.assert_array_equal(fit(features).scale[:2], 1)


@given(st.lists(UNITS, min_size=DIM, max_size=DIM), st.sampled_from([0.0, 1.0, -300.0]))
def test_heads_stay_finite_and_the_same_in_any_units(units, offset):
  head, units = make_head(), np.array(units)
  features = (units * (deviating(1, 60, DIM) + offset)).astype(np.float32)
  standardizer = fit(features)
  raw = feature_space.raw_head(head, standardizer)
  assert all(np.isfinite(leaf).all() for leaf in raw.values())
  scaled = standardizer.forward(jnp.asarray(features))
  expected = np.asarray(linear_logits(head, scaled))
  exact = features.astype(float) @ np.asarray(raw["kernel"], float) + np.asarray(raw["bias"])
  np.testing.assert_allclose(exact, expected, atol=1e-5 * (abs(offset) + 1))
  again = feature_space.standardized_head(raw, standardizer)
  np.testing.assert_allclose(again["kernel"], head["kernel"], rtol=1e-5)
  np.testing.assert_allclose(again["bias"], head["bias"], atol=1e-5 * (abs(offset) + 1))


def test_heads_of_either_units_give_identical_logits():
  features = jnp.asarray(make_features(50))
  standardizer = fit_standardizer(features, jnp.ones(50, bool))
  head = make_head()
  moved = feature_space.standardized_head(head, standardizer)
  np.testing.assert_allclose(
    linear_logits(moved, standardizer.forward(features)), linear_logits(head, features), atol=1e-4
  )
  back = feature_space.raw_head(head, standardizer)
  np.testing.assert_allclose(
    linear_logits(back, features), linear_logits(head, standardizer.forward(features)), atol=1e-4
  )


@given(st.integers(0, 2**20))
def test_a_head_goes_there_and_back(seed):
  rng = np.random.default_rng(seed)
  mean, scale = rng.normal(size=DIM), rng.uniform(0.2, 4, DIM)
  standardizer = Standardizer(
    jnp.asarray(mean, jnp.float32), jnp.asarray(scale, jnp.float32), jnp.zeros(DIM)
  )
  head = make_head(seed)
  there = feature_space.standardized_head(head, standardizer)
  back = feature_space.raw_head(there, standardizer)
  for name in head:
    np.testing.assert_allclose(back[name], head[name], rtol=1e-4, atol=1e-5)
  assert np.abs(there["kernel"] - head["kernel"]).max() > 1e-2


# --- the bank --------------------------------------------------------------------------------


def fill(features, labels, seeds, mesh, config=BANK):
  """Of features [N, D] and labels [N], once per seed."""
  shape = (len(seeds), *features.shape)
  return jax.tree.map(
    np.asarray,
    feature_space.fill_bank(
      np.broadcast_to(features, shape), np.broadcast_to(labels, shape[:2]), CLASSES,
      base_keys(seeds, "memory_bank"), config, mesh,
    ),
  )  # fmt: skip


def test_the_bank_holds_members_and_means_of_classes_and_no_row_of_label_c(mesh):
  """In more rows than go into one update; the bank has a row of number C, which stays empty."""
  features = make_features(700)
  labels = np.random.default_rng(1).choice(CLASSES + 1, size=700, p=[0.6, 0.3, 0.003, 0.097])
  features[labels == CLASSES] = 1e6
  bank = fill(features, labels, (0,), mesh)
  assert memory_bank.num_rows(CLASSES) == CLASSES + 1
  counts = np.bincount(labels, minlength=CLASSES)[:CLASSES]
  assert 0 < counts[2] < BANK.num_slots  # some slots stay empty
  np.testing.assert_array_equal(bank.seen[0], [*counts, 0])
  assert not bank.slots[0, CLASSES].any() and not bank.prototype[0, CLASSES].any()
  for label, count in enumerate(counts):
    own = features[labels == label]
    np.testing.assert_allclose(bank.prototype[0, label], own.mean(axis=0), rtol=1e-4)
    filled = min(count, BANK.num_slots)
    stored = bank.slots[0, label, :filled]
    assert (stored[:, None] == own[None]).all(axis=2).any(axis=1).all()
    assert len(np.unique(stored, axis=0)) == filled
    assert not bank.slots[0, label, filled:].any()


def test_seeds_decide_which_members_are_stored_and_not_the_means(mesh):
  features, labels = make_features(60), np.resize([0, 1, 2, 0, 0], 60)
  bank = fill(features, labels, (5, 6, 5), mesh)
  np.testing.assert_array_equal(bank.slots[0], bank.slots[2])
  assert (bank.slots[0] != bank.slots[1]).any()
  np.testing.assert_allclose(bank.prototype[0], bank.prototype[1], rtol=1e-4, atol=1e-5)


def test_features_come_in_a_random_order(mesh):
  """An average that forgets must not end with the last rows of the file."""
  features = np.repeat(np.arange(200.0)[:, None], DIM, axis=1).astype(np.float32)
  bank = fill(features, np.zeros(200, int), tuple(range(30)), mesh, BankConfig(4, horizon=5))
  assert abs(bank.prototype[:, 0, 0].mean() - 99.5) < 25  # 198 in the order of the file
  assert bank.prototype[:, 0, 0].std() > 5


# --- runs ------------------------------------------------------------------------------------


def make_runs(sizes, width, mesh, head):
  """Runs of so many rows, padded up to `width` with rows that would be noticed."""
  rows, labels = [], []
  for run, size in enumerate(sizes):
    padding = width - size
    rows.append(np.concatenate([make_features(size, run), np.full((padding, DIM), -1e6)]))
    labels.append(np.concatenate([np.arange(size) % CLASSES, np.full(padding, CLASSES)]))
  rows, labels = np.stack(rows).astype(np.float32), np.stack(labels)
  keys = base_keys(tuple(range(len(sizes))), "memory_bank")
  bank = feature_space.fill_bank(rows, labels, CLASSES, keys, BANK, mesh)
  return rows, labels, feature_space.make_runs(rows, labels, bank, head, CLASSES, mesh)


def stacked_heads(number):
  return jax.tree.map(lambda *leaves: np.stack(leaves), *map(make_head, range(number)))


def test_padding_and_other_runs_change_nothing(mesh):
  sizes, head = (20, 13), stacked_heads(2)
  _, _, together = make_runs(sizes, 24, mesh, head)
  for run, size in enumerate(sizes):
    features = make_features(size, run).astype(float)
    deviation = features.std(axis=0)
    scale = np.where(deviation < 1e-5, 1, deviation)
    standardizer = jax.tree.map(lambda leaf, run=run: np.asarray(leaf[run]), together.standardizer)
    np.testing.assert_allclose(standardizer.mean, features.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(standardizer.scale, scale, rtol=1e-4)
    exemplars = jax.tree.map(lambda leaf, run=run: np.asarray(leaf[run]), together.exemplars)
    expected = (features - features.mean(axis=0)) / scale
    np.testing.assert_allclose(exemplars.features[:size], expected, atol=1e-4)
    assert not exemplars.features[size:].any()
    np.testing.assert_array_equal(exemplars.labels[:size], np.arange(size) % CLASSES)
    assert (exemplars.labels[size:] == CLASSES).all()
    counts = np.bincount(np.arange(size) % CLASSES)
    np.testing.assert_array_equal(exemplars.by_class.counts, counts)
    for label, (start, count) in enumerate(zip(exemplars.by_class.starts, counts, strict=True)):
      own = exemplars.by_class.order[start : start + count]
      np.testing.assert_array_equal(np.sort(own), np.arange(label, size, CLASSES))


def test_bank_and_head_of_runs_are_in_the_units_of_their_exemplars(mesh):
  head = stacked_heads(2)
  rows, labels, runs = make_runs((20, 13), 24, mesh, head)
  for run in range(2):
    inside = labels[run] < CLASSES
    exemplars = np.asarray(runs.exemplars.features[run])
    for label in range(CLASSES):
      own = exemplars[labels[run] == label]
      np.testing.assert_allclose(runs.bank.prototype[run, label], own.mean(axis=0), atol=1e-4)
      stored = np.asarray(runs.bank.slots[run, label])
      distance = np.abs(stored[:, None] - own[None]).max(axis=2).min(axis=1)
      np.testing.assert_allclose(distance, 0, atol=1e-4)
    own_head = {name: value[run] for name, value in runs.head.items()}
    expected = rows[run][inside] @ head["kernel"][run] + head["bias"][run]
    result = np.asarray(linear_logits(own_head, jnp.asarray(exemplars)))[inside]
    np.testing.assert_allclose(result, expected, atol=1e-3)


def test_features_without_a_head_get_one_that_says_nothing(mesh):
  _, _, runs = make_runs((9, 7), 9, mesh, None)
  assert runs.head["kernel"].shape == (2, DIM, CLASSES) and runs.head["bias"].shape == (2, CLASSES)
  assert not any(np.asarray(leaf).any() for leaf in runs.head.values())


def test_runs_of_shared_features_are_those_of_copies(mesh):
  """Also where a row belongs to some of the runs only, as in folds."""
  rows, masked = make_features(20), np.arange(20) % CLASSES
  masked[:4] = CLASSES
  for of_runs, alike in (
    ([np.arange(20) % CLASSES] * 2, True),
    ([np.arange(20) % CLASSES, masked], False),
  ):
    labels = np.stack(of_runs)
    banks = [
      feature_space.fill_bank(x, labels, CLASSES, base_keys((3, 4), "memory_bank"), BANK, mesh)
      for x in (rows[None], np.stack([rows] * 2))
    ]
    shared = feature_space.make_runs(rows[None], labels, banks[0], None, CLASSES, mesh)
    copied = feature_space.make_runs(np.stack([rows] * 2), labels, banks[1], None, CLASSES, mesh)
    assert shared.alike == alike and not copied.alike
    for a, b in zip(jax.tree.leaves(shared), jax.tree.leaves(copied), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    assert (shared.standardizer.mean[0] != shared.standardizer.mean[1]).any() == (not alike)


@pytest.mark.parametrize("number", [1, 2], ids=["shared", "own"])
def test_runs_of_rows_are_those_of_the_features_that_the_rows_name(number, mesh):
  """Folds whose rows differ while their labels do not, one of them padded."""
  features = np.stack([make_features(20, run) for run in range(number)])
  rows = np.array([[0, 5, 2, 9, 16], [3, 8, 17, 12, -1]])
  labels = np.array([[0, 1, 2, 0, 1], [0, 1, 2, 0, CLASSES]])
  by_hand = np.stack([features[run % number][rows[run]] for run in range(2)])
  by_hand[1, 4] = 0.0
  keys, head = base_keys((3, 4), "memory_bank"), stacked_heads(2)
  made = []
  for x, taken in ((features, rows), (by_hand, None)):
    bank = feature_space.fill_bank(x, labels, CLASSES, keys, BANK, mesh, taken)
    made.append(feature_space.make_runs(x, labels, bank, head, CLASSES, mesh, taken))
  for a, b in zip(jax.tree.leaves(made[0]), jax.tree.leaves(made[1]), strict=True):
    np.testing.assert_array_equal(a, b)
  placed = feature_space.standardize(made[0].standardizer, features, mesh, rows)
  np.testing.assert_array_equal(placed, made[0].exemplars.features)


def test_runs_of_other_rows_are_not_alike_even_if_their_labels_are(mesh):
  features, rows = make_features(6)[None], np.array([[0, 1, 2], [3, 4, 5]])
  labels = np.array([[0, 1, 2]] * 2)
  keys = base_keys((3, 4), "memory_bank")
  bank = feature_space.fill_bank(features, labels, CLASSES, keys, BANK, mesh, rows)
  runs = feature_space.make_runs(features, labels, bank, None, CLASSES, mesh, rows)
  assert not runs.alike
  assert (runs.standardizer.mean[0] != runs.standardizer.mean[1]).any()


# --- encoding --------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [0, 1, 512, 700])
def test_encoding_goes_in_chunks_of_one_size_and_keeps_the_order(num, mesh):
  images = (np.arange(num * 4) % 251).astype(np.uint8).reshape(num, 2, 2, 1)
  sizes = []

  def encode_chunk(chunk):
    sizes.append(len(chunk))
    flat = chunk.reshape(len(chunk), 4).astype(np.float32)
    return {"features": np.stack([flat, 2 * flat]), "sum": np.stack([flat.sum(axis=1)] * 2)}

  result = feature_space.encode(encode_chunk, images, mesh)
  flat = images.reshape(num, 4).astype(np.float32)
  np.testing.assert_array_equal(result["features"], np.stack([flat, 2 * flat]))
  np.testing.assert_array_equal(result["sum"], np.stack([flat.sum(axis=1)] * 2))
  assert set(sizes) == {512}
