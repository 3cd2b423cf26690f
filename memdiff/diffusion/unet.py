"""The U-Net of DDPM (Ho et al. 2020, appendix B) as a denoiser of images.

Residual blocks with group norm at several sides, each half of the last, attention at some of them,
skips from the way down to the way up. Time and label are embedded, added, and shift every block. It
is a denoiser as the engine trains it: `condition(label, memory)` is what does not change from step
to step, and the bottleneck is the mean over positions of the middle's output. With the defaults and
32 x 32 pixels it has 35.75 million parameters. On request it also attends to exemplars of the class
(`exemplar_images`), in the middle and wherever it attends to itself, reads a sentence
(`text_condition`) that is added to time and label, and the kernels of the way up have a low-rank
part that can be left out, the reserve of Capacity Manipulation.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from memdiff.config import above, at_least, between, each, each_if_any, one_of, setting
from memdiff.convolution import conv2d
from memdiff.diffusion.exemplar_images import CrossAttention, ExemplarEncoder
from memdiff.diffusion.schedules import time_embedding
from memdiff.diffusion.text_condition import SentenceLayer

DTYPES = ("float32", "bfloat16")
_GROUPS, _PER_GROUP = 32, 4  # of group norm: groups at most, channels in one at least


@dataclasses.dataclass(frozen=True)
class ReserveConfig:
  """The low-rank part of kernels that Capacity Manipulation keeps for rare classes."""

  rank_ratio: float = setting(
    0.0, "rank over the fewer channels of a kernel, published as 0.1; 0: none", between(0, 1)
  )
  scale: float = setting(1.0, "of the low-rank part in the kernel, published as 0.5", above(0))


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
  reserve: ReserveConfig = setting(ReserveConfig(), "Capacity Manipulation: kept for rare classes")


def check_side(config: UNetConfig, side: int) -> None:
  """Raises ValueError if images of `side` pixels cannot be halved as often as there are levels."""
  factor = 2 ** (len(config.multipliers) - 1)
  if side % factor:
    raise ValueError(
      f"images are {side} pixels wide, but {len(config.multipliers)} levels need a multiple of"
      f" {factor}; leave out multipliers or resize the images."
    )


@flax.struct.dataclass
class Augmented:
  """A memory and, row by row, numbers that say how the images were changed; 0 if they were not."""

  memory: Any
  vector: Any  # [G, A]


@flax.struct.dataclass
class Descent:
  """What the way up goes on from."""

  h: Any  # of the middle
  skips: Any  # of the way down, in order
  told: Any  # of time and label
  tokens: Any  # of exemplars, or None


class UNet(nn.Module):
  """Denoises images [B, H, W, ch]; label `num_classes` means "no class".

  With `sees_exemplars`, the memory is an ExemplarImages; otherwise it is ignored. With
  `reads_text`, it is wrapped in a Captioned. In training it may also be wrapped in an Augmented; if
  it is not, the images count as unaugmented.
  """

  num_classes: int
  image_channels: int
  config: UNetConfig
  sees_exemplars: bool = False
  reads_text: bool = False

  def setup(self):
    c = self.config
    widths = [c.channels * m for m in c.multipliers]
    block = functools.partial(_Block, dropout=c.dropout, dtype=jnp.dtype(c.dtype))
    conv = functools.partial(_Conv, dtype=jnp.dtype(c.dtype))
    self.label_embedding = nn.Embed(self.num_classes + 1, 4 * c.channels)
    self.time_mlp = nn.Sequential([nn.Dense(4 * c.channels), nn.silu, nn.Dense(4 * c.channels)])
    self.augment_embedding = nn.Dense(4 * c.channels, use_bias=False)
    self.first = conv(c.channels)
    self.down = [[block(width) for _ in range(c.num_blocks)] for width in widths]
    self.shrink = [conv(width, stride=2) for width in widths[:-1]]
    self.middle = [block(widths[-1]) for _ in range(2)]
    risen = functools.partial(block, reserve=c.reserve)
    self.up = [[risen(width) for _ in range(c.num_blocks + 1)] for width in reversed(widths)]
    self.grow = [conv(width, reserve=c.reserve) for width in reversed(widths[1:])]
    self.attend_down = [[_Attention(jnp.dtype(c.dtype)) for _ in level] for level in self.down]
    self.attend_middle = _Attention(jnp.dtype(c.dtype))
    self.attend_up = [[_Attention(jnp.dtype(c.dtype)) for _ in level] for level in self.up]
    if self.reads_text:
      self.sentence_layer = SentenceLayer(4 * c.channels)
    if self.sees_exemplars:
      cross = functools.partial(CrossAttention, jnp.dtype(c.dtype))
      self.encode_exemplars = ExemplarEncoder(widths[-1], jnp.dtype(c.dtype))
      self.look_down = [[cross(functools.partial(_norm, w)) for _ in level]
                        for w, level in zip(widths, self.down, strict=True)]  # fmt: skip
      self.look_middle = cross(functools.partial(_norm, widths[-1]))
      self.look_up = [[cross(functools.partial(_norm, w)) for _ in level]
                      for w, level in zip(reversed(widths), self.up, strict=True)]  # fmt: skip
    self.norm = _norm(widths[0])
    self.last = conv(self.image_channels, zero=True)

  def condition(self, label: jax.Array, memory: Any) -> tuple[jax.Array, Any]:
    """label [G] int in [0, num_classes] -> ([G, 4 channels], Tokens of G rows or None)."""
    told = self.label_embedding(label)
    if isinstance(memory, Augmented):
      told, memory = told + self.augment_embedding(memory.vector), memory.memory
    if self.reads_text:
      told, memory = told + self.sentence_layer(memory.vectors), memory.memory
    return told, self.encode_exemplars(memory) if self.sees_exemplars else None

  def denoise(self, x_t: jax.Array, t: jax.Array, context: tuple[jax.Array, Any]):
    """x_t [B, H, W, ch], t [B] or [1] in [0, 1000) -> (output like x_t, bottleneck [B, width]).

    Each row of the context conditions B / G rows of x_t in a row.
    """
    descent, bottleneck = self._descend(x_t, t, context)
    return self.ascend(descent), bottleneck

  def descend(
    self, x_t: jax.Array, t: jax.Array, label: jax.Array, memory: Any
  ) -> tuple[Descent, jax.Array]:
    """The first half of a call: (Descent, bottleneck [B, width])."""
    return self._descend(x_t, t, self.condition(label, memory))

  def _descend(self, x_t, t, context) -> tuple[Descent, jax.Array]:
    times = x_t.shape[0] // context[0].shape[0]
    label, tokens = jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), context)
    told = nn.silu(self.time_mlp(time_embedding(t, self.config.channels)) + label)
    h = self.first(x_t)
    skips = [h]
    for level, blocks in enumerate(self.down):
      for number, block in enumerate(blocks):
        h = self._attended(block(h, told), tokens, "down", level, number)
        skips.append(h)
      if level < len(self.shrink):
        h = self.shrink[level](h)
        skips.append(h)
    h = self.attend_middle(self.middle[0](h, told))
    if tokens is not None:
      h = self.look_middle(h, tokens)
    h = self.middle[1](h, told)
    return Descent(h, skips, told, tokens), h.astype(jnp.float32).mean(axis=(1, 2))

  def ascend(self, descent: Descent, reserved: bool = True) -> jax.Array:
    """The second half of a call: the output, with the reserve in its kernels or without."""
    h, skips = descent.h, list(descent.skips)
    for level, blocks in enumerate(self.up):
      for number, block in enumerate(blocks):
        h = block(jnp.concatenate([h, skips.pop()], axis=-1), descent.told, reserved)
        h = self._attended(h, descent.tokens, "up", level, number)
      if level < len(self.grow):
        h = self.grow[level](_doubled(h), reserved)
    return self.last(nn.silu(self.norm(h))).astype(jnp.float32)

  def __call__(self, x_t: jax.Array, t: jax.Array, label: jax.Array, memory: Any):
    return self.denoise(x_t, t, self.condition(label, memory))

  def _attended(self, h: jax.Array, tokens: Any, way: str, level: int, number: int) -> jax.Array:
    """After attention to itself and to exemplars, at the sides that have it."""
    if h.shape[1] not in self.config.attention:
      return h
    h = getattr(self, f"attend_{way}")[level][number](h)
    if tokens is None:
      return h
    return getattr(self, f"look_{way}")[level][number](h, tokens)


def _doubled(x: jax.Array) -> jax.Array:
  """Every pixel of [B, H, W, ch] twice in both directions, by a copy rather than a gather."""
  batch, height, width, channels = x.shape
  copies = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
  return copies.reshape(batch, 2 * height, 2 * width, channels)


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
  reserve: ReserveConfig = ReserveConfig()

  @nn.compact
  def __call__(self, x: jax.Array, reserved: bool = True) -> jax.Array:
    init = nn.initializers.zeros if self.zero else nn.initializers.variance_scaling(
      1.0, "fan_avg", "uniform"
    )  # fmt: skip
    kernel = self.param("kernel", init, (3, 3, x.shape[-1], self.width))
    bias = self.param("bias", nn.initializers.zeros, (self.width,))
    if self.reserve.rank_ratio and reserved:
      kernel = kernel + self.reserve.scale * self._low_rank(x.shape[-1])
    y = conv2d(x.astype(self.dtype), kernel.astype(self.dtype), self.stride)
    return y + bias.astype(self.dtype)[None, None, None]

  def _low_rank(self, channels: int) -> jax.Array:
    """A kernel of low rank as a matrix, (row, out) by (column, in); it begins as nothing."""
    rank = 3 * max(int(self.reserve.rank_ratio * min(channels, self.width)), 1)
    init = nn.initializers.variance_scaling(1 / 3, "fan_in", "normal", in_axis=(1, 2), out_axis=0)
    inner = self.param("reserve_in", init, (rank, 3, channels))
    outer = self.param("reserve_out", nn.initializers.zeros, (3, self.width, rank))
    return jnp.einsum("hom,mwi->hwio", outer, inner)


class _Block(nn.Module):
  """Two convolutions beside a shortcut, shifted in between by what is told of time and label."""

  width: int
  dropout: float
  dtype: Any
  reserve: ReserveConfig = ReserveConfig()

  @nn.compact
  def __call__(self, x: jax.Array, told: jax.Array, reserved: bool = True) -> jax.Array:
    conv = functools.partial(_Conv, self.width, dtype=self.dtype, reserve=self.reserve)
    h = conv()(nn.silu(_norm(x.shape[-1])(x)), reserved)
    h = h + nn.Dense(self.width, dtype=self.dtype)(told)[:, None, None]
    h = nn.silu(_norm(self.width)(h))
    h = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(h)
    h = conv(zero=True)(h, reserved)
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
