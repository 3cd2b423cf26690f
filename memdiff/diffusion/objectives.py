"""What a denoiser is trained to predict, as loss terms per sample."""

import jax
import jax.numpy as jnp


def noise_mse(prediction: jax.Array, eps: jax.Array) -> jax.Array:
  """DDPM's simple objective, eq. 14: mean squared error of the noise. [B, ...] x 2 -> [B]."""
  return jnp.mean(jnp.square(prediction - eps), axis=tuple(range(1, eps.ndim)))
