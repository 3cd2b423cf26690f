"""What a denoiser is trained to predict, how far it is off, and the terms that may be added.

Three targets, equivalent in what they say about x_t = s x_0 + n eps with s = sqrt(abar_t) and
n = sqrt(1 - abar_t), but not in how errors weigh at either end of the schedule:

- `eps`, the noise (DDPM); ill-conditioned if s is nearly zero, since x_0 = (x_t - n eps) / s;
- `x0`, the clean sample;
- `v` = s eps - n x_0 (Salimans and Ho, "Progressive distillation", 2022), well-conditioned at both
  ends: x_0 = s x_t - n v.

The formulas are per sample. TERMS, at the end, makes summands of the loss of them: to add one, give
it a config, a formula and a row.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from memdiff.config import above, at_least, between, one_of, setting
from memdiff.contrastive import supervised_contrastive, unit_length
from memdiff.runtime.random import stream

PREDICTIONS = ("eps", "v", "x0")
LOSSES = ("mse", "infonce")
OTHER_LABELS = ("empirical", "uniform")
TRANSFERS = ("none", "t2h", "h2t", "full")
_MIN_SQUARE = 1e-6  # of a predicted noise, per dimension; keeps the gradient at zero finite


@dataclasses.dataclass(frozen=True)
class InfoNCEConfig:
  """See `infonce`."""

  temperature: float = setting(0.1, "of cosines", above(0))
  mse_weight: float = setting(
    1.0, "of mse beside it; without any, samples have no scale", at_least(0)
  )


@dataclasses.dataclass(frozen=True)
class SupConConfig:
  """CORAL's term: SupCon on projected bottlenecks, weighted by `supcon_weights`."""

  weight: float = setting(0.0, "w of w exp((1 - t / T) / decay); 0: off", at_least(0))
  decay: float = setting(0.3, "over the steps of the diffusion", above(0))
  temperature: float = setting(0.1, "of cosines", above(0))
  projection_dim: int = setting(128, "length of the projected bottlenecks", at_least(1))


@dataclasses.dataclass(frozen=True)
class CBDMConfig:
  """See `class_balance`."""

  weight: float = setting(0.0, "at t = T; 0: off", at_least(0))
  commitment: float = setting(
    0.25, "share of the term that moves the other class's prediction", at_least(0)
  )
  labels: str = setting(
    "empirical", "other classes: by their counts or uniform", one_of(OTHER_LABELS)
  )


@dataclasses.dataclass(frozen=True)
class TransferConfig:
  """See `transferred`."""

  rule: str = setting(
    "none", "t2h: from classes of fewer examples to classes of more; h2t: back", one_of(TRANSFERS)
  )
  before: float = setting(1.0, "only at times below this share of all steps", between(0, 1))


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
  """Terms of one loss, DDPM's alone by default; a weight of 0 leaves a term out of the program."""

  loss: str = setting("mse", "mean squared error (DDPM), or InfoNCE beside it", one_of(LOSSES))
  min_snr: float = setting(
    0.0,
    "limit of the signal-to-noise ratio that weighs errors of x0, published as 5; 0: off",
    at_least(0),
  )
  infonce: InfoNCEConfig = setting(
    InfoNCEConfig(), "loss infonce: each predicted noise is matched to its own in the batch"
  )
  supcon: SupConConfig = setting(SupConConfig(), "CORAL: classes apart at the bottleneck")
  cbdm: CBDMConfig = setting(
    CBDMConfig(), "CBDM: pulls the predictions for different classes together"
  )
  transfer: TransferConfig = setting(
    TransferConfig(), "T2H: a noised sample may stand for another sample of the batch"
  )


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
  scaled, clean = _flat(x_t / signal), _flat(x0)
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


# --- terms of the loss -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Prediction:
  """What a denoiser makes of a noised batch, and what terms may hold it against.

  Attributes:
    kind: what the denoiser predicts, one of PREDICTIONS.
    batch: its clean samples and conditions, a `denoiser_training.Batch`.
    params: of the denoiser, and beside them those of terms.
    x_t: [B, ...] the noised samples.
    x0, eps: [B, ...] the clean samples and the noise that x_t is taken to be made of.
    signal, noise: s and n, broadcasting against x_t.
    time: [B] t / T.
    output: [B, ...] the prediction.
    bottleneck: [B, W].
    denoise: (label, memory) -> the prediction for the same x_t under another condition.
  """

  kind: str
  batch: Any
  params: Any
  x_t: jax.Array
  x0: jax.Array
  eps: jax.Array
  signal: jax.Array
  noise: jax.Array
  time: jax.Array
  output: jax.Array
  bottleneck: jax.Array
  denoise: Callable[[jax.Array, Any], jax.Array]

  def as_noise(self, output: jax.Array) -> jax.Array:
    """A prediction as predicted noise. [B, ...]."""
    a, b = eps_weights(self.kind, self.signal, self.noise)
    return a * self.x_t + b * output


@dataclasses.dataclass(frozen=True)
class Term:
  """A summand of the loss.

  Attributes:
    wanted: whether a config asks for it; otherwise it is left out of the program.
    value: (config, prediction) -> its mean over the batch, weight applied.
    needs: fields of the batch beside x0, label and memory, which only some terms make it draw.
    parameters: the name of its own parameters beside the denoiser's; empty: it has none.
    init: (key, config, bottleneck [B, W]) -> these parameters.
  """

  wanted: Callable[[ObjectiveConfig], bool]
  value: Callable[[ObjectiveConfig, Prediction], jax.Array]
  needs: tuple[str, ...] = ()
  parameters: str = ""
  init: Callable[[jax.Array, ObjectiveConfig, jax.Array], Any] | None = None


def _mse(config: ObjectiveConfig, p: Prediction) -> jax.Array:
  wanted = target(p.kind, p.x0, p.eps, p.signal, p.noise)
  squared = mean_squared_error(p.output, wanted)
  if config.min_snr > 0:
    weights = min_snr_weights(p.kind, p.signal, p.noise, config.min_snr)
    squared = weights.reshape(-1) * squared
  weight = config.infonce.mse_weight if config.loss == "infonce" else 1
  return weight * squared.mean()


def _infonce(config: ObjectiveConfig, p: Prediction) -> jax.Array:
  return infonce(p.as_noise(p.output), p.eps, config.infonce.temperature).mean()


def _init_projection(key: jax.Array, config: ObjectiveConfig, bottleneck: jax.Array) -> Any:
  layer = nn.Dense(config.supcon.projection_dim)
  return layer.init(stream(key, "projection"), bottleneck)["params"]


def _supcon(config: ObjectiveConfig, p: Prediction) -> jax.Array:
  """On one linear layer of the bottleneck, of unit length."""
  layer, c = nn.Dense(config.supcon.projection_dim), config.supcon
  embeddings = unit_length(layer.apply({"params": p.params[PROJECTION]}, p.bottleneck), 1)
  weights = supcon_weights(p.time, c.weight, c.decay)
  return supervised_contrastive(embeddings, p.batch.true_label, c.temperature, weights)


def _cbdm(config: ObjectiveConfig, p: Prediction) -> jax.Array:
  other = p.denoise(p.batch.other_label, p.batch.other_memory)
  gap = class_balance(p.as_noise(p.output), p.as_noise(other), p.time, config.cbdm.commitment)
  return config.cbdm.weight * gap.mean()


PROJECTION = "supcon_projection"

TERMS = {
  "mse": Term(lambda config: True, _mse),
  "infonce": Term(lambda config: config.loss == "infonce", _infonce),
  "supcon": Term(
    lambda config: config.supcon.weight > 0,
    _supcon,
    needs=("true_label",),
    parameters=PROJECTION,
    init=_init_projection,
  ),
  "cbdm": Term(lambda config: config.cbdm.weight > 0, _cbdm, needs=("other_label", "other_memory")),
}


def terms_of(config: ObjectiveConfig) -> dict[str, Term]:
  """The terms that a config asks for, by name."""
  return {name: term for name, term in TERMS.items() if term.wanted(config)}


def needed(config: ObjectiveConfig) -> set[str]:
  """The fields of a batch, beside x0, label and memory, that a config asks for."""
  fields = {field for term in terms_of(config).values() for field in term.needs}
  return fields if config.transfer.rule == "none" else fields | {"class_count"}
