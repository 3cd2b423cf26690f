"""Noise schedules, and the forward process they define.

Notation of Ho et al., "Denoising diffusion probabilistic models", 2020 (DDPM): t = 0, ..., T - 1 is
the index of a step, x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps with abar_t the product of
1 - beta up to and including step t. `x` may have any shape [B, ...].
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from memdiff.config import at_least, one_of, setting


def linear_betas(num_steps: int) -> np.ndarray:
  """DDPM's linear schedule, 1e-4 to 0.02 at T = 1000, scaled by 1000 / T at other lengths."""
  scale = 1000 / num_steps
  return np.minimum(np.linspace(1e-4 * scale, 0.02 * scale, num_steps), 0.999)


def cosine_betas(num_steps: int, offset: float = 0.008) -> np.ndarray:
  """Nichol and Dhariwal, "Improved denoising diffusion probabilistic models", 2021, eq. 17."""
  t = np.arange(num_steps + 1) / num_steps
  level = np.cos((t + offset) / (1 + offset) * np.pi / 2) ** 2
  return np.minimum(1 - level[1:] / level[:-1], 0.999)


SCHEDULES = {"linear": linear_betas, "cosine": cosine_betas}


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
  name: str = setting("cosine", "the noise schedule", one_of(SCHEDULES))
  num_steps: int = setting(1000, "T, the steps of the diffusion", at_least(2))


class NoiseSchedule:
  """The table of abar_t, in float64 on the host and float32 inside jit."""

  def __init__(self, config: ScheduleConfig):
    betas = SCHEDULES[config.name](config.num_steps)
    self.num_steps = config.num_steps
    self.alphas = 1 - betas  # [T] float64
    self.alphas_bar = np.cumprod(self.alphas)  # [T] float64, decreasing from about 1 to about 0

  def noise(self, x0: jax.Array, t: jax.Array, eps: jax.Array) -> jax.Array:
    """Draws x_t given x_0 [B, ...], step indices t [B] and standard normal eps [B, ...]."""
    signal, noise = self.scales(t, x0)
    return signal * x0 + noise * eps

  def scales(self, t: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sqrt(abar_t), sqrt(1 - abar_t)) for t [B], shaped to broadcast against x [B, ...]."""
    signal = jnp.asarray(np.sqrt(self.alphas_bar), jnp.float32)[t]
    noise = jnp.asarray(np.sqrt(1 - self.alphas_bar), jnp.float32)[t]
    return expand(signal, x), expand(noise, x)


def expand(values: jax.Array, x: jax.Array) -> jax.Array:
  """[B] -> [B, 1, ...] with as many axes as `x`."""
  return values.reshape(values.shape + (1,) * (x.ndim - values.ndim))


def time_embedding(t: jax.Array, dim: int, max_period: float = 10_000.0) -> jax.Array:
  """Sinusoidal embedding (Vaswani et al. 2017). t [N] in [0, 1000) -> [N, dim], dim even."""
  frequencies = jnp.exp(-jnp.log(max_period) * jnp.arange(dim // 2) / (dim // 2))
  angles = t.astype(jnp.float32)[:, None] * frequencies[None]
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
