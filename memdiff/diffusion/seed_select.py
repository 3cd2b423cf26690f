"""SeedSelect: initial noise that leads to images like the few real ones of a class.

Samuel et al., "Generating images of rare concepts using pre-trained diffusion models", AAAI 2024:
the noise is moved along the gradient of a loss through the whole sampler. The loss has a semantic
part, the cosine of features of the last three predicted images to the mean of the class, weighted
0.05, 0.25 and 0.7; and an appearance part, the squared distance of the image to the mean image.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from memdiff.config import above, at_least, between, setting

LAST = (0.05, 0.25, 0.7)  # weights of the last predicted images
_FAST = 3  # updates at the full rate; then a tenth

Draw = Callable[[jax.Array], tuple[jax.Array, jax.Array]]  # noise -> (images, last predicted ones)
Loss = Callable[[jax.Array, jax.Array], jax.Array]  # (images, last predicted ones) -> [B]


@dataclasses.dataclass(frozen=True)
class SeedSelectConfig:
  iterations: int = setting(0, "updates of the noise at most; 0: it stays as drawn", at_least(0))
  learning_rate: float = setting(0.1, "of AdamW; a tenth from the fourth update on", above(0))
  semantic: float = setting(10.0, "weight of the distance in features", at_least(0))
  appearance: float = setting(1.0, "weight of the distance in pixels", at_least(0))
  tolerance: float = setting(
    0.01, "an image is done once an update lowers its loss by a smaller share", between(0, 0.99)
  )


def loss_of(
  config: SeedSelectConfig,
  features: Callable[[jax.Array], jax.Array],
  targets: jax.Array,
  references: jax.Array,
) -> Loss:
  """The loss of B images.

  Args:
    config: the weights.
    features: images [B, ...] -> [B, D].
    targets: [B, D] means of features of the class of each, of length one.
    references: [B, ...] mean image of that class.
  """

  def loss(images, predicted):
    semantic = 0.0
    for weight, x0 in zip(LAST, predicted, strict=True):
      found = features(x0)
      length = jnp.maximum(jnp.linalg.norm(found, axis=1), 1e-12)
      semantic += weight * (1 - (found * targets).sum(axis=1) / length)
    axes = tuple(range(1, images.ndim))
    appearance = jnp.square(images - references).mean(axis=axes)
    return config.semantic * semantic + config.appearance * appearance

  return loss


def select(
  config: SeedSelectConfig, draw: Draw, loss: Loss, noise: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The best noise met on the way; every image by itself, until it no longer gains.

  Args:
    config: updates and their rate.
    draw: the sampler, as a function of its initial noise alone.
    loss: of images.
    noise: [B, ...] to begin from.

  Returns:
    (noise [B, ...], losses [iterations + 1, B]; NaN after the last update that was made).
  """
  rate = optax.piecewise_constant_schedule(config.learning_rate, {_FAST: 0.1})
  optimizer = optax.adamw(rate, weight_decay=0.0)

  def measured(noise):
    losses = loss(*draw(noise))
    return losses.sum(), losses

  def expand(rows):
    return rows.reshape(-1, *(1,) * (noise.ndim - 1))

  def going_on(carry):
    return (carry["number"] < config.iterations) & carry["active"].any()

  def update(carry):
    (_, losses), gradient = jax.value_and_grad(measured, has_aux=True)(carry["noise"])
    better = losses < carry["loss"]
    active = carry["active"] & (losses < (1 - config.tolerance) * carry["loss"])
    step, state = optimizer.update(gradient, carry["state"], carry["noise"])
    return {
      "number": carry["number"] + 1,
      "noise": carry["noise"] + jnp.where(expand(active), step, 0),
      "best": jnp.where(expand(better), carry["noise"], carry["best"]),
      "loss": jnp.minimum(losses, carry["loss"]),
      "active": active,
      "state": state,
      "losses": carry["losses"].at[carry["number"]].set(losses),
    }

  rows = noise.shape[0]
  carry = jax.lax.while_loop(going_on, update, {
    "number": jnp.int32(0), "noise": noise, "best": noise, "loss": jnp.full(rows, jnp.inf),
    "active": jnp.ones(rows, bool), "state": optimizer.init(noise),
    "losses": jnp.full((config.iterations + 1, rows), jnp.nan),
  })  # fmt: skip
  _, last = measured(carry["noise"])
  best = jnp.where(expand(last < carry["loss"]), carry["noise"], carry["best"])
  return best, carry["losses"].at[carry["number"]].set(last)
