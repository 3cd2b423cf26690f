"""What a denoiser is trained to predict, and formulas for how far it is off, per sample.

Three targets, equivalent in what they say about x_t = s x_0 + n eps with s = sqrt(abar_t) and
n = sqrt(1 - abar_t), but not in how errors weigh at either end of the schedule:

- `eps`, the noise (DDPM); ill-conditioned if s is nearly zero, since x_0 = (x_t - n eps) / s;
- `x0`, the clean sample;
- `v` = s eps - n x_0 (Salimans and Ho, "Progressive distillation", 2022), well-conditioned at both
  ends: x_0 = s x_t - n v.

`terms` makes summands of the loss of them.
"""

import jax
import jax.numpy as jnp

PREDICTIONS = ("eps", "v", "x0")
OTHER_LABELS = ("empirical", "uniform")
TRANSFERS = ("none", "t2h", "h2t", "full")
_MIN_SQUARE = 1e-6  # of a predicted noise, per dimension; keeps the gradient at zero finite


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


def flat(x: jax.Array) -> jax.Array:
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
    x = flat(x)
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


def separation(
  eps_hat: jax.Array, other: jax.Array, alpha: jax.Array, noise: jax.Array, margin: float
) -> jax.Array:
  """DiffROP's regulariser: the reverse steps of different classes should differ.

  max(0, m - KL) with the divergence of p(x_{t-1} | x_t, y) from p(x_{t-1} | x_t, y'), Gaussians of
  one variance sigma_t^2 = beta_t: KL = beta_t / (2 alpha_t (1 - abar_t)) |eps_hat - other|^2, the
  square averaged over dimensions. Yan et al., "Training class-imbalanced diffusion model via
  overlap optimization", 2024, from its formula: no code and no margin are published.

  Args:
    eps_hat: [B, ...] predicted noise.
    other: [B, ...] the noise predicted under another class.
    alpha: [B] alpha_t = abar_t / abar_{t-1}.
    noise: [B] sqrt(1 - abar_t).
    margin: m.

  Returns:
    [B].
  """
  scale = (1 - alpha) / (2 * alpha * jnp.square(noise))
  return jnp.maximum(margin - scale * mean_squared_error(eps_hat, other), 0)


def capacity_weights(counts: jax.Array) -> tuple[jax.Array, jax.Array]:
  """What the terms of Capacity Manipulation weigh classes by: (share, rarity), [C] each, mean 1.

  With C classes and p_y the share of class y among training examples, C p_y and C q_y, q
  proportional to 1 / p. The terms are consistency C p_y d and diversity -C q_y d, of d = |eps_hat -
  eps_general|^2, the square averaged over dimensions: what is predicted with the reserve against
  what is without. Hong et al., "Improving diffusion models for class-imbalanced training data via
  capacity manipulation", 2026, as its released code has it. Classes without examples weigh nothing.
  """
  there = counts > 0
  inverse = jnp.where(there, 1 / jnp.maximum(counts, 1), 0)
  number = there.sum()
  return number * counts / counts.sum(), number * inverse / inverse.sum()


def other_weights(counts: jax.Array, labels: str) -> jax.Array:
  """Cumulated weights [C] by which the other class y' is drawn, one of OTHER_LABELS."""
  weights = counts if labels == "empirical" else counts > 0
  return jnp.cumsum(weights.astype(jnp.float32))


def transferred(
  key: jax.Array,
  x_t: jax.Array,
  x0: jax.Array,
  signal: jax.Array,
  noise: jax.Array,
  counts: jax.Array,
  rule: str,
) -> jax.Array:
  """Which sample of the batch each noised one is taken to come from. [B] int.

  Zhang et al., "Long-tailed diffusion models with oriented calibration", 2024 (T2H), as its code
  has it: for row i, j is drawn with weights exp(-|x_t,i / s_i - x_0,j|^2 / (2 sigma_i^2)), sigma =
  n / s, which is the posterior of the clean sample among the batch's. It is taken if its class has
  as many training examples as that of i or more (`t2h`), as many or fewer (`h2t`), or in any case
  (`full`); otherwise row i stays itself.

  Args:
    key: of the draws.
    x_t, x0: [B, ...] noised and clean samples.
    signal, noise: s and n, broadcasting against x_t.
    counts: [B] training examples of the rows' classes; 0 in rows of classes that were made up,
      which stay themselves and are taken by no other.
    rule: one of TRANSFERS but none.
  """
  scaled, clean = flat(x_t / signal), flat(x0)
  squared = (
    jnp.square(scaled).sum(axis=1)[:, None]
    + jnp.square(clean).sum(axis=1)[None]
    - 2 * scaled @ clean.T
  )
  variance = jnp.square(noise / signal).reshape(-1, 1)
  drawn = jax.random.categorical(key, -squared / (2 * variance), axis=1)
  accepted = {
    "t2h": counts[drawn] >= counts, "h2t": counts[drawn] <= counts, "full": jnp.bool_(True),
  }[rule]  # fmt: skip
  real = (counts[drawn] > 0) & (counts > 0)
  return jnp.where(accepted & real, drawn, jnp.arange(len(counts)))
