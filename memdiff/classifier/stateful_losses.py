"""Parts of losses that remember earlier steps: semantic scale, and the published readings of CSL.

"Long tail classification through cost sensitive loss functions" (submission to ICLR 2025) adds a
term to the cross-entropy. Its text and its code differ, and neither weighs the tail up: a class
that is well represented gets the larger gamma, and the only gradient is through the denominator,
which drives logits away from one-hot vectors. Both are here for comparison, as is the term of a
later rewrite (`focal_tail`); what they keep is bounded, where the code keeps every batch.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_EPSILON = 1e-6
SEMANTIC_RANGE = (0.1, 10.0)  # of the weights before they are normalised, median 1


def per_class_sums(values: jax.Array, labels: jax.Array, num_classes: int) -> jax.Array:
  """Sums of values [B] by class. [C]."""
  return jax.ops.segment_sum(values, labels, num_classes)


def predictive_entropy(logits: jax.Array) -> jax.Array:
  """Entropy of softmax(logits) over log C: 0 certain, 1 uniform. [B, C] -> [B]."""
  log_p = jax.nn.log_softmax(logits)
  return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1) / np.log(logits.shape[-1])


def tail_classes(counts: jax.Array, share: float) -> jax.Array:
  """[C] bool: the `share` of the classes with the fewest examples, ties by class index."""
  rank = jnp.argsort(jnp.argsort(-jnp.asarray(counts), stable=True))
  return rank >= len(counts) - round(share * len(counts))


# --- semantic scale --------------------------------------------------------------------------


def init_semantic_scale(num_classes: int) -> dict[str, jax.Array]:
  zeros = jnp.zeros((num_classes,))
  return {"gamma": jnp.ones((num_classes,)), "entropy": zeros, "examples": zeros}


def bank_semantic_scale(slots: jax.Array, seen: jax.Array) -> jax.Array:
  """S_c = (mean length of the class's stored features)^2, 0 for an empty class.

  After Ma et al., "Delving into semantic scale imbalance", 2023, as CSL restates it.

  Args:
    slots: [C, K, D] stored features.
    seen: [C] features offered so far; the first min(seen, K) slots are filled.

  Returns:
    [C].
  """
  filled = jnp.arange(slots.shape[1])[None] < seen[:, None]
  lengths = jnp.where(filled, jnp.linalg.norm(slots, axis=-1), 0.0)
  return jnp.square(lengths.sum(axis=1) / jnp.maximum(filled.sum(axis=1), 1))


def semantic_weights(scale: jax.Array, entropy: jax.Array) -> jax.Array:
  """gamma_c = H_c S_max / (S_c + eps), in SEMANTIC_RANGE times its median, then of mean 1.

  Uncertain classes of small scale weigh more: the sign that a weight needs, and the opposite of
  the published additive term's.

  Args:
    scale: [C] S_c.
    entropy: [C] H_c in [0, 1], mean predictive entropy of the class's examples.
  """
  raw = entropy * scale.max() / (scale + _EPSILON * scale.max() + 1e-30)
  low, high = SEMANTIC_RANGE
  clipped = jnp.clip(raw / jnp.maximum(jnp.median(raw), 1e-30), low, high)
  return clipped / clipped.mean()


def semantic_scale(state, logits, labels, step, bank, steps_per_epoch: int):
  """gamma [C] and the next state; anew at the end of each epoch, ones before the first end.

  H_c is the mean over the class's examples of the epoch, S_c that of the bank's features.
  """
  num_classes = logits.shape[-1]
  entropy = predictive_entropy(jax.lax.stop_gradient(logits))
  sums = state["entropy"] + per_class_sums(entropy, labels, num_classes)
  number = state["examples"] + per_class_sums(jnp.ones_like(entropy), labels, num_classes)
  scale = bank_semantic_scale(bank.slots[:num_classes], bank.seen[:num_classes])
  mean = jnp.where(number > 0, sums / jnp.maximum(number, 1), 1.0)
  ends = (step + 1) % steps_per_epoch == 0
  gamma = jnp.where(ends, semantic_weights(scale, mean), state["gamma"])
  kept = jnp.where(ends, 0.0, 1.0)
  after = {"gamma": gamma, "entropy": kept * sums, "examples": kept * number}
  return state["gamma"], jax.lax.stop_gradient(after)


# --- the additive terms ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Term:
  """init(C) -> state; value(state, logits, features, labels, step, tail, steps_per_epoch)."""

  init: Callable[[int], dict[str, Any]]
  value: Callable[..., tuple[jax.Array, dict[str, Any]]]


def _init_csl(num_classes: int) -> dict[str, jax.Array]:
  zeros = jnp.zeros((num_classes,))
  return {
    "lengths": zeros,  # sums over all examples so far
    "entropy": zeros,
    "examples": zeros,
    "predicted": zeros,  # of the last batch
    "started": jnp.zeros((), bool),
  }


def _additive(gamma, logits, predicted, state, tail) -> jax.Array:
  """1/C sum_i (gamma_i N_i + r_i)^2 / (sum_k |z_k - e_i|^2 + eps).

  N_i counts the batch's predictions of class i. r_i is -2 where they have become more since the
  last batch and 2 where fewer, for tail classes; the paper leaves it undefined.
  """
  change = jnp.sign(predicted - state["predicted"])
  reinforcement = jnp.where(state["started"] & jnp.asarray(tail), -2.0 * change, 0.0)
  # sum_k |z_k - e_i|^2 = sum_k (|z_k|^2 - 2 z_ki + 1)
  batch = logits.shape[0]
  distance = jnp.square(logits).sum() - 2 * logits.sum(axis=0) + batch
  numerator = jax.lax.stop_gradient(jnp.square(gamma * predicted + reinforcement))
  return jnp.mean(numerator / (distance + _EPSILON))


def _advanced(state, lengths, entropy, labels, predicted):
  num_classes = state["lengths"].shape[0]
  after = {
    "lengths": state["lengths"] + per_class_sums(lengths, labels, num_classes),
    "entropy": state["entropy"] + per_class_sums(entropy, labels, num_classes),
    "examples": state["examples"] + per_class_sums(jnp.ones_like(lengths), labels, num_classes),
    "predicted": predicted,
    "started": jnp.ones((), bool),
  }
  return jax.lax.stop_gradient(after)


def _predicted(logits: jax.Array) -> jax.Array:
  """[C] how often each class is predicted in the batch."""
  winners = logits.argmax(axis=-1)
  return per_class_sums(jnp.ones((logits.shape[0],)), winners, logits.shape[-1])


def csl_code_gamma(scale: jax.Array, predicted: jax.Array, batch: int) -> jax.Array:
  """gamma_i = S_i / (eps + S_max H_i), H_i = -(n_i / B) log(1 / B): what the code computes.

  Each predicted example contributes the probability 1/B, so that gamma_i n_i = (S_i / S_max) B /
  log B whatever n_i is: entropy and predictions cancel.
  """
  entropy = -(predicted / batch) * np.log(1 / batch + _EPSILON)
  return scale / (_EPSILON + (scale.max() + _EPSILON) * entropy)


def _csl_code(state, logits, features, labels, step, tail, steps_per_epoch):
  """The published code's term: S_i of logits, over all examples so far."""
  del features, step, steps_per_epoch
  fixed = jax.lax.stop_gradient(logits)
  predicted = _predicted(fixed)
  after = _advanced(
    state, jnp.linalg.norm(fixed, axis=-1), predictive_entropy(fixed), labels, predicted
  )
  scale = jnp.square(after["lengths"] / jnp.maximum(after["examples"], 1))
  gamma = csl_code_gamma(scale, predicted, logits.shape[0])
  return _additive(gamma, logits, predicted, state, tail), after


def csl_paper_gamma(scale: jax.Array, entropy: jax.Array) -> jax.Array:
  """gamma_i = S_i / ((1 + eps) H_i S_max), the formula of the paper's text; H_i at least 1e-3."""
  return scale / ((1 + _EPSILON) * jnp.maximum(entropy, 1e-3) * jnp.maximum(scale.max(), 1e-30))


def _csl_paper(state, logits, features, labels, step, tail, steps_per_epoch):
  """The text's term: S_i of features, H_i the mean predictive entropy of the class's examples."""
  del step, steps_per_epoch
  fixed = jax.lax.stop_gradient(logits)
  lengths = jnp.linalg.norm(jax.lax.stop_gradient(features), axis=-1)
  predicted = _predicted(fixed)
  after = _advanced(state, lengths, predictive_entropy(fixed), labels, predicted)
  number = jnp.maximum(after["examples"], 1)
  gamma = csl_paper_gamma(jnp.square(after["lengths"] / number), after["entropy"] / number)
  return _additive(gamma, logits, predicted, state, tail), after


def _init_focal_tail(num_classes: int) -> dict[str, jax.Array]:
  zeros = jnp.zeros((num_classes,))
  return {"predicted": zeros, "last_epoch": zeros, "epochs": jnp.zeros((), jnp.int32)}


def _focal_tail(state, logits, features, labels, step, tail, steps_per_epoch):
  """0.1 mean[(1 - p_y) s_y (-log p_y)], the factor (1 - p_y) without gradient.

  s_y is 1, or for a tail class 3, 4 where fewer examples of this epoch than of the whole last one
  were predicted as y, 2 where more. The comparison of a part with a whole is the original's.
  """
  del features
  begins = step % steps_per_epoch == 0
  is_later = step > 0
  last = jnp.where(begins & is_later, state["predicted"], state["last_epoch"])
  epochs = state["epochs"] + (begins & is_later)
  running = jnp.where(begins, 0.0, 1.0) * state["predicted"] + _predicted(logits)
  boosted = jnp.where(running < last, 4.0, jnp.where(running > last, 2.0, 3.0))
  boosted = jnp.where((epochs > 0) & (last > 0), boosted, 3.0)
  strength = jnp.where(jnp.asarray(tail), boosted, 1.0)[labels]
  p = jnp.take_along_axis(jax.nn.softmax(logits), labels[:, None], axis=1)[:, 0]
  penalty = -jnp.log(p + 1e-7) * jax.lax.stop_gradient(1 - p) * strength
  after = {"predicted": running, "last_epoch": last, "epochs": epochs}
  return 0.1 * penalty.mean(), jax.lax.stop_gradient(after)


TERMS = {
  "csl_paper": Term(_init_csl, _csl_paper),
  "csl_code": Term(_init_csl, _csl_code),
  "focal_tail": Term(_init_focal_tail, _focal_tail),
}
