"""What a denoiser is trained to predict, and how far it is off, per sample.

Three targets, equivalent in what they say about x_t = s x_0 + n eps with s = sqrt(abar_t) and
n = sqrt(1 - abar_t), but not in how errors weigh at either end of the schedule:

- `eps`, the noise (DDPM); ill-conditioned where s is nearly zero, since x_0 = (x_t - n eps) / s;
- `x0`, the clean sample;
- `v` = s eps - n x_0 (Salimans and Ho, "Progressive distillation", 2022), well-conditioned at both
  ends: x_0 = s x_t - n v.
"""

import jax
import jax.numpy as jnp

PREDICTIONS = ("eps", "v", "x0")


def target(prediction: str, x0: jax.Array, eps: jax.Array, signal: jax.Array, noise: jax.Array):
  """What the denoiser should return; `signal` and `noise` broadcast against x0 [B, ...]."""
  if prediction == "eps":
    return eps
  return x0 if prediction == "x0" else signal * eps - noise * x0


def x0_weights(prediction: str, signal, noise):
  """(a, b) with x_0 = a x_t + b output, for an output of this kind; NumPy or JAX numbers."""
  if prediction == "eps":
    return 1 / signal, -noise / signal
  return (0 * signal, 1 + 0 * signal) if prediction == "x0" else (signal, -noise)


def mean_squared_error(output: jax.Array, target: jax.Array) -> jax.Array:
  """DDPM's simple objective, eq. 14, for any target. [B, ...] twice -> [B]."""
  return jnp.mean(jnp.square(output - target), axis=tuple(range(1, target.ndim)))
