"""The memory bank against a plain reference that is offered one feature after the other."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

from memdiff.memory import memory_bank
from memdiff.memory.memory_bank import Memory
from memdiff.runtime import mesh as mesh_lib

CLASSES, ROWS, SLOTS, DIM, BATCH = 3, 4, 3, 2, 8
MESH = mesh_lib.make_mesh()


@functools.partial(jax.jit, static_argnames="horizon")
def offer(bank, features, labels, valid, key, horizon=1000):
  return memory_bank.update(bank, features, labels, valid, key, horizon=horizon, mesh=MESH)


@jax.jit
def read(bank, labels):
  return memory_bank.read(bank, labels, mesh=MESH)


class Reference:
  """Algorithm R and the running mean, one feature at a time, in double precision."""

  def __init__(self, rows, num_slots, dim, horizon):
    self.horizon = horizon
    self.prototype = np.zeros((rows, dim))
    self.slots = np.zeros((rows, num_slots, dim), np.float32)
    self.seen = np.zeros(rows, int)

  def offer(self, features, labels, valid, key):
    rows, num_slots, _ = self.slots.shape
    enters = [
      bool(ok and 0 <= c < rows and np.isfinite(f).all())
      for f, c, ok in zip(features, labels, valid, strict=True)
    ]
    count, position = self.seen.copy(), np.ones(len(labels), int)
    for i in np.flatnonzero(enters):
      count[labels[i]] += 1
      position[i] = count[labels[i]]
    draws = np.asarray(jax.random.randint(key, (len(labels),), 0, jnp.asarray(position)))
    for i in np.flatnonzero(enters):
      label, m = labels[i], position[i]
      step = max(1 / m, 1 / self.horizon)
      self.prototype[label] += step * (features[i].astype(float) - self.prototype[label])
      slot = m - 1 if m <= num_slots else draws[i]
      if slot < num_slots:
        self.slots[label, slot] = features[i]
      self.seen[label] = m


def check_equal(bank, reference):
  np.testing.assert_array_equal(bank.seen, reference.seen)
  np.testing.assert_array_equal(bank.slots, reference.slots)
  np.testing.assert_allclose(bank.prototype, reference.prototype, rtol=0, atol=3e-6)


def random_features(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@st.composite
def batches(draw):
  """One to four batches with many collisions, invalid rows, bad numbers and bad labels."""
  result = []
  for _ in range(draw(st.integers(1, 4))):
    features = random_features(draw(st.integers(0, 2**31)), BATCH, DIM)
    bad = draw(st.lists(st.sampled_from([0.0, np.nan, np.inf, -np.inf]), max_size=BATCH))
    for row, value in enumerate(bad):
      if value:
        features[row, row % DIM] = value
    few = st.integers(0, 1)  # mostly two classes, so that they outgrow their slots
    anything = st.sampled_from([-(2**31), -7, -1, 2, 3, ROWS, ROWS + 1, 2**31 - 1])
    labels = draw(st.lists(few | few | anything, min_size=BATCH, max_size=BATCH))
    valid = draw(st.lists(st.sampled_from([True, True, True, False]), min_size=BATCH,
                          max_size=BATCH))  # fmt: skip
    result.append((features, np.array(labels, np.int32), np.array(valid)))
  return result


def plain_batches(*label_lists):
  return [
    (random_features(i, BATCH, DIM), np.array(labels, np.int32), np.ones(BATCH, bool))
    for i, labels in enumerate(label_lists)
  ]


@given(batches(), st.sampled_from([1, 2, 5, 1000]), st.integers(0, 2**31))
@example(plain_batches([0] * 8, [0] * 8, [0] * 8), 5, 0)  # the horizon inside the first batch
@example(plain_batches([0] * 4 + [1] * 4, [0] * 8), 5, 1)  # ... and inside the second
@example(plain_batches([0] * 8, [1] * 8, [2] * 8), 1, 2)  # every feature replaces the mean
def test_update_equals_offering_one_by_one(stream, horizon, seed):
  bank = memory_bank.create(CLASSES, SLOTS, DIM)
  reference = Reference(ROWS, SLOTS, DIM, horizon)
  for number, (features, labels, valid) in enumerate(stream):
    key = jax.random.key(seed + number)
    bank = offer(bank, features, labels, valid, key, horizon=horizon)
    reference.offer(features, labels, valid, key)
  check_equal(bank, reference)


def test_prototype_is_the_exact_mean_until_the_horizon():
  features = random_features(0, 5, BATCH, DIM) + 3
  bank = memory_bank.create(CLASSES, SLOTS, DIM)
  for number in range(5):
    bank = offer(
      bank, features[number], jnp.zeros(BATCH, int), jnp.ones(BATCH, bool), jax.random.key(number)
    )
  np.testing.assert_allclose(bank.prototype[0], features.reshape(-1, DIM).mean(0), rtol=1e-6)
  assert bank.seen.tolist() == [40, 0, 0, 0]


def test_long_streams_far_beyond_the_horizon_stay_exact():
  bank, reference = memory_bank.create(CLASSES, SLOTS, DIM), Reference(ROWS, SLOTS, DIM, 5)
  for number in range(60):
    features = random_features(number, BATCH, DIM)
    labels = np.random.default_rng(number).integers(0, 2, BATCH)
    key = jax.random.key(number)
    bank = offer(bank, features, labels, np.ones(BATCH, bool), key, horizon=5)
    reference.offer(features, labels, np.ones(BATCH, bool), key)
  check_equal(bank, reference)


def test_a_batch_without_valid_rows_changes_nothing():
  args = plain_batches([0, 1, 0, 1, 0, 1, 2, 2])[0]
  before = offer(memory_bank.create(CLASSES, SLOTS, DIM), *args, jax.random.key(0))
  none = jnp.zeros(BATCH, bool)
  after = offer(before, jnp.full((BATCH, DIM), 9.0), args[1], none, jax.random.key(1))
  jax.tree.map(np.testing.assert_array_equal, before, after)


def test_classes_that_were_never_offered_stay_empty():
  args = plain_batches([1] * 8)[0]
  bank = offer(memory_bank.create(CLASSES, SLOTS, DIM), *args, jax.random.key(0))
  assert bank.seen.tolist() == [0, 8, 0, 0]
  for row in (0, 2, 3):
    assert not bank.slots[row].any() and not bank.prototype[row].any()


def test_no_gradient_flows_into_the_bank():
  args = plain_batches([0, 1, 0, 1, 0, 1, 2, 2])[0]

  def total(features):
    bank = offer(memory_bank.create(CLASSES, SLOTS, DIM), features, *args[1:], jax.random.key(0))
    return bank.slots.sum() + bank.prototype.sum()

  assert not jax.grad(total)(args[0]).any()


# --- uniformity of the reservoir -------------------------------------------------------------


def stored_numbers(batch_labels, num_slots, num_keys, watched=0):
  """Offers features that carry their number within class `watched`; [num_keys, num_slots]."""
  rank = itertools.count()
  batch_values = [
    [next(rank) if label == watched else -1 for label in labels] for labels in batch_labels
  ]

  def fill(key):
    bank = memory_bank.create(2, num_slots, 1)
    for number, (labels, values) in enumerate(zip(batch_labels, batch_values, strict=True)):
      bank = memory_bank.update(
        bank, jnp.asarray(values, jnp.float32)[:, None], jnp.asarray(labels),
        jnp.ones(len(labels), bool), jax.random.fold_in(key, number), horizon=1000, mesh=MESH,
      )  # fmt: skip
    return bank.slots[watched, :, 0]

  keys = jax.random.split(jax.random.key(7), num_keys)
  return np.asarray(jax.jit(jax.vmap(fill))(keys)).astype(int)


def inclusion_p_value(stored, num_offered):
  """Chi-square of how often each feature is stored, drawn without replacement."""
  trials, num_slots = stored.shape
  observed = np.bincount(stored.ravel(), minlength=num_offered)
  share = num_slots / num_offered
  variance = trials * share * (1 - share) * num_offered / (num_offered - 1)
  statistic = ((observed - trials * share) ** 2 / variance).sum()
  return stats.chi2.sf(statistic, num_offered - 1)


@pytest.mark.parametrize(
  "batch_labels",
  [
    [[0] * 10, [0] * 10],
    [[0, 1, 0, 0, 1], [1, 0, 0, 0, 0], [0] * 5, [0, 0, 0, 1, 0], [0, 0, 0, 1, 1], [1, 1, 1, 1, 0]],
    [[0]] * 16,
  ],
  ids=["all in two batches", "mixed batches", "one by one"],
)
def test_every_offered_feature_is_equally_likely_to_be_stored(batch_labels):
  num_offered = sum(labels.count(0) for labels in batch_labels)
  stored = stored_numbers(batch_labels, num_slots=4, num_keys=6000)
  assert all(len(set(row)) == 4 for row in stored[:200])
  assert inclusion_p_value(stored, num_offered) > 1e-3


@pytest.mark.parametrize("batch_labels", [[[0] * 6], [[0] * 3, [0] * 3], [[0] * 2, [0] * 4]])
def test_every_set_of_features_is_equally_likely_to_be_stored(batch_labels):
  stored = np.sort(stored_numbers(batch_labels, num_slots=2, num_keys=6000), axis=1)
  pairs = list(itertools.combinations(range(6), 2))
  observed = [(stored == pair).all(axis=1).sum() for pair in pairs]
  assert sum(observed) == len(stored)
  assert stats.chisquare(observed).pvalue > 1e-3


def test_the_uniformity_check_catches_a_biased_reservoir():
  rng = np.random.default_rng(0)
  newest_too_often = np.stack([[0, 1, 2, rng.integers(3, 20)] for _ in range(6000)])
  assert inclusion_p_value(newest_too_often, 20) < 1e-6


# --- reading ---------------------------------------------------------------------------------


def filled_bank(seed=0):
  """Classes with 8 (more than the slots), 2, 1 and 0 features."""
  labels = np.array([0, 0, 1, 0, 0, 1, 0, 2, 0, 0, 0, -1, -1, -1, -1, -1], np.int32)
  features = random_features(seed, 16, DIM)
  bank = offer(
    memory_bank.create(CLASSES, SLOTS, DIM), features, labels, labels >= 0, jax.random.key(seed)
  )
  return bank, features, labels


def test_read_equals_dense_indexing():
  bank, _, _ = filled_bank()
  labels = np.array([0, 1, 2, 3, 1, 0])
  memory = read(bank, labels)
  np.testing.assert_array_equal(memory.prototype, np.asarray(bank.prototype)[labels])
  np.testing.assert_array_equal(memory.slots, np.asarray(bank.slots)[labels])
  np.testing.assert_array_equal(memory.count, [8, 2, 1, 0, 2, 8])
  filled = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 0], [1, 1, 1]], bool)
  np.testing.assert_array_equal(memory.mask, filled)


@pytest.mark.parametrize(
  ("num_classes", "rows"),
  [(1, 1), (2, 2), (3, 4), (5, 8), (10, 16), (100, 128), (257, 512), (1000, 1024), (8142, 8192)],
)
def test_rows_are_fixed_by_the_classes_alone(num_classes, rows):
  assert memory_bank.num_rows(num_classes) == rows
  assert memory_bank.create(num_classes, 2, 1).slots.shape == (rows, 2, 1)


@given(st.integers(1, 20_000))
def test_rows_hold_all_classes_and_split_over_powers_of_two(num_classes):
  rows = memory_bank.num_rows(num_classes)
  assert num_classes <= rows < num_classes + 256
  assert all(rows % devices == 0 for devices in (2, 4, 8, 256) if devices < 2 * num_classes)


# --- leave one out ---------------------------------------------------------------------------


def test_leave_one_out_takes_a_feature_out_of_slots_and_prototype():
  bank, features, labels = filled_bank()
  rows = np.flatnonzero(labels >= 0)
  memory = read(bank, labels[rows])
  rest = memory_bank.leave_one_out(memory, features[rows])
  for i, row in enumerate(rows):
    is_self = (np.asarray(memory.slots[i]) == features[row]).all(axis=1)
    np.testing.assert_array_equal(rest.mask[i], np.asarray(memory.mask[i]) & ~is_self)
    others = [j for j in rows if labels[j] == labels[row] and j != row]
    expected = features[others].mean(axis=0) if others else np.zeros(DIM)
    np.testing.assert_allclose(rest.prototype[i], expected, atol=2e-6)
    assert rest.count[i] == len(others)
    np.testing.assert_array_equal(
      rest.slots[i], np.where(np.asarray(rest.mask[i])[:, None], memory.slots[i], 0)
    )
  assert (np.asarray(memory.mask) != np.asarray(rest.mask)).sum() == SLOTS + 2 + 1


def test_the_only_member_of_a_class_leaves_nothing_behind():
  bank, features, labels = filled_bank()
  own = int(np.flatnonzero(labels == 2)[0])
  rest = memory_bank.leave_one_out(read(bank, labels[own : own + 1]), features[own : own + 1])
  assert not np.asarray(rest.mask).any() and not np.asarray(rest.slots).any()
  assert not np.asarray(rest.prototype).any() and rest.count.tolist() == [0]


def test_leave_one_out_hides_every_duplicate_of_the_feature():
  a, b = np.array([1.0, 2.0], np.float32), np.array([-1.0, 0.5], np.float32)
  memory = Memory(
    prototype=jnp.asarray((2 * a + b) / 3)[None], slots=jnp.asarray([a, b, a])[None],
    mask=jnp.ones((1, 3), bool), count=jnp.array([3.0]),
  )  # fmt: skip
  rest = memory_bank.leave_one_out(memory, jnp.asarray(a)[None])
  assert rest.mask.tolist() == [[False, True, False]]
  np.testing.assert_allclose(rest.prototype[0], b, rtol=1e-6)
  assert rest.count.tolist() == [1]


def test_leave_one_out_never_uncovers_empty_slots():
  bank, _, _ = filled_bank()
  memory = read(bank, np.array([3, 1]))
  rest = memory_bank.leave_one_out(memory, jnp.full((2, DIM), 50.0))
  assert not np.asarray(rest.mask & ~memory.mask).any()
  assert rest.count.tolist() == [0, 1] and np.isfinite(rest.prototype).all()


# --- what else is known ----------------------------------------------------------------------


def test_what_else_is_known_of_classes_is_read_kept_and_forgotten():
  bank, features, _ = filled_bank()
  table = np.arange(2.0 * len(bank.seen), dtype=np.float32).reshape(-1, 2) + 1
  labels = np.array([2, 0, 2])
  memory = read(bank.replace(class_embeddings=jnp.asarray(table)), labels)
  np.testing.assert_array_equal(memory.class_embeddings, table[labels])
  rest = memory_bank.leave_one_out(memory, features[:3])
  rest = memory_bank.thin_out(rest, jax.random.key(0))
  np.testing.assert_array_equal(rest.class_embeddings, table[labels])
  dropped = jnp.array([True, False, False])
  for lost in (
    memory_bank.forget(rest, dropped),
    memory_bank.without_class_embeddings(rest, dropped),
  ):
    np.testing.assert_array_equal(lost.class_embeddings, table[labels] * [[0], [1], [1]])
  kept = memory_bank.without_class_embeddings(rest, dropped)
  np.testing.assert_array_equal(kept.prototype, rest.prototype)
  assert memory_bank.forget(read(bank, labels), dropped).class_embeddings is None


# --- thinning out ----------------------------------------------------------------------------


def memory_of(features, num_slots, repeats, seen=None):
  """The same memory in `repeats` rows: `features` stored, `seen` offered."""
  slots = np.zeros((repeats, num_slots, features.shape[1]), np.float32)
  slots[:, : len(features)] = features
  return Memory(
    prototype=jnp.full((repeats, features.shape[1]), 7.0),
    slots=jnp.asarray(slots),
    mask=jnp.asarray(np.tile(np.arange(num_slots) < len(features), (repeats, 1))),
    count=jnp.full((repeats,), float(len(features) if seen is None else seen)),
  )


def log_uniform(n):
  k = np.arange(1, n + 1)
  return np.log((k + 1) / k) / np.log(n + 1)


def test_thin_out_keeps_a_log_uniform_number_of_exemplars():
  features = random_features(3, 7, DIM)
  thin = memory_bank.thin_out(memory_of(features, 8, 8000), jax.random.key(0))
  kept = np.asarray(thin.mask).sum(axis=1)
  observed = np.bincount(kept, minlength=8)
  assert observed[0] == 0
  assert stats.chisquare(observed[1:], 8000 * log_uniform(7)).pvalue > 1e-3
  np.testing.assert_array_equal(thin.count, kept)
  one_left = np.asarray(thin.mask)[kept == 1].sum(axis=0)[:7]
  assert stats.chisquare(one_left).pvalue > 1e-3  # which one stays is uniform too


def test_the_thinned_prototype_is_the_mean_of_the_kept_exemplars():
  features = random_features(4, 7, DIM)
  memory = memory_of(features, 8, 300)
  thin = memory_bank.thin_out(memory, jax.random.key(1))
  for row in range(300):
    mask = np.asarray(thin.mask[row])
    assert not mask[7:].any()
    np.testing.assert_array_equal(thin.slots[row][:7], np.where(mask[:7, None], features, 0))
    whole = mask.sum() == 7
    expected = np.full(DIM, 7.0) if whole else features[mask[:7]].mean(axis=0)
    np.testing.assert_allclose(thin.prototype[row], expected, atol=1e-6)


def test_thin_out_leaves_classes_whole_where_the_number_exceeds_the_slots():
  memory = memory_of(random_features(5, 4, DIM), 4, 8000, seen=40)
  thin = memory_bank.thin_out(memory, jax.random.key(2))
  whole = np.asarray(thin.count) == 40
  probability = log_uniform(40)[3:].sum()
  assert stats.binomtest(int(whole.sum()), 8000, probability).pvalue > 1e-3
  assert np.asarray(thin.mask)[whole].all()
  np.testing.assert_array_equal(np.asarray(thin.prototype)[whole], 7.0)
  assert set(np.asarray(thin.mask)[~whole].sum(axis=1)) == {1, 2, 3}


@given(st.integers(0, 5), st.integers(0, 30), st.integers(0, 2**31))
def test_thin_out_never_keeps_more_than_there_is(stored, more, seed):
  memory = memory_of(random_features(6, stored, DIM), 5, 16, seen=stored + more if stored else 0)
  thin = memory_bank.thin_out(memory, jax.random.key(seed))
  assert not np.asarray(thin.mask & ~memory.mask).any()
  assert (np.asarray(thin.mask).sum(axis=1) >= min(stored, 1)).all()
  assert (np.asarray(thin.count) <= np.asarray(memory.count)).all()


def test_forget_empties_the_dropped_rows_only():
  bank, _, _ = filled_bank()
  memory = read(bank, np.array([0, 1, 0, 2]))
  dropped = np.array([True, False, False, True])
  empty = memory_bank.forget(memory, jnp.asarray(dropped))
  for before, after in zip(jax.tree.leaves(memory), jax.tree.leaves(empty), strict=True):
    np.testing.assert_array_equal(np.asarray(after)[~dropped], np.asarray(before)[~dropped])
    assert not np.asarray(after)[dropped].any()


def test_standardizing_the_bank_commutes_with_filling_it():
  _, features, labels = filled_bank()
  mean, scale = jnp.array([0.3, -2.0]), jnp.array([0.5, 4.0])
  valid, key = labels >= 0, jax.random.key(0)
  empty = memory_bank.create(CLASSES, SLOTS, DIM)
  after = memory_bank.standardize(offer(empty, features, labels, valid, key), mean, scale)
  standardized = (features - np.asarray(mean)) / np.asarray(scale)
  before = offer(empty, standardized, labels, valid, key)
  np.testing.assert_array_equal(after.seen, before.seen)
  one, other = read(after, np.arange(3)), read(before, np.arange(3))
  np.testing.assert_allclose(one.prototype, other.prototype, atol=1e-5)
  mask = np.asarray(one.mask)
  np.testing.assert_allclose(np.asarray(one.slots)[mask], np.asarray(other.slots)[mask], atol=1e-6)
