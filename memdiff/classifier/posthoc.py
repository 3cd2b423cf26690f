"""Heads that follow from a trained classifier without training it: arrays in, logits out.

A head is {"kernel" [D, C], "bias" [C]}; features are [N, D]; logits [N, C].
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from memdiff.classifier.priors import log_prior
from memdiff.memory.feature_space import linear_logits

TAUS = tuple(np.linspace(0, 2, 21).round(1).tolist())  # Kang et al. 2020 sweep [0, 2]


def adjusted_logits(logits: jax.Array, counts: jax.Array, tau: float) -> jax.Array:
  """logits - tau log prior. Menon et al. 2021, eq. 9. `counts` is [C]."""
  return logits - tau * log_prior(counts)[None]


def tau_normalized_logits(
  head: Mapping[str, jax.Array], features: jax.Array, tau: float
) -> jax.Array:
  """features . w_c / |w_c|^tau. Kang et al. 2020, eq. 3; the bias is discarded, as there."""
  lengths = jnp.linalg.norm(head["kernel"], axis=0)
  return features @ (head["kernel"] / jnp.maximum(lengths, 1e-12)[None] ** tau)


def scaled_logits(
  head: Mapping[str, jax.Array], scale: jax.Array, features: jax.Array
) -> jax.Array:
  """scale_c (features . w_c + b_c): learnable weight scaling (LWS), Kang et al. 2020, eq. 5."""
  return scale[None] * linear_logits(head, features)


def nearest_mean_logits(features: jax.Array, means: jax.Array) -> jax.Array:
  """Cosine between features and class means [C, D]: NCM of Kang et al. 2020, section 4.2."""
  return unit(features) @ unit(means).T


def unit(vectors: jax.Array) -> jax.Array:
  """[..., D], each of length one."""
  return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def select_tau(candidates: Sequence[float], score: Callable[[float], float]) -> float:
  """The candidate with the highest score on held-out data; the smallest of equals."""
  return max(candidates, key=lambda tau: (score(tau), -tau))
