"""Cross-entropy with class weights, and the rules that give the weights.

The cost-sensitive loss (CSL) of a row with label y is gamma_y CE; synthetic rows are trusted as
far as their confidence, gamma_y conf CE.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax


def effective_number(counts, beta: float):
  """Class-balanced weights (1 - beta) / (1 - beta^n), normalised to mean 1.

  Cui et al., "Class-balanced loss based on effective number of samples", 2019, eq. 4.

  Args:
    counts: [..., C] positive, how many examples (or how much weight) each class has.
    beta: in [0, 1); 0 weighs all classes alike, towards 1 the weights become 1/n.

  Returns:
    [..., C] float32.
  """
  weights = (1 - beta) / -jnp.expm1(counts * np.log(beta)) if beta > 0 else jnp.ones_like(counts)
  weights = jnp.asarray(weights, jnp.float32)
  return weights / weights.mean(axis=-1, keepdims=True)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """-log softmax(logits)[label]. [B, C] and [B] int -> [B]."""
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def weighted_cross_entropy(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
  """Mean over the rows of weight times cross-entropy; `weights` is [B]. Returns a scalar."""
  return jnp.mean(weights * cross_entropy(logits, labels))


def deferred(weights: jax.Array, step: jax.Array, start: int) -> jax.Array:
  """Deferred re-weighting (DRW, Cao et al. 2019): ones before step `start`, `weights` after."""
  return jnp.where(step < start, jnp.ones_like(weights), weights)


@dataclasses.dataclass(frozen=True)
class Loss:
  """A loss of the encoder: whether gamma weighs the classes, and what it is in words."""

  uses_gamma: bool
  description: str


LOSSES = {
  "cross_entropy": Loss(False, "plain cross-entropy"),
  "csl": Loss(True, "the cost-sensitive loss, deferred"),
}
