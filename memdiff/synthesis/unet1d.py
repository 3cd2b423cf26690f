"""LDMLR's denoiser: a U-Net over a feature vector read as a sequence of its dimensions.

The architecture of Han et al., "Latent-based diffusion model for long-tailed recognition", 2024,
arXiv 2404.04517: the one-dimensional U-Net of the denoising-diffusion-pytorch package with one
channel, every convolution cut to kernel 1, and a class embedding added to that of time. With
kernel 1 a convolution is a matrix on the channels of each position; positions meet only in group
norms, attention and the strides. None of these knows places: the network commutes with every
permutation of blocks of 2^(levels - 1) positions. Since the noise it starts from is exchangeable,
so are the features that it samples: a class cannot have its own mean in every dimension, only one
for each place within a block. `positions` adds the missing embedding of places.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from memdiff.diffusion.schedules import time_embedding
from memdiff.memory.memory_bank import Memory

GROUPS = 8  # of the group norms
HEADS, HEAD_DIM = 4, 32  # of attention


def pointwise(dim: int, features: int, use_bias: bool = True) -> nn.Dense:
  """A convolution of kernel 1 on `dim` channels, initialised as PyTorch does: U(-1, 1) / sqrt(dim).

  Also PyTorch's linear layer.
  """

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -(dim**-0.5), dim**-0.5)

  return nn.Dense(features, use_bias, kernel_init=init, bias_init=init)


class ResidualBlock(nn.Module):
  """Two pointwise layers with group norm; the first is scaled and shifted by the conditioning."""

  features: int

  @nn.compact
  def __call__(self, x: jax.Array, conditioning: jax.Array) -> jax.Array:
    dim = x.shape[-1]
    modulation = pointwise(conditioning.shape[-1], 2 * self.features)(nn.silu(conditioning))
    scale, shift = jnp.split(modulation[:, None], 2, axis=-1)
    h = nn.GroupNorm(GROUPS, epsilon=1e-5)(pointwise(dim, self.features)(x))
    h = pointwise(self.features, self.features)(nn.silu(h * (1 + scale) + shift))
    h = nn.silu(nn.GroupNorm(GROUPS, epsilon=1e-5)(h))
    return h + (x if dim == self.features else pointwise(dim, self.features)(x))


class RMSNorm(nn.Module):
  """Channels divided by their root mean square, times a learned gain."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    gain = self.param("gain", nn.initializers.ones, (x.shape[-1],))
    length = jnp.sqrt(jnp.maximum(jnp.square(x).sum(axis=-1, keepdims=True), 1e-24))
    return x / length * x.shape[-1] ** 0.5 * gain[None, None]


class ResidualAttention(nn.Module):
  """x plus multi-head attention over positions of the normed x.

  `linear` is efficient attention (Shen et al. 2021): queries are normalised over channels and keys
  over positions, and keys meet values first, which costs no square of the length.
  """

  linear: bool

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    batch, length, dim = x.shape
    inner = HEADS * HEAD_DIM
    joint = pointwise(dim, 3 * inner, use_bias=False)(RMSNorm()(x))
    q, k, v = jnp.split(joint.reshape(batch, length, 3 * HEADS, HEAD_DIM), 3, axis=2)
    if self.linear:
      q, k = nn.softmax(q, axis=-1) * HEAD_DIM**-0.5, nn.softmax(k, axis=1)
      looked_up = jnp.einsum("blhd,bhde->blhe", q, jnp.einsum("blhd,blhe->bhde", k, v))
    else:
      scores = jnp.einsum("bihd,bjhd->bhij", q * HEAD_DIM**-0.5, k)
      looked_up = jnp.einsum("bhij,bjhd->bihd", nn.softmax(scores), v)
    out = pointwise(inner, dim)(looked_up.reshape(batch, length, inner))
    return x + (RMSNorm()(out) if self.linear else out)


class Down(nn.Module):
  """One level on the way down; leaves two skips for the way up."""

  features: int
  halves: bool  # keeps every second position

  @nn.compact
  def __call__(self, x: jax.Array, conditioning: jax.Array):
    dim = x.shape[-1]
    first = ResidualBlock(dim)(x, conditioning)
    second = ResidualAttention(linear=True)(ResidualBlock(dim)(first, conditioning))
    x = second[:, ::2] if self.halves else second
    return pointwise(dim, self.features)(x), (first, second)


class Up(nn.Module):
  """One level on the way up, with the skips of its level."""

  features: int
  doubles: bool  # repeats every position

  @nn.compact
  def __call__(self, x: jax.Array, skips, conditioning: jax.Array) -> jax.Array:
    dim = x.shape[-1]
    for skip in reversed(skips):
      x = ResidualBlock(dim)(jnp.concatenate([x, skip], axis=-1), conditioning)
    x = pointwise(dim, self.features)(ResidualAttention(linear=True)(x))
    return jnp.repeat(x, 2, axis=1) if self.doubles else x


class UNet1D(nn.Module):
  """Class-conditional denoiser of feature vectors; knows no memory.

  Attributes:
    num_classes: C; there is no label for "no class".
    feature_dim: D. Padded with zeros to a multiple of 2^(levels - 1).
    width: channels of the first level, a multiple of GROUPS.
    multipliers: channels of each further width, in widths; the length halves between levels.
    positions: whether every dimension has an embedding of its own.
  """

  num_classes: int
  feature_dim: int
  width: int
  multipliers: tuple[int, ...]
  positions: bool

  @property
  def stride(self) -> int:
    """Features per position of the lowest level."""
    return 2 ** (len(self.multipliers) - 1)

  def setup(self):
    dims = [self.width, *(self.width * m for m in self.multipliers)]
    levels, conditioning = len(self.multipliers), 4 * self.width
    self.class_embedding = nn.Embed(
      self.num_classes, conditioning, embedding_init=nn.initializers.normal(1.0)
    )
    self.time_in = pointwise(self.width, conditioning)
    self.time_out = pointwise(conditioning, conditioning)
    self.entry = pointwise(1, self.width)
    if self.positions:
      length = self.feature_dim + -self.feature_dim % self.stride
      self.place = self.param("place", nn.initializers.normal(1.0), (length, self.width))
    self.down = [Down(dims[i + 1], halves=i + 1 < levels) for i in range(levels)]
    self.middle = [ResidualBlock(dims[-1]), ResidualBlock(dims[-1])]
    self.attend = ResidualAttention(linear=False)
    self.up = [Up(dims[i], doubles=i > 0) for i in reversed(range(levels))]
    self.last = ResidualBlock(self.width)
    self.exit = pointwise(self.width, 1)

  def condition(self, label: jax.Array, memory: Memory) -> jax.Array:
    """label [B] int in [0, num_classes) -> class embeddings [B, 4 width]."""
    del memory
    return self.class_embedding(label)

  def denoise(self, x_t: jax.Array, t: jax.Array, context: jax.Array):
    """x_t [B, D], t [B] in [0, 1000) -> (output [B, D], bottleneck [B, width last multiplier])."""
    time = self.time_in(time_embedding(t, self.width))
    conditioning = self.time_out(nn.gelu(time, approximate=False)) + context
    padding = -self.feature_dim % self.stride
    entry = self.entry(jnp.pad(x_t, ((0, 0), (0, padding)))[:, :, None])
    if self.positions:
      entry = entry + self.place[None]
    x, stack = entry, []
    for level in self.down:
      x, skips = level(x, conditioning)
      stack.append(skips)
    x = self.middle[0](x, conditioning)
    x = bottleneck = self.middle[1](self.attend(x), conditioning)
    for level in self.up:
      x = level(x, stack.pop(), conditioning)
    x = self.last(jnp.concatenate([x, entry], axis=-1), conditioning)
    return self.exit(x)[:, : self.feature_dim, 0], bottleneck.mean(axis=1)

  def __call__(self, x_t: jax.Array, t: jax.Array, label: jax.Array, memory: Memory):
    return self.denoise(x_t, t, self.condition(label, memory))
