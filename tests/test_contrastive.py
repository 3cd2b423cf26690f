"""Contrastive losses against double loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdiff.contrastive import balanced_contrastive, class_cosines, supervised_contrastive

T = 0.3


def unit(*shape, seed=0):
  x = np.random.default_rng(seed).normal(size=shape)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_supervised_contrastive_is_khoslas_outer_sum():
  z, y = unit(9, 4), np.array([0, 0, 0, 1, 1, 2, 2, 2, 3])  # class 3 has no positive
  anchors = []
  for i in range(9):
    positives = [p for p in range(9) if p != i and y[p] == y[i]]
    below = sum(np.exp(z[i] @ z[a] / T) for a in range(9) if a != i)
    if positives:
      anchors.append(-np.mean([np.log(np.exp(z[i] @ z[p] / T) / below) for p in positives]))
  value = supervised_contrastive(jnp.asarray(z, jnp.float32), jnp.asarray(y), T)
  assert float(value) == pytest.approx(np.mean(anchors), rel=1e-5)
  weights = np.linspace(0.2, 3, 9)  # the last anchor, which has no positive, does not count
  value = supervised_contrastive(jnp.asarray(z, jnp.float32), jnp.asarray(y), T, weights)
  assert float(value) == pytest.approx(np.mean(weights[:8] * anchors), rel=1e-5)


def balanced(z, y, centres):
  """Zhu et al. 2022, eq. 6, with every class's centre among the contrasts."""
  views, batch, _ = z.shape
  flat = np.concatenate([*z, centres])
  labels = np.concatenate([np.tile(y, views), np.arange(len(centres))])
  anchors = []
  for i in range(views * batch):
    below = 0.0
    for j in range(len(centres)):
      own = [k for k in range(len(flat)) if labels[k] == j and k != i]
      below += np.mean([np.exp(flat[i] @ flat[k] / T) for k in own])
    positives = [p for p in range(len(flat)) if labels[p] == labels[i] and p != i]
    anchors.append(np.mean([-np.log(np.exp(flat[i] @ flat[p] / T) / below) for p in positives]))
  return np.mean(anchors)


@pytest.mark.parametrize("views", [1, 2])
def test_balanced_contrastive_averages_over_each_class_in_the_denominator(views):
  z, centres = unit(views, 7, 4), unit(5, 4, seed=1)
  y = np.array([0, 0, 0, 1, 1, 2, 3])  # class 4 is not in the batch
  value = balanced_contrastive(
    jnp.asarray(z, jnp.float32), jnp.asarray(y), jnp.asarray(centres, jnp.float32), T
  )
  assert float(value) == pytest.approx(balanced(z, y, centres), rel=1e-5)


def test_it_pulls_classes_together():
  y = jnp.array([0, 0, 1, 1])
  centres = jnp.eye(2, 4)
  apart = jnp.asarray(unit(2, 4, 4), jnp.float32)
  together = jnp.stack([centres[y]] * 2)
  assert balanced_contrastive(together, y, centres, T) < balanced_contrastive(apart, y, centres, T)
  gradient = jax.grad(lambda z: balanced_contrastive(z, y, centres, 0.01))(apart)
  assert np.isfinite(gradient).all()


def test_cosines_within_and_between_classes_equal_a_loop():
  draw = np.random.default_rng(0)
  labels = np.array([0, 0, 0, 1, 1, 2])  # the last class has no pair
  rows = draw.normal(size=(6, 4))
  unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
  of_class = [[i for i in range(6) if labels[i] == c] for c in range(3)]
  intra = np.mean([
    np.mean([unit[i] @ unit[j] for i in members for j in members if i != j])
    for members in of_class[:2]
  ])  # fmt: skip
  inter = np.mean([
    np.mean([unit[i] @ unit[j] for i in of_class[a] for j in of_class[b]])
    for a in range(3) for b in range(3) if a != b
  ])  # fmt: skip
  found = class_cosines(jnp.asarray(rows, jnp.float32), jnp.asarray(labels), 4)  # one is empty
  np.testing.assert_allclose(
    [found["intra_cosine"], found["inter_cosine"]], [intra, inter], rtol=1e-5
  )
