"""The terms that a denoiser's loss is made of.

To add one, give it a config, a formula (in `objectives`) and a row of TERMS.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from memdiff.config import above, at_least, between, one_of, setting
from memdiff.contrastive import supervised_contrastive, unit_length
from memdiff.diffusion.objectives import (
  OTHER_LABELS,
  TRANSFERS,
  class_balance,
  eps_weights,
  flat,
  infonce,
  mean_squared_error,
  min_snr_weights,
  separation,
  supcon_weights,
  target,
  x0_weights,
)
from memdiff.runtime.random import stream

LOSSES = ("mse", "infonce")
READINGS = ("paper", "code")
PLACES = ("bottleneck", "image")
PROJECTION = "supcon_projection"


@dataclasses.dataclass(frozen=True)
class InfoNCEConfig:
  """See `infonce`."""

  temperature: float = setting(0.1, "of cosines", above(0))
  mse_weight: float = setting(
    1.0, "of mse beside it; without any, samples have no scale", at_least(0)
  )


@dataclasses.dataclass(frozen=True)
class SupConConfig:
  """CORAL's term: SupCon on projected bottlenecks, weighted by `supcon_weights`.

  The released code differs from the paper: lambda(t) is averaged over the batch, the term is
  multiplied by the temperature once more, and it is left out if the batch's labels are dropped.
  """

  weight: float = setting(0.0, "w of w exp((1 - t / T) / decay); 0: off", at_least(0))
  decay: float = setting(0.3, "over the steps of the diffusion", above(0))
  temperature: float = setting(0.1, "of cosines", above(0))
  projection_dim: int = setting(128, "length of the projected bottlenecks", at_least(1))
  place: str = setting(
    "bottleneck", "image: on predicted images instead, CORAL's ablation", one_of(PLACES)
  )
  reading: str = setting("paper", "the paper's formula or its code's", one_of(READINGS))


@dataclasses.dataclass(frozen=True)
class CBDMConfig:
  """See `class_balance`."""

  weight: float = setting(0.0, "at t = T; 0: off", at_least(0))
  commitment: float = setting(
    0.25, "share of the term that moves the other class's prediction", at_least(0)
  )


@dataclasses.dataclass(frozen=True)
class SeparationConfig:
  """See `separation`; weight and margin are ours, none are published."""

  weight: float = setting(0.0, "of the term; 0: off", at_least(0))
  margin: float = setting(
    1e-3, "divergence per number from which on classes are apart enough", above(0)
  )


@dataclasses.dataclass(frozen=True)
class CapacityConfig:
  """See `capacity_weights`; for denoisers with a reserve."""

  consistency: float = setting(
    0.0, "pulls predictions with and without it together, by the share of the class", at_least(0)
  )
  diversity: float = setting(0.0, "pushes them apart, by the rarity of the class", at_least(0))


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
  separation: SeparationConfig = setting(
    SeparationConfig(), "DiffROP: pushes the predictions for different classes apart"
  )
  other_labels: str = setting(
    "empirical", "cbdm, separation: other classes, by their counts or uniform", one_of(OTHER_LABELS)
  )
  capacity: CapacityConfig = setting(
    CapacityConfig(), "Capacity Manipulation: what the reserve of the denoiser is for"
  )
  transfer: TransferConfig = setting(
    TransferConfig(), "T2H: a noised sample may stand for another sample of the batch"
  )


@dataclasses.dataclass(frozen=True)
class Prediction:
  """The denoiser's output for a noised batch, with everything that terms compare it with.

  Attributes:
    kind: what the denoiser predicts, one of PREDICTIONS.
    batch: its clean samples and conditions, a `denoiser_training.Batch`.
    params: of the denoiser, and beside them those of terms.
    x_t: [B, ...] the noised samples.
    x0, eps: [B, ...] the clean samples and the noise that x_t is taken to be made of.
    signal, noise: s and n, broadcasting against x_t.
    alpha: [B] alpha_t = abar_t / abar_{t-1}.
    time: [B] t / T.
    output: [B, ...] the prediction.
    bottleneck: [B, W].
    denoise: (label, memory) -> the prediction for the same x_t under another condition.
    general: [B, ...] the prediction without the denoiser's reserve, if a term asks for it.
  """

  kind: str
  batch: Any
  params: Any
  x_t: jax.Array
  x0: jax.Array
  eps: jax.Array
  signal: jax.Array
  noise: jax.Array
  alpha: jax.Array
  time: jax.Array
  output: jax.Array
  bottleneck: jax.Array
  denoise: Callable[[jax.Array, Any], jax.Array]
  general: jax.Array | None = None

  def as_noise(self, output: jax.Array) -> jax.Array:
    """A prediction as predicted noise. [B, ...]."""
    a, b = eps_weights(self.kind, self.signal, self.noise)
    return a * self.x_t + b * output

  def as_sample(self, output: jax.Array) -> jax.Array:
    """A prediction as predicted clean sample. [B, ...]."""
    a, b = x0_weights(self.kind, self.signal, self.noise)
    return a * self.x_t + b * output


@dataclasses.dataclass(frozen=True)
class Term:
  """A summand of the loss.

  Attributes:
    wanted: whether a config asks for it; otherwise it is left out of the program.
    value: (config, prediction) -> its mean over the batch, weight applied.
    needs: fields of the batch beside x0, label and memory, which only some terms make it draw.
    parameters: the name of its own parameters beside the denoiser's; empty: it has none.
    init: (key, config, output [B, ...], bottleneck [B, W]) -> these parameters.
  """

  wanted: Callable[[ObjectiveConfig], bool]
  value: Callable[[ObjectiveConfig, Prediction], jax.Array]
  needs: tuple[str, ...] = ()
  parameters: str = ""
  init: Callable[[jax.Array, ObjectiveConfig, jax.Array, jax.Array], Any] | None = None


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


def _init_projection(
  key: jax.Array, config: ObjectiveConfig, output: jax.Array, bottleneck: jax.Array
) -> Any:
  layer = nn.Dense(config.supcon.projection_dim)
  rows = flat(output) if config.supcon.place == "image" else bottleneck
  return layer.init(stream(key, "projection"), rows)["params"]


def _supcon(config: ObjectiveConfig, p: Prediction) -> jax.Array:
  """On one linear layer of the bottleneck, or of the predicted sample, of unit length."""
  layer, c = nn.Dense(config.supcon.projection_dim), config.supcon
  rows = flat(p.as_sample(p.output)) if c.place == "image" else p.bottleneck
  embeddings = unit_length(layer.apply({"params": p.params[PROJECTION]}, rows), 1)
  weights = supcon_weights(p.time, c.weight, c.decay)
  if c.reading == "paper":
    return supervised_contrastive(embeddings, p.batch.true_label, c.temperature, weights)
  term = supervised_contrastive(embeddings, p.batch.true_label, c.temperature)
  told = (p.batch.label == p.batch.true_label).any()
  return told * weights.mean() * c.temperature * term


def _separation(config: ObjectiveConfig, p: Prediction) -> jax.Array:
  """Of rows whose other class is another one, and which are told their class."""
  other = p.denoise(p.batch.other_label, p.batch.other_memory)
  hinge = separation(
    p.as_noise(p.output),
    p.as_noise(other),
    p.alpha,
    p.noise.reshape(-1),
    config.separation.margin,
  )
  return config.separation.weight * jnp.mean(hinge * (p.batch.label != p.batch.other_label))


def _cbdm(config: ObjectiveConfig, p: Prediction) -> jax.Array:
  other = p.denoise(p.batch.other_label, p.batch.other_memory)
  gap = class_balance(p.as_noise(p.output), p.as_noise(other), p.time, config.cbdm.commitment)
  return config.cbdm.weight * gap.mean()


def uses_reserve(config: ObjectiveConfig) -> bool:
  """Whether a config needs a denoiser that predicts with and without a reserve."""
  return config.capacity.consistency > 0 or config.capacity.diversity > 0


def _capacity(config: ObjectiveConfig, p: Prediction) -> jax.Array:
  gap = mean_squared_error(p.as_noise(p.output), p.as_noise(p.general))
  c, batch = config.capacity, p.batch
  weights = c.consistency * batch.class_share - c.diversity * batch.class_rarity
  return jnp.mean(weights * gap)


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
  "separation": Term(
    lambda config: config.separation.weight > 0, _separation, needs=("other_label", "other_memory")
  ),
  "capacity": Term(uses_reserve, _capacity, needs=("class_share", "class_rarity")),
}


def terms_of(config: ObjectiveConfig) -> dict[str, Term]:
  """The terms that a config asks for, by name."""
  return {name: term for name, term in TERMS.items() if term.wanted(config)}


def needed(config: ObjectiveConfig) -> set[str]:
  """The fields of a batch, beside x0, label and memory, that a config asks for."""
  fields = {field for term in terms_of(config).values() for field in term.needs}
  return fields if config.transfer.rule == "none" else fields | {"class_count"}
