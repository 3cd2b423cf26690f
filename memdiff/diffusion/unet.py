"""The U-Net of DDPM (Ho et al. 2020, appendix B) as a denoiser of images.

Residual blocks with group norm at several sides, each half of the last, attention at some of them,
skips from the way down to the way up. Time and label are embedded, added, and shift every block. It
is a denoiser as the engine trains it: `condition(label, memory)` is what does not change from step
to step, and the bottleneck is the mean over positions of the middle's output. With the defaults and
32 x 32 pixels it has 35.75 million parameters.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from memdiff.config import at_least, between, each, each_if_any, one_of, setting
from memdiff.diffusion.schedules import time_embedding

DTYPES = ("float32", "bfloat16")
_GROUPS, _PER_GROUP = 32, 4  # of group norm: groups at most, channels in one at least


@dataclasses.dataclass(frozen=True)
class UNetConfig:
  channels: int = setting(128, "of the first convolution", at_least(4))
  multipliers: tuple[int, ...] = setting(
    (1, 2, 2, 2), "channels per level, times `channels`", each(lambda m: m >= 1, "numbers from 1")
  )
  num_blocks: int = setting(2, "residual blocks per level", at_least(1))
  attention: tuple[int, ...] = setting(
    (16,), "sides in pixels with attention", each_if_any(lambda s: s >= 1, "numbers from 1")
  )
  dropout: float = setting(0.1, "share of units dropped in training", between(0, 0.9))
  dtype: str = setting("float32", "of the computation; weights are float32", one_of(DTYPES))


def check_side(config: UNetConfig, side: int) -> None:
  """Raises ValueError if images of `side` pixels cannot be halved as often as there are levels."""
  factor = 2 ** (len(config.multipliers) - 1)
  if side % factor:
    raise ValueError(
      f"images are {side} pixels wide, but {len(config.multipliers)} levels need a multiple of"
      f" {factor}; leave out multipliers or resize the images."
    )


class UNet(nn.Module):
  """Denoises images [B, H, W, ch]; label `num_classes` means "no class"."""

  num_classes: int
  image_channels: int
  config: UNetConfig

  def setup(self):
    c = self.config
    widths = [c.channels * m for m in c.multipliers]
    block = functools.partial(_Block, dropout=c.dropout, dtype=jnp.dtype(c.dtype))
    conv = functools.partial(_Conv, dtype=jnp.dtype(c.dtype))
    self.label_embedding = nn.Embed(self.num_classes + 1, 4 * c.channels)
    self.time_mlp = nn.Sequential([nn.Dense(4 * c.channels), nn.silu, nn.Dense(4 * c.channels)])
    self.first = conv(c.channels)
    self.down = [[block(width) for _ in range(c.num_blocks)] for width in widths]
    self.shrink = [conv(width, stride=2) for width in widths[:-1]]
    self.middle = [block(widths[-1]) for _ in range(2)]
    self.up = [[block(width) for _ in range(c.num_blocks + 1)] for width in reversed(widths)]
    self.grow = [conv(width) for width in reversed(widths[1:])]
    self.attend_down = [[_Attention(jnp.dtype(c.dtype)) for _ in level] for level in self.down]
    self.attend_middle = _Attention(jnp.dtype(c.dtype))
    self.attend_up = [[_Attention(jnp.dtype(c.dtype)) for _ in level] for level in self.up]
    self.norm = _norm(c.channels)
    self.last = conv(self.image_channels, zero=True)

  def condition(self, label: jax.Array, memory: Any) -> jax.Array:
    """label [G] int in [0, num_classes] -> [G, 4 channels]; a memory is not looked at."""
    del memory
    return self.label_embedding(label)

  def denoise(self, x_t: jax.Array, t: jax.Array, context: jax.Array):
    """x_t [B, H, W, ch], t [B] or [1] in [0, 1000) -> (output like x_t, bottleneck [B, width]).

    Each row of the context conditions B / G rows of x_t in a row.
    """
    context = jnp.repeat(context, x_t.shape[0] // context.shape[0], axis=0)
    told = nn.silu(self.time_mlp(time_embedding(t, self.config.channels)) + context)
    h = self.first(x_t)
    skips = [h]
    for level, blocks in enumerate(self.down):
      for block, attend in zip(blocks, self.attend_down[level], strict=True):
        h = self._attended(block(h, told), attend)
        skips.append(h)
      if level < len(self.shrink):
        h = self.shrink[level](h)
        skips.append(h)
    h = self.attend_middle(self.middle[0](h, told))
    h = self.middle[1](h, told)
    bottleneck = h.astype(jnp.float32).mean(axis=(1, 2))
    for level, blocks in enumerate(self.up):
      for block, attend in zip(blocks, self.attend_up[level], strict=True):
        h = self._attended(block(jnp.concatenate([h, skips.pop()], axis=-1), told), attend)
      if level < len(self.grow):
        h = self.grow[level](h.repeat(2, axis=1).repeat(2, axis=2))
    return self.last(nn.silu(self.norm(h))).astype(jnp.float32), bottleneck

  def __call__(self, x_t: jax.Array, t: jax.Array, label: jax.Array, memory: Any):
    return self.denoise(x_t, t, self.condition(label, memory))

  def _attended(self, h: jax.Array, attend: nn.Module) -> jax.Array:
    return attend(h) if h.shape[1] in self.config.attention else h


def _norm(width: int) -> nn.GroupNorm:
  # A channel alone in its group would lose what time and label add to it.
  most = max(min(_GROUPS, width // _PER_GROUP), 1)
  groups = next(n for n in range(most, 0, -1) if width % n == 0)
  return nn.GroupNorm(groups, epsilon=1e-6)


class _Conv(nn.Module):
  """3x3; with `zero` it begins as nothing, so that residual branches do."""

  width: int
  stride: int = 1
  zero: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    init = nn.initializers.zeros if self.zero else nn.initializers.variance_scaling(
      1.0, "fan_avg", "uniform"
    )  # fmt: skip
    # Padded like PyTorch's padding=1, whatever the stride.
    return nn.Conv(
      self.width, (3, 3), self.stride, ((1, 1), (1, 1)), kernel_init=init, dtype=self.dtype
    )(x)


class _Block(nn.Module):
  """Two convolutions beside a shortcut, shifted in between by what is told of time and label."""

  width: int
  dropout: float
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, told: jax.Array) -> jax.Array:
    h = _Conv(self.width, dtype=self.dtype)(nn.silu(_norm(x.shape[-1])(x)))
    h = h + nn.Dense(self.width, dtype=self.dtype)(told)[:, None, None]
    h = nn.silu(_norm(self.width)(h))
    h = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(h)
    h = _Conv(self.width, zero=True, dtype=self.dtype)(h)
    if x.shape[-1] != self.width:
      x = nn.Dense(self.width, dtype=self.dtype, name="shortcut")(x)
    return x + h


class _Attention(nn.Module):
  """x plus attention with one head over all positions of the normed x."""

  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    batch, height, width, dim = x.shape
    rows = _norm(dim)(x).reshape(batch, height * width, dim)
    query, key, value = (
      nn.Dense(dim, dtype=self.dtype, name=name)(rows)[:, :, None]
      for name in ("query", "key", "value")
    )
    found = nn.dot_product_attention(query, key, value)[:, :, 0]
    out = nn.Dense(dim, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="out")(found)
    return x + out.reshape(x.shape)
