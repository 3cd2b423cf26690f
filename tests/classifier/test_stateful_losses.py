"""Semantic scale and the published readings of CSL against loops that keep every batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdiff.classifier import losses, stateful_losses
from memdiff.classifier.losses import LossConfig

C, B, D = 5, 12, 3
COUNTS = np.array([50, 30, 10, 4, 2])
TAIL = [3, 4]  # 40 % of five classes
CONFIG = LossConfig(0.9999, 1.0, 1.0, 0.5, 1.0, 0.8, 0.4, 0.35, 8, 0.1)
PER_EPOCH = 3


def batches(number=8, seed=0):
  rng = np.random.default_rng(seed)
  for _ in range(number):
    yield rng.normal(size=(B, C)) * 2, rng.normal(size=(B, D)), rng.integers(0, C, B)


def run(name, bank=None):
  """Values of the loss over the batches, and its state after the last."""
  loss = losses.make(name, CONFIG, COUNTS, scale=1.0, num_steps=20, steps_per_epoch=PER_EPOCH)
  state, values = loss.init(), []
  for step, (logits, features, labels) in enumerate(batches()):
    batch = losses.Batch(
      jnp.asarray(logits, jnp.float32), jnp.asarray(features, jnp.float32), jnp.asarray(labels)
    )
    value, state = loss(batch, state, jnp.int32(step), bank)
    values.append(float(value))
  return values, state


def softmax(z):
  e = np.exp(z - z.max(axis=1, keepdims=True))
  return e / e.sum(axis=1, keepdims=True)


def cross_entropy(logits, labels, weights=None):
  rows = -np.log(softmax(logits)[np.arange(len(labels)), labels])
  weights = np.ones(len(labels)) if weights is None else weights[labels]
  return (weights * rows).sum() / weights.sum()


def entropies(logits):
  p = softmax(logits)
  return -(p * np.log(p)).sum(axis=1) / np.log(C)


def additive(gamma, logits, predicted, last):
  """1/C sum_i (gamma_i N_i + r_i)^2 / sum_k |z_k - e_i|^2, term by term."""
  total = 0.0
  for i in range(C):
    r = 0.0
    if i in TAIL and last is not None:
      r = -2.0 if predicted[i] > last[i] else 2.0 if predicted[i] < last[i] else 0.0
    total += (gamma[i] * predicted[i] + r) ** 2 / (np.square(logits - np.eye(C)[i]).sum() + 1e-6)
  return total / C


@pytest.mark.parametrize("name", ["csl_code", "csl_paper"])
def test_the_additive_terms_equal_loops_over_all_stored_batches(name):
  values, _ = run(name)
  vectors = {i: [] for i in range(C)}
  uncertain = {i: [] for i in range(C)}
  last = None
  for value, (logits, features, labels) in zip(values, batches(), strict=True):
    stored = logits if name == "csl_code" else features
    for vector, entropy, label in zip(stored, entropies(logits), labels, strict=True):
      vectors[label].append(np.linalg.norm(vector))
      uncertain[label].append(entropy)
    scale = np.array([np.mean(v) ** 2 if v else 0.0 for v in vectors.values()])
    predicted = np.bincount(logits.argmax(axis=1), minlength=C)
    if name == "csl_code":  # each predicted example has the probability 1/B
      entropy = np.array(
        [sum(-(1 / B) * np.log(1 / B + 1e-6) for _ in range(n)) for n in predicted]
      )
      gamma = scale / (1e-6 + (scale.max() + 1e-6) * entropy)
    else:
      entropy = np.array([np.mean(u) if u else 0.0 for u in uncertain.values()])
      gamma = scale / ((1 + 1e-6) * np.maximum(entropy, 1e-3) * scale.max())
    expected = cross_entropy(logits, labels) + additive(gamma, logits, predicted, last)
    assert value == pytest.approx(expected, rel=1e-4)
    last = predicted


def test_in_the_published_code_entropy_and_predictions_cancel():
  """gamma_i n_i = (S_i / S_max) B / log B, whatever n_i: 26.381 at B = 128 and S_i = S_max."""
  scale = jnp.ones(4)
  predicted = jnp.array([1.0, 4.0, 16.0, 64.0])
  product = stateful_losses.csl_code_gamma(scale, predicted, 128) * predicted
  np.testing.assert_allclose(product, 128 / np.log(128), rtol=2e-3)
  np.testing.assert_allclose(product, 26.381, rtol=2e-3)


def test_the_additive_term_drives_logits_away_from_one_hot_vectors():
  """Its only gradient is through the denominator."""
  logits = jnp.asarray(next(batches())[0], jnp.float32)
  term = stateful_losses.TERMS["csl_code"]
  labels = logits.argmax(axis=1)
  gradient = jax.grad(
    lambda z: term.value(term.init(C), z, None, labels, 0, np.zeros(C, bool), 1)[0]
  )(logits)
  # Along -gradient the squared distance to the one-hot vectors grows.
  assert float((-gradient * logits).sum()) > 0


def test_focal_tail_equals_a_loop_with_its_comparison_of_parts_and_wholes():
  values, _ = run("focal_tail")
  weights = 1 / COUNTS / np.mean(1 / COUNTS)
  running, last = np.zeros(C), None
  seen_strengths = set()
  for step, (value, (logits, _, labels)) in enumerate(zip(values, batches(), strict=True)):
    if step % PER_EPOCH == 0:
      last, running = (running.copy() if step else None), np.zeros(C)
    running += np.bincount(logits.argmax(axis=1), minlength=C)
    p = softmax(logits)[np.arange(B), labels]
    strength = np.ones(B)
    for k, label in enumerate(labels):
      if label in TAIL:
        strength[k] = 3.0
        if last is not None and last[label] > 0:
          strength[k] = {-1: 4.0, 0: 3.0, 1: 2.0}[int(np.sign(running[label] - last[label]))]
      seen_strengths.add(strength[k])
    penalty = 0.1 * np.mean(-np.log(p + 1e-7) * (1 - p) * strength)
    assert value == pytest.approx(cross_entropy(logits, labels, weights) + penalty, rel=1e-4)
  assert {1.0, 3.0, 4.0} <= seen_strengths


# --- semantic scale --------------------------------------------------------------------------


@dataclasses.dataclass
class Bank:
  slots: jax.Array
  seen: jax.Array


def make_bank():
  rng = np.random.default_rng(1)
  slots = rng.normal(size=(8, 4, D)) * np.arange(1, 9)[:, None, None]
  return Bank(jnp.asarray(slots, jnp.float32), jnp.array([9, 4, 2, 1, 0, 0, 0, 0]))


def test_semantic_scale_weighs_by_uncertainty_over_scale_once_per_epoch():
  bank = make_bank()
  values, state = run("semantic_scale", bank)
  slots = np.asarray(bank.slots)
  scale = np.array([
    np.square(np.linalg.norm(slots[c, : min(int(n), 4)], axis=1).mean()) if n else 0
    for c, n in enumerate(np.asarray(bank.seen)[:C])
  ])  # fmt: skip
  gamma, seen = np.ones(C), [[] for _ in range(C)]
  for step, (value, (logits, _, labels)) in enumerate(zip(values, batches(), strict=True)):
    assert value == pytest.approx(cross_entropy(logits, labels, gamma), rel=1e-4), step
    for entropy, label in zip(entropies(logits), labels, strict=True):
      seen[label].append(entropy)
    if (step + 1) % PER_EPOCH == 0:
      mean = np.array([np.mean(s) if s else 1.0 for s in seen])
      raw = mean * scale.max() / (scale + 1e-6 * scale.max())
      clipped = np.clip(raw / np.median(raw), *stateful_losses.SEMANTIC_RANGE)
      gamma, seen = clipped / clipped.mean(), [[] for _ in range(C)]
  np.testing.assert_allclose(state["weights"]["gamma"], gamma, rtol=1e-4)
  assert gamma[4] > gamma[0] > gamma[3]  # nothing stored; a small scale; a large one


def test_weights_of_semantic_scale_have_mean_one_and_a_bounded_range():
  weights = stateful_losses.semantic_weights(jnp.array([1e6, 1.0, 1e-6, 0.0]), jnp.ones(4) * 0.5)
  assert float(weights.mean()) == pytest.approx(1.0)
  low, high = stateful_losses.SEMANTIC_RANGE
  assert float(weights.max() / weights.min()) <= high / low * 1.001
  assert (np.diff(weights) >= 0).all()  # the smaller the scale, the heavier


def test_tail_classes_are_those_with_the_fewest_examples():
  assert stateful_losses.tail_classes(np.array([3, 9, 1, 9, 2]), 0.4).tolist() == [
    *(False, False, True, False, True)
  ]
  assert not stateful_losses.tail_classes(COUNTS, 0.0).any()
  assert stateful_losses.tail_classes(COUNTS, 1.0).all()
