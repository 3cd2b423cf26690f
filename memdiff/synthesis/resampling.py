"""Generators that reuse exemplars: copies, copies with noise, mixtures.

All of them are `(key, exemplars, fitted, labels [M], strength) -> [M, D]`, pure, usable in jit and
vmap.
"""

import jax

from memdiff.memory import exemplars as exemplars_lib
from memdiff.memory.exemplars import Exemplars
from memdiff.synthesis.gaussian import within_noise


def duplicate(key, exemplars: Exemplars, _, labels: jax.Array, strength) -> jax.Array:
  """Random exemplars of the class, with replacement; nothing for `strength` to change. [M, D]."""
  del strength
  return exemplars_lib.draw(key, exemplars, labels)


def kernel_jitter(key, exemplars: Exemplars, factor, labels: jax.Array, strength) -> jax.Array:
  """x + h z, x an exemplar of the class, z ~ N(0, S) with the pooled covariance within classes.

  Draws from a kernel density estimate; h = strength is its bandwidth, in deviations. `factor` is
  that of `gaussian.within_factor`. [M, D].
  """
  pick, spread = jax.random.split(key)
  noise = within_noise(spread, factor, labels.shape[0])
  return exemplars_lib.draw(pick, exemplars, labels) + strength * noise


def feature_mixup(key, exemplars: Exemplars, _, labels: jax.Array, strength) -> jax.Array:
  """(1 - l) x + l x', x an exemplar of the class, x' any exemplar, l ~ U(0, strength).

  The label stays that of x, as in Chou et al., "Remix", 2020, where a tail class is mixed with a
  head class. `strength` in [0, 1] bounds the stranger's share. [M, D].
  """
  pick, other, share = jax.random.split(key, 3)
  x = exemplars_lib.draw(pick, exemplars, labels)
  # Padding comes last in the order of classes.
  place = jax.random.randint(other, labels.shape, 0, exemplars.by_class.counts.sum())
  stranger = exemplars.features[exemplars.by_class.order[place]]
  mixed = strength * jax.random.uniform(share, labels.shape)
  return x + mixed[:, None] * (stranger - x)
