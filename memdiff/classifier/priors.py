"""Priors and weights of the classes, which losses and adjusted logits are made of."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_LEAST = 1e-12  # share of a class; keeps the logarithm of an empty one finite


def log_prior(counts: Any) -> Any:
  """log of each class's share. Counts [C], of NumPy or JAX -> [C] of the same."""
  return log_shares(counts / counts.sum())


def log_shares(shares: Any) -> Any:
  """log of shares of the classes, at least 1e-12 each. [...] of NumPy or JAX -> the same."""
  library = jnp if isinstance(shares, jax.Array) else np
  return library.log(library.maximum(shares, _LEAST))


def effective_number(counts: jax.Array, beta: float) -> jax.Array:
  """Class-balanced weights (1 - beta) / (1 - beta^n), normalised to mean 1.

  Cui et al., "Class-balanced loss based on effective number of samples", 2019, eq. 4.

  Args:
    counts: [..., C] positive, how many examples (or how much weight) each class has.
    beta: in [0, 1); 0 weighs all classes alike, towards 1 the weights become 1/n.

  Returns:
    [..., C] float32.
  """
  weights = (1 - beta) / -jnp.expm1(counts * np.log(beta)) if beta > 0 else jnp.ones_like(counts)
  return with_mean_one(jnp.asarray(weights, jnp.float32))


def with_mean_one(weights: jax.Array) -> jax.Array:
  """[..., C], divided by the mean over classes."""
  return weights / weights.mean(axis=-1, keepdims=True)
