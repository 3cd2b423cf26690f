"""Synthetic features beside images: their weight, how they move, and what the loss counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memdiff.classifier import added
from memdiff.classifier.added import AddedRows, Pool
from memdiff.memory import memory_bank
from tests.support import normal

CLASSES, DIM = 3, 4


def rows_of(counts="real", first_step=0, ramp=0.5):
  return AddedRows(batch_size=8, counts=counts, first_step=first_step, ramp=ramp)


@given(st.integers(0, 50), st.integers(1, 200), st.floats(0.05, 1))
def test_the_weight_rises_in_a_straight_line_to_one(first, length, ramp):
  rows, steps = rows_of(first_step=first, ramp=ramp), np.arange(first, first + 200)
  weight = np.asarray(rows.weight(steps, first + length))[:length]
  rise = max(round(ramp * length), 1)
  expected = [min((k + 1) / rise, 1.0) for k in range(length)]
  np.testing.assert_allclose(weight, expected, rtol=1e-5)
  assert rows.weight(first - 1, first + length) == 0


def bank_of(prototype, seen):
  rows = memory_bank.num_rows(CLASSES)
  pad = rows - CLASSES
  return memory_bank.MemoryBank(
    prototype=jnp.pad(jnp.asarray(prototype), ((0, pad), (0, 0))),
    slots=jnp.zeros((rows, 2, DIM)),
    seen=jnp.pad(jnp.asarray(seen), (0, pad)),
  )


def pool_of(prototype, features=None, labels=(0,), confidence=1.0):
  labels = jnp.asarray(labels, jnp.int32)
  features = jnp.zeros((len(labels), DIM)) if features is None else jnp.asarray(features)
  return Pool(features, jnp.broadcast_to(confidence, labels.shape), labels, jnp.asarray(prototype))


def test_drift_is_the_mean_shift_of_classes_over_their_spread():
  before, after = normal(0, CLASSES, DIM), normal(1, CLASSES, DIM)
  inside = np.array([0, 2])  # class 1 was never seen
  shift = np.sqrt(np.square(after - before)[inside].sum(axis=1).mean())
  spread = np.sqrt(np.square(before[inside] - before[inside].mean(axis=0)).sum(axis=1).mean())
  value = added.drift(bank_of(after, [5, 0, 2]), pool_of(before))
  np.testing.assert_allclose(value, shift / spread, rtol=1e-5)
  assert added.drift(bank_of(before, [5, 0, 2]), pool_of(before)) == 0


def test_features_move_with_the_mean_of_their_class_and_stay_above_zero():
  before, after = normal(0, CLASSES, DIM), normal(1, CLASSES, DIM)
  made, labels = np.abs(normal(2, 5, DIM)), np.array([0, 2, 2, 1, 1])
  pool = pool_of(before, made, labels, np.arange(5.0))
  features, drawn, trust = added.draw(jax.random.key(3), pool, bank_of(after, [5, 4, 2]), 200)
  index = np.asarray(trust).astype(int)
  assert set(index) == set(range(5))
  np.testing.assert_array_equal(drawn, labels[index])
  expected = np.maximum(made + (after - before)[labels], 0)[index]
  np.testing.assert_allclose(features, expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["real", "effective"])
def test_the_loss_counts_synthetic_features_as_far_as_they_are_trusted(kind):
  pool = pool_of(np.zeros((CLASSES, DIM)), labels=[1, 1, 2], confidence=np.array([0.5, 1.0, 0.25]))
  counts = rows_of(kind).class_counts(jnp.array([50.0, 9.0, 2.0]), pool, jnp.float32(0.5))
  expected = [50.0, 9.75, 2.125] if kind == "effective" else [50.0, 9.0, 2.0]
  np.testing.assert_allclose(counts, expected)
