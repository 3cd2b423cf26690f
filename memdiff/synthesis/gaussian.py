"""Generators that draw each class from a normal distribution fitted to its exemplars.

All of them are `(key, exemplars, fitted, labels [M], strength) -> [M, D]`, pure, usable in jit and
vmap; `fitted` is what they need of the exemplars whatever labels and strength are. No covariance
of a class is ever formed: with r_i the deviations of its n members from their mean
and g_i standard normal, sum_i g_i r_i / sqrt(n - 1) has exactly the unbiased covariance of the
class, whatever its rank, in the memory of one vector.
"""

import jax
import jax.numpy as jnp

from memdiff.memory import exemplars as exemplars_lib
from memdiff.memory.exemplars import Exemplars

NEIGHBOURS = 2  # head classes a tail class borrows from, as published
_RIDGE = 1e-4  # added to a variance of 1


def _scatter_noise(key: jax.Array, exemplars: Exemplars, labels: jax.Array) -> jax.Array:
  """For each label c a draw from N(0, (n_c - 1) S_c), S_c the unbiased covariance. [M, D]."""
  residuals = exemplars_lib.deviations(exemplars)
  counts, starts = exemplars.by_class.counts[labels], exemplars.by_class.starts[labels]

  def add_member(i, total):
    weight = jnp.where(i < counts, jax.random.normal(jax.random.fold_in(key, i), labels.shape), 0.0)
    return total + weight[:, None] * residuals[exemplars.by_class.order[starts + i]]

  nothing = jnp.zeros((labels.shape[0], residuals.shape[1]))
  return jax.lax.fori_loop(0, jnp.max(counts, initial=0), add_member, nothing)


def within_factor(exemplars: Exemplars) -> jax.Array:
  """L with L L' = S, the pooled covariance within classes, which may be singular. [D, D].

  The Cholesky factor of the correlations, with a ridge on their diagonal: noise of a hundredth of
  a column's deviation, and more only if rounding asks for it. A constant column stays constant.
  """
  covariance = exemplars_lib.within_covariance(exemplars)
  deviation = jnp.sqrt(jnp.diagonal(covariance))
  unit = jnp.where(deviation > 0, deviation, 1.0)
  correlation = covariance / unit[:, None] / unit[None]

  def factor(ridge):
    return ridge, jnp.linalg.cholesky(correlation + ridge * jnp.eye(len(unit)))

  def failed(state):
    ridge, lower = state
    return ~jnp.isfinite(lower).all() & (ridge < 1)

  _, lower = jax.lax.while_loop(failed, lambda state: factor(10 * state[0]), factor(_RIDGE))
  return deviation[:, None] * lower


def within_noise(key: jax.Array, factor: jax.Array, num_samples: int) -> jax.Array:
  """Draws from N(0, L L'). [M, D]."""
  return jax.random.normal(key, (num_samples, len(factor))) @ factor.T


def _class_variances(exemplars: Exemplars) -> jax.Array:
  """Unbiased variance per class and dimension; pooled within classes if n < 2. [C, D]."""
  counts = exemplars.by_class.counts
  squares = jnp.square(exemplars_lib.deviations(exemplars))
  num_classes = counts.shape[0]
  variances = jax.ops.segment_sum(squares, exemplars.labels, num_classes + 1)[:num_classes]
  pooled = squares.sum(axis=0) / jnp.maximum(counts.sum() - (counts > 0).sum(), 1)
  variances = variances / jnp.maximum(counts - 1, 1)[:, None]
  return jnp.where((counts > 1)[:, None], variances, pooled[None])


def gaussian_diagonal(key, exemplars: Exemplars, _, labels: jax.Array, strength) -> jax.Array:
  """N(mu_c, diag sigma_c^2) with the class's own variances, pooled ones if it has one exemplar.

  Args:
    key: randomness.
    exemplars: to learn from.
    _: nothing is fitted beforehand.
    labels: [M] int32, classes with exemplars.
    strength: times the deviation from the mean; 1 is the fitted distribution.

  Returns:
    [M, D].
  """
  deviation = jnp.sqrt(_class_variances(exemplars))[labels]
  z = jax.random.normal(key, deviation.shape)
  return exemplars_lib.class_means(exemplars)[labels] + strength * deviation * z


def gaussian_shared(key, exemplars: Exemplars, factor, labels: jax.Array, strength) -> jax.Array:
  """N(mu_c, S) with S the pooled covariance within classes, as in linear discriminant analysis.

  `factor` is that of `within_factor`, here and below. `strength` times the deviation; otherwise as
  `gaussian_diagonal`.
  """
  noise = within_noise(key, factor, labels.shape[0])
  return exemplars_lib.class_means(exemplars)[labels] + strength * noise


def gaussian_shrunk(key, exemplars: Exemplars, factor, labels: jax.Array, strength) -> jax.Array:
  """N(mu_c, ((n_c - 1) S_c + kappa S) / (n_c - 1 + kappa)), kappa = strength > 0.

  The class's covariance shrunk towards the pooled one (Friedman, "Regularized discriminant
  analysis", 1989), weighed by its degrees of freedom: one exemplar knows nothing of S_c and gets S.
  `strength` is worth so many exemplars.
  """
  own_key, shared_key = jax.random.split(key)
  of_class = _scatter_noise(own_key, exemplars, labels)
  shared = within_noise(shared_key, factor, labels.shape[0])
  freedom = (exemplars.by_class.counts[labels] - 1)[:, None]
  noise = (of_class + jnp.sqrt(strength) * shared) / jnp.sqrt(freedom + strength)
  return exemplars_lib.class_means(exemplars)[labels] + noise


def gaussian_shrunk_means(
  key, exemplars: Exemplars, factor, labels: jax.Array, strength
) -> jax.Array:
  """N(g + n_c / (n_c + kappa) (mu_c - g), S), kappa = strength: small classes move to the middle.

  g is the mean of the class means and S the pooled covariance within classes. A mean of few
  exemplars, and more so of exemplars that the encoder has memorised, lies too far out. `strength`
  is worth so many exemplars at g; 0 leaves the means where they are.
  """
  counts, means = exemplars.by_class.counts, exemplars_lib.class_means(exemplars)
  centre = means.sum(axis=0) / jnp.maximum((counts > 0).sum(), 1)  # empty classes have mean 0
  trust = (counts / jnp.maximum(counts + strength, 1e-6))[labels][:, None]
  noise = within_noise(key, factor, labels.shape[0])
  return centre[None] + trust * (means[labels] - centre[None]) + noise


def head_classes(counts: jax.Array) -> jax.Array:
  """The third of the classes with most exemplars, at least NEIGHBOURS of them. [C] bool."""
  num_classes = counts.shape[0]
  rank = jnp.argsort(jnp.argsort(-counts, stable=True))
  return (rank < max(-(-num_classes // 3), NEIGHBOURS)) & (counts > 0)


def distribution_calibration(
  key, exemplars: Exemplars, _, labels: jax.Array, strength
) -> jax.Array:
  """Borrows mean and covariance from the nearest head classes.

  Yang, Liu, Xu, "Free lunch for few-shot learning: distribution calibration", ICLR 2021: around an
  exemplar x of the class, N((x + sum_k mu_k) / (1 + K), sum_k S_k / K + alpha I) with the K = 2
  head classes whose means are nearest to x. Different here: no Tukey transform, since standardised
  features have negative values; the base classes are the third of the classes with most exemplars
  (`head_classes`), where a class may be its own neighbour; alpha = strength widens every dimension
  alike, while the published code adds it to each entry of the matrix, which moves all dimensions
  together.
  """
  pick, member, spread = jax.random.split(key, 3)
  counts, means = exemplars.by_class.counts, exemplars_lib.class_means(exemplars)
  x = exemplars_lib.draw(pick, exemplars, labels)
  squared = jnp.square(means).sum(axis=1)[None] - 2 * x @ means.T  # up to |x|^2
  squared = jnp.where(head_classes(counts)[None], squared, jnp.inf)
  found, nearest = jax.lax.top_k(-squared, min(NEIGHBOURS, counts.shape[0]))  # [M, K]
  lends = jnp.isfinite(found)[:, :, None]  # fewer where fewer classes have exemplars
  number = lends.sum(axis=1)
  mean = (x + jnp.sum(lends * means[nearest], axis=1)) / (1 + number)
  noise = _scatter_noise(member, exemplars, nearest.ravel()).reshape(lends.shape[:2] + x.shape[1:])
  noise = lends * noise / jnp.sqrt(jnp.maximum(counts[nearest] - 1, 1))[:, :, None]
  noise = noise.sum(axis=1) / jnp.sqrt(number)
  return mean + noise + jnp.sqrt(strength) * jax.random.normal(spread, x.shape)
