"""Guidance: how predictions under several conditions become one, and conditions that fade in.

- `free`, classifier-free guidance (Ho and Salimans 2022): away from what is unconditional;
- `negative`, away from what a negative condition asks for, as text-to-image programs do;
- `contrastive` (Chang, Chung and Ye, "Contrastive CFG", 2024): towards the condition, and away from
  the negative one only while the sample is about to follow it, so that it never leaves the data.

Condition annealing (CADS, Sadat et al. 2024) adds noise to the condition of the first steps, for
samples that differ more from each other.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from memdiff.config import above, at_least, between, one_of, setting
from memdiff.diffusion import objectives
from memdiff.diffusion.schedules import NoiseSchedule
from memdiff.runtime.random import normal

FREE, NEGATIVE, CONTRASTIVE = "free", "negative", "contrastive"
Denoise = Callable[[jax.Array, jax.Array, Any], jax.Array]
Predict = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class AnnealingConfig:
  """CADS; its time goes from 1, noise, to 0, images."""

  noise: float = setting(0.0, "deviation of the noise in a condition of deviation 1; 0: none",
                         at_least(0))  # fmt: skip
  begin: float = setting(0.6, "time from which on the condition is whole", between(0, 1))
  end: float = setting(0.9, "time before which it is noise alone", between(0, 1))
  mix: float = setting(
    1.0, "share of the condition that is brought back to its own mean and deviation", between(0, 1)
  )

  def __post_init__(self):
    if self.begin >= self.end:
      raise ValueError(f"begin is {self.begin:g} and end {self.end:g}, but begin must be lower.")


@dataclasses.dataclass(frozen=True)
class GuidanceConfig:
  kind: str = setting(
    FREE, "away from no class, or from the class that is most alike",
    one_of((FREE, NEGATIVE, CONTRASTIVE)),
  )  # fmt: skip
  temperature: float = setting(
    0.2, "contrastive: tau, how fast it lets go of what is far from the negative class", above(0)
  )
  annealing: AnnealingConfig = setting(AnnealingConfig(), "noise in the condition")

  @property
  def needs_negative(self) -> bool:
    return self.kind != FREE


def guide(conditional: jax.Array, other: jax.Array, scale: float | jax.Array) -> jax.Array:
  """eps_other + scale (eps_c - eps_other), for an unconditional or a negative prediction.

  The same for any prediction, since all are linear in eps given x_t. Scale 1 is no guidance, 0
  ignores the condition; omega = scale - 1 in CBDM's notation.
  """
  return other + scale * (conditional - other)


def guided(
  denoise: Denoise,
  context: Any,
  other: Callable[[], Any],
  scale: float | jax.Array,
) -> Predict:
  """(x [B, ...], t [1]) -> the prediction that `guide` mixes.

  At a scale of 1 the denoiser runs once per call. Otherwise, and if the scale is traced (a sweep
  under `vmap`), conditional and other rows run as one batch of 2B.

  Args:
    denoise: (x, t, context) -> prediction [B, ...].
    context: the condition; arrays lead with G rows, each for B / G rows of x in a row. Or a
      function of t that gives it.
    other: () -> the same without a condition, or for the negative one.
    scale: of the guidance.
  """
  if isinstance(scale, (int, float)) and scale == 1:
    return lambda x, t: denoise(x, t, context(t) if callable(context) else context)
  both = _under(denoise, context, other())
  return lambda x, t: guide(*both(x, t), scale)


def _under(denoise: Denoise, context: Any, *others: Any) -> Callable[..., list[jax.Array]]:
  """(x, t) -> the predictions under several contexts, as one batch; the first may change by t."""

  def joined(context):
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), context, *others)

  number, fixed = 1 + len(others), None if callable(context) else joined(context)

  def predict(x, t):
    together = joined(context(t)) if fixed is None else fixed
    return jnp.split(denoise(jnp.concatenate([x] * number), t, together), number)

  return predict


def contrastive_weights(distance: jax.Array, temperature: float) -> tuple[jax.Array, jax.Array]:
  """(of a positive condition, of a negative one), from |eps_0 - eps_c|^2 of each.

  2 / (1 + exp(-tau d)), from 1 for nothing to gain to 2; and 2 exp(-tau d) / (1 + exp(-tau d)),
  from 1 to 0, so that what is far already is left alone.
  """
  kept = jax.nn.sigmoid(temperature * distance)
  return 2 * kept, 2 * (1 - kept)


def contrasted(
  denoise: Denoise,
  contexts: tuple[Any, Any, Any],
  scale: float | jax.Array,
  temperature: float,
  eps_factor: Callable[[jax.Array], jax.Array],
) -> Predict:
  """(x [B, ...], t [1]) -> contrastive guidance; three rows of the denoiser for each of x.

  eps_0 + scale w+ (eps_c - eps_0) - scale w- (eps_n - eps_0), `contrastive_weights` w+ and w-.

  Args:
    denoise: as of `guided`.
    contexts: the condition, perhaps a function of t; none; and the negative one.
    scale: of the guidance.
    temperature: tau.
    eps_factor: t [1] -> what a difference of predictions is in eps.
  """
  under = _under(denoise, *contexts)

  def predict(x, t):
    towards, beside, away = under(x, t)
    axes = tuple(range(1, x.ndim))
    gaps = [towards - beside, away - beside]
    distances = [jnp.square(eps_factor(t) * gap).sum(axis=axes, keepdims=True) for gap in gaps]
    pull, _ = contrastive_weights(distances[0], temperature)
    _, push = contrastive_weights(distances[1], temperature)
    return beside + scale * (pull * gaps[0] - push * gaps[1])

  return predict


def eps_factor(prediction: str, schedule: NoiseSchedule) -> Callable[[jax.Array], jax.Array]:
  """(t [1] in [0, 1000)) -> the factor by which differences of a prediction are ones in eps."""

  def factor(t):
    step = jnp.round(t * (schedule.num_steps / 1000)).astype(int)
    signal, noise = schedule.scales(step, t)
    return objectives.eps_weights(prediction, signal, noise)[1][0]

  return factor


def annealed(config: AnnealingConfig, context: Any, key: jax.Array) -> Callable[[jax.Array], Any]:
  """(t [1] in [0, 1000)) -> the condition of that time, with noise anew at every step.

  sqrt(g) y + noise sqrt(1 - g) n, where g falls from 1 at `begin` to 0 at `end`; then each row is
  brought back to its mean and deviation (CADS, equations 2 to 4). What is no number stays.
  """

  def at(t):
    time = t[0] / 1000
    whole = jnp.clip((config.end - time) / (config.end - config.begin), 0, 1)
    leaves, structure = jax.tree.flatten(context)
    keys = jax.random.split(jax.random.fold_in(key, t[0].astype(int)), len(leaves))

    def fade(y, key):
      if not jnp.issubdtype(y.dtype, jnp.floating):
        return y
      axes = tuple(range(1, y.ndim))
      mean, deviation = y.mean(axis=axes, keepdims=True), y.std(axis=axes, keepdims=True)
      noisy = jnp.sqrt(whole) * y + config.noise * jnp.sqrt(1 - whole) * normal(key, y.shape)
      spread = jnp.maximum(noisy.std(axis=axes, keepdims=True), 1e-6)
      back = (noisy - noisy.mean(axis=axes, keepdims=True)) / spread * deviation + mean
      return config.mix * back + (1 - config.mix) * noisy

    return jax.tree.unflatten(structure, map(fade, leaves, keys))

  return at
