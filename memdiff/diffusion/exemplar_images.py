"""Exemplars of a class as a condition of the U-Net: images that it may look at.

Every exemplar goes through one small encoder, which leaves a grid of tokens. Feature maps of the
U-Net attend to the tokens of all exemplars of their row, and to a learned one that means "nothing",
so that a row without exemplars is well-defined. The order of exemplars does not matter.
"""

import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from memdiff.convolution import Conv

_GRID = 4  # tokens per side of an exemplar, at most


@flax.struct.dataclass
class ExemplarImages:
  """Up to K images of the class of each of G rows, as the U-Net sees pixels."""

  images: Any  # [G, K, H, W, ch]
  mask: Any  # [G, K] bool, which of them there are

  def forget(self, rows: jax.Array) -> "ExemplarImages":
    """Without exemplars where `rows` [G] is True."""
    return self.replace(mask=self.mask & ~rows[:, None])


@flax.struct.dataclass
class Tokens:
  """What feature maps attend to."""

  values: Any  # [G, N, D]
  mask: Any  # [G, N] bool


class ExemplarEncoder(nn.Module):
  """Exemplars -> Tokens, the first of which is always there; halves the side until it is 4."""

  width: int
  dtype: Any

  @nn.compact
  def __call__(self, exemplars: ExemplarImages) -> Tokens:
    rows, number, side = exemplars.images.shape[:3]
    x = exemplars.images.reshape(rows * number, *exemplars.images.shape[2:])
    x = Conv(self.width, dtype=self.dtype)(x)
    while side > _GRID:
      x = Conv(self.width, stride=2, dtype=self.dtype)(nn.silu(nn.LayerNorm(dtype=self.dtype)(x)))
      side = x.shape[1]
    positions = self.param(
      "positions", nn.initializers.normal(0.02), (x.shape[1] * x.shape[2], self.width)
    )
    x = x.reshape(rows, number, -1, self.width) + positions[None, None]
    x = nn.LayerNorm()(x).reshape(rows, -1, self.width)
    nothing = self.param("nothing", nn.initializers.normal(1.0), (self.width,))
    first = jnp.broadcast_to(nothing[None, None], (rows, 1, self.width))
    mask = jnp.repeat(exemplars.mask, x.shape[1] // number, axis=1)
    return Tokens(
      jnp.concatenate([first, x], axis=1),
      jnp.pad(mask, ((0, 0), (1, 0)), constant_values=True),
    )


class CrossAttention(nn.Module):
  """x [B, H, W, ch] plus what each position finds among the tokens of its row; begins as x."""

  dtype: Any
  norm: Any  # () -> a norm of x

  @nn.compact
  def __call__(self, x: jax.Array, tokens: Tokens) -> jax.Array:
    batch, height, width, dim = x.shape
    dense = functools.partial(nn.Dense, dtype=self.dtype)
    query = dense(dim, name="query")(self.norm()(x).reshape(batch, height * width, dim))
    key, value = (dense(dim, name=name)(tokens.values) for name in ("key", "value"))
    scores = jnp.einsum("bqd,bnd->bqn", query, key).astype(jnp.float32) / jnp.sqrt(dim)
    weights = nn.softmax(jnp.where(tokens.mask[:, None], scores, -jnp.inf))
    found = jnp.einsum("bqn,bnd->bqd", weights.astype(self.dtype), value)
    out = dense(dim, kernel_init=nn.initializers.zeros, name="out")(found)
    return x + out.reshape(x.shape)
