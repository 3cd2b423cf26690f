"""Batches as pure functions of key and step: whole epochs, and class-balanced ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from input_pipeline import batches


def epochs(num_examples, batch_size, num_epochs, seed=0):
  """The stream of indices of the steps that touch the first epochs."""
  steps = -(-num_examples * num_epochs // batch_size)
  key = jax.random.key(seed)
  pick = jax.vmap(lambda s: batches.epoch_indices(key, s, num_examples, batch_size))
  return np.asarray(jax.jit(pick)(jnp.arange(steps, dtype=jnp.int32)))


@pytest.mark.parametrize(
  ("num_examples", "batch_size"),
  [(1, 1), (2, 1), (5, 5), (7, 3), (16, 8), (17, 16), (30, 7), (23, 22), (40, 9)],
)
def test_every_example_comes_exactly_once_per_epoch(num_examples, batch_size):
  stream = epochs(num_examples, batch_size, 4).ravel()
  for epoch in range(4):
    own = stream[epoch * num_examples : (epoch + 1) * num_examples]
    assert sorted(own) == list(range(num_examples))


@pytest.mark.parametrize(("num_examples", "batch_size"), [(16, 16), (30, 7), (20, 5)])
def test_epochs_are_shuffled_differently(num_examples, batch_size):
  stream = epochs(num_examples, batch_size, 3).ravel()[: 3 * num_examples]
  orders = stream.reshape(3, num_examples)
  assert len({tuple(order) for order in orders}) == 3
  other = epochs(num_examples, batch_size, 3, seed=1).ravel()[:num_examples]
  assert not np.array_equal(orders[0], other)


def test_a_batch_is_a_pure_function_of_key_and_step():
  together = epochs(23, 5, 6)
  key = jax.random.key(0)
  pick = jax.jit(lambda s: batches.epoch_indices(key, s, 23, 5))
  for step in (20, 3, 0):  # in any order
    np.testing.assert_array_equal(pick(step), together[step])


def test_a_shorter_run_fills_its_epochs_with_examples_at_random():
  key, number, size, batch_size = jax.random.key(0), 6, 10, 4
  pick = jax.jit(
    jax.vmap(lambda n, s: batches.padded_epoch_indices(key, s, n, size, batch_size), (None, 0))
  )
  steps = jnp.arange(2500, dtype=jnp.int32)  # 1,000 epochs
  index = np.asarray(pick(jnp.int32(number), steps)).reshape(-1, size)
  times = np.stack([np.bincount(epoch, minlength=number) for epoch in index])
  assert times.shape[1] == number and times.min() == 1
  extra = times.sum(axis=0) - len(index)
  assert stats.chisquare(extra).pvalue > 1e-3
  whole = np.asarray(pick(jnp.int32(size), steps[:5]))
  plain = [batches.epoch_indices(key, step, size, batch_size) for step in steps[:5]]
  np.testing.assert_array_equal(whole, plain)


def test_every_position_of_an_epoch_is_uniform():
  first = jax.jit(jax.vmap(lambda k: batches.epoch_indices(k, 0, 6, 2)))
  index = np.asarray(first(jax.random.split(jax.random.key(0), 3000)))
  for position in range(2):
    assert stats.chisquare(np.bincount(index[:, position], minlength=6)).pvalue > 1e-3


# --- class-balanced --------------------------------------------------------------------------

LABELS = np.array([0] * 30 + [2] * 5 + [1] + [0] * 4 + [3] * 9)


def balanced(steps, batch_size=64):
  by_class = jax.tree.map(jnp.asarray, batches.group_by_class(LABELS, LABELS.max() + 1))
  pick = jax.vmap(lambda s: batches.balanced_indices(jax.random.key(0), s, by_class, batch_size))
  return np.asarray(jax.jit(pick)(jnp.arange(steps)))


def test_examples_are_grouped_by_class():
  by_class = jax.tree.map(jnp.asarray, batches.group_by_class(LABELS, LABELS.max() + 1))
  for label in range(4):
    start, count = by_class.starts[label], by_class.counts[label]
    own = by_class.order[start : start + count]
    np.testing.assert_array_equal(own, np.flatnonzero(label == LABELS))


def test_classes_are_drawn_alike_and_examples_alike_within_them():
  drawn = balanced(100).ravel()
  assert stats.chisquare(np.bincount(LABELS[drawn], minlength=4)).pvalue > 1e-3
  for label in (0, 2, 3):
    own = drawn[LABELS[drawn] == label]
    counts = np.bincount(own, minlength=len(LABELS))[label == LABELS]
    assert stats.chisquare(counts).pvalue > 1e-3


def test_a_balanced_batch_is_a_pure_function_of_its_step():
  together = balanced(5)
  np.testing.assert_array_equal(balanced(3), together[:3])
  assert len({tuple(batch) for batch in together}) == 5
