"""What a denoiser is trained to predict, how far it is off, and the terms that may be added.

Three targets, equivalent in what they say about x_t = s x_0 + n eps with s = sqrt(abar_t) and
n = sqrt(1 - abar_t), but not in how errors weigh at either end of the schedule:

- `eps`, the noise (DDPM); ill-conditioned where s is nearly zero, since x_0 = (x_t - n eps) / s;
- `x0`, the clean sample;
- `v` = s eps - n x_0 (Salimans and Ho, "Progressive distillation", 2022), well-conditioned at both
  ends: x_0 = s x_t - n v.

All functions here are per sample; means over the batch are taken where the terms are added up.
"""

import dataclasses

import jax
import jax.numpy as jnp

from memdiff.config import above, at_least, one_of

PREDICTIONS = ("eps", "v", "x0")
LOSSES = ("mse", "infonce")
OTHER_LABELS = ("empirical", "uniform")
_MIN_SQUARE = 1e-6  # of a predicted noise, per dimension; keeps the gradient at zero finite


@dataclasses.dataclass(frozen=True)
class InfoNCEConfig:
  """See `infonce`."""

  temperature: float = above(0)
  mse_weight: float = at_least(0)


@dataclasses.dataclass(frozen=True)
class SupConConfig:
  """CORAL's term: SupCon on projected bottlenecks, weighted by `supcon_weights`."""

  weight: float = at_least(0)
  decay: float = above(0)
  temperature: float = above(0)
  projection_dim: int = at_least(1)


@dataclasses.dataclass(frozen=True)
class CBDMConfig:
  """See `class_balance`."""

  weight: float = at_least(0)
  commitment: float = at_least(0)
  labels: str = one_of(OTHER_LABELS)


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
  """Terms of one loss; a weight of 0 leaves a term out of the program."""

  loss: str = one_of(LOSSES)
  min_snr: float = at_least(0)
  infonce: InfoNCEConfig
  supcon: SupConConfig
  cbdm: CBDMConfig


PLAIN = ObjectiveConfig(
  loss="mse",
  min_snr=0.0,
  infonce=InfoNCEConfig(temperature=0.1, mse_weight=1.0),
  supcon=SupConConfig(weight=0.0, decay=0.3, temperature=0.1, projection_dim=128),
  cbdm=CBDMConfig(weight=0.0, commitment=0.25, labels="empirical"),
)  # DDPM's simple objective and nothing else


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


def eps_weights(prediction: str, signal, noise):
  """(a, b) with eps = a x_t + b output, for an output of this kind; NumPy or JAX numbers."""
  if prediction == "x0":
    return 1 / noise, -signal / noise
  return (0 * signal, 1 + 0 * signal) if prediction == "eps" else (noise, signal)


def mean_squared_error(output: jax.Array, target: jax.Array) -> jax.Array:
  """DDPM's simple objective, eq. 14, for any target. [B, ...] twice -> [B]."""
  return jnp.mean(jnp.square(output - target), axis=tuple(range(1, target.ndim)))


def min_snr_weights(prediction: str, signal, noise, gamma: float):
  """Weights of squared errors that cap the signal-to-noise ratio by which x0 errors weigh.

  With SNR = s^2 / n^2: min(SNR, gamma) for x0, min(SNR, gamma) / SNR for eps and
  min(SNR, gamma) / (SNR + 1) for v, which is one and the same weighting of x0 errors.
  Hang et al., "Efficient diffusion training via Min-SNR weighting strategy", 2023.

  Args:
    prediction: one of PREDICTIONS.
    signal: s, any shape.
    noise: n, the same shape.
    gamma: cap, above 0; 5 in the paper.
  """
  snr = jnp.square(signal / noise)
  capped = jnp.minimum(snr, gamma)
  return {"x0": capped, "eps": capped / snr, "v": capped / (snr + 1)}[prediction]


def _flat(x: jax.Array) -> jax.Array:
  return x.reshape(x.shape[0], -1)


def infonce(eps_hat: jax.Array, eps: jax.Array, temperature: float) -> jax.Array:
  """The predicted noise must pick out its own noise among the batch's.

  -log [exp(cos(eps_hat_i, eps_i) / t) / sum_j exp(cos(eps_hat_i, eps_j) / t)], the loss of van den
  Oord et al., "Representation learning with contrastive predictive coding", 2018, eq. 4, with the
  cosine as similarity. It says nothing about the *length* of the predicted noise, which samplers
  need: without some squared error beside it (`mse_weight`) samples have no scale.

  Args:
    eps_hat: [B, ...] predicted noise.
    eps: [B, ...] the noise itself.
    temperature: t, above 0.

  Returns:
    [B], at least 0; log B for a denoiser that knows nothing.
  """

  def direction(x):
    x = _flat(x)
    return x * jax.lax.rsqrt(jnp.square(x).sum(axis=1, keepdims=True) + x.shape[1] * _MIN_SQUARE)

  similarity = direction(eps_hat) @ direction(eps).T / temperature
  return jax.nn.logsumexp(similarity, axis=1) - jnp.diagonal(similarity)


def supcon_weights(time: jax.Array, weight: float, decay: float) -> jax.Array:
  """CORAL's lambda(t) = w exp((1 - t / T) / tau_r): most where there is least noise.

  "CORAL: Disentangling latent representations in long-tailed diffusion", 2025, arXiv 2506.15933.

  Args:
    time: t / T in [0, 1).
    weight: w.
    decay: tau_r, above 0.
  """
  return weight * jnp.exp((1 - time) / decay)


def class_balance(
  eps_hat: jax.Array, other: jax.Array, time: jax.Array, commitment: float
) -> jax.Array:
  """CBDM's regulariser: what is predicted for a class should differ little from any other class's.

  t / T (|eps_hat - sg other|^2 + gamma |sg eps_hat - other|^2), squares averaged over dimensions,
  with the noise that is predicted from the same x_t for the class and for another, y'; sg stops
  gradients. Qin et al., "Class-balancing diffusion models", 2023, with the t / T of their code.

  Args:
    eps_hat: [B, ...] predicted noise.
    other: [B, ...] the noise predicted under y'.
    time: [B] t / T.
    commitment: gamma, 1/4 in the paper.

  Returns:
    [B].
  """
  stop = jax.lax.stop_gradient
  pull = mean_squared_error(eps_hat, stop(other))
  return time * (pull + commitment * mean_squared_error(other, stop(eps_hat)))
