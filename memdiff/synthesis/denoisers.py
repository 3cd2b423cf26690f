"""Denoisers: Flax modules `(x_t, t, label, memory) -> (prediction, bottleneck)`.

`condition(label, memory)` holds all that does not depend on x_t or t; a sampler calls it once and
`denoise(x_t, t, context)` at every step. `__call__` is the two in a row. Arrays of a context lead
with its G rows; each conditions B / G rows of x_t in a row, so that a sampler encodes and reads a
class's memory once for several samples. A sampler gives one time [1] for all rows, so that what
depends on the time alone is computed once per step; training gives each row its own time [B] and
context (G = B).
"""

import dataclasses
import functools
import math

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from memdiff.config import at_least, one_of, setting
from memdiff.diffusion.schedules import time_embedding
from memdiff.memory.memory_bank import Memory
from memdiff.runtime.random import kernel_normal, normal

dense = functools.partial(nn.Dense, kernel_init=kernel_normal)

NAMES = ("mlp", "transformer")


@dataclasses.dataclass(frozen=True)
class DenoiserConfig:
  name: str = setting("mlp", "the kind of network", one_of(NAMES))
  width: int = setting(256, "hidden units", at_least(1))
  num_blocks: int = setting(3, "residual blocks", at_least(1))
  embedding_dim: int = setting(
    64, "of time; mlp: of class and conditions too; transformer: of an attention head", at_least(4)
  )
  num_heads: int = setting(4, "of the attention over stored features", at_least(1))

  def __post_init__(self):
    if self.embedding_dim % 2:
      raise ValueError(f"embedding_dim is {self.embedding_dim}, but must be even.")


@flax.struct.dataclass
class Context:
  """Conditioning: all that does not change from step to step."""

  summary: jax.Array  # [G, E + D + 2 ...] label embedding, prototype, count, class embedding
  keys: jax.Array  # [G, K + 1, D] the stored features; row 0 is a learned "nothing known"
  values: jax.Array  # [G, K + 1, D] the same with another row 0
  mask: jax.Array  # [G, K + 1] bool


def spread(rows: jax.Array, batch: int) -> jax.Array:
  """[G, ...] -> [B, ...]: every row B / G times in a row; a single one stays as it is."""
  number = rows.shape[0]
  return rows if number == 1 else jnp.repeat(rows, batch // number, axis=0)


def attend(query: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
  """Scaled dot-product attention whose heads share keys and values (Shazeer 2019, multi-query).

  Args:
    query: [B, H, E].
    keys: [G, K, E], each row for B / G queries in a row.
    values: [G, K, V].
    mask: [G, K] bool, True if there is something.

  Returns:
    [B, H, V].
  """
  batch, num_heads, dim = query.shape
  query = query.reshape(keys.shape[0], -1, dim)
  scores = jnp.einsum("gqe,gke->gqk", query, keys) / jnp.sqrt(dim)
  weights = nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf))
  return jnp.einsum("gqk,gkv->gqv", weights, values).reshape(batch, num_heads, -1)


def counted(memory: Memory) -> jax.Array:
  """The log-count of the exemplars, and whether there are any. [G, 2]."""
  present = (memory.count > 0).astype(jnp.float32)
  return jnp.stack([jnp.log1p(memory.count), present], axis=-1)


def further(memory: Memory) -> list[jax.Array]:
  """The embeddings of the classes: one array [G, E], or none."""
  return [] if memory.class_embeddings is None else [memory.class_embeddings]


class Affine(nn.Module):
  """`nn.DenseGeneral` of the concatenation of several inputs [B, ...], some with fewer rows.

  A part of fewer rows is multiplied before it is spread over the batch. Parameters, and the result
  if all parts have B rows, are those of the dense layer on the concatenated inputs.
  """

  features: tuple[int, ...]

  @nn.compact
  def __call__(self, *parts: jax.Array) -> jax.Array:
    sizes = [part.shape[-1] for part in parts]
    batch = max(part.shape[0] for part in parts)
    kernel = self.param("kernel", self._draw_kernel, (sum(sizes), *self.features))
    bias = self.param("bias", nn.initializers.zeros, self.features)
    if len({part.shape[0] for part in parts}) == 1:
      products = [jnp.tensordot(jnp.concatenate(parts, axis=-1), kernel, 1)]
    else:
      blocks = jnp.split(kernel, np.cumsum(sizes)[:-1])
      products = [
        spread(jnp.tensordot(part, block, 1), batch)
        for part, block in zip(parts, blocks, strict=True)
      ]
    return sum(products) + bias[None]

  @staticmethod
  def _draw_kernel(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """LeCun's normal, with the number of inputs as fan-in."""
    return kernel_normal(key, (shape[0], math.prod(shape[1:]))).reshape(shape)


class ModulatedBlock(nn.Module):
  """Residual MLP block whose layer norm is scaled and shifted by the conditioning."""

  width: int

  @nn.compact
  def __call__(self, h: jax.Array, conditioning: jax.Array) -> jax.Array:
    scale, shift = jnp.split(dense(2 * self.width)(conditioning), 2, axis=-1)
    y = nn.LayerNorm(use_scale=False, use_bias=False)(h) * (1 + scale) + shift
    y = dense(self.width)(nn.silu(dense(self.width)(y)))
    return h + y


class MLPDenoiser(nn.Module):
  """Denoises feature vectors, conditioned on time, class and the class's memory.

  The noised feature is concatenated with the class embedding, the prototype, the log-count of the
  exemplars it averages, and the embedding of the class. The stored exemplars themselves are
  keys and values of an attention whose queries, one per head, are made of all these and the time:
  each head looks up a weighted mean of exemplars. Label `num_classes` means "no class". The order
  of the slots does not matter.
  """

  num_classes: int
  feature_dim: int
  config: DenoiserConfig

  def setup(self):
    c, dim = self.config, self.feature_dim
    self.class_embedding = nn.Embed(self.num_classes + 1, c.embedding_dim)
    self.nothing = self.param("nothing", normal, (2, dim))
    self.time_mlp = nn.Sequential([dense(c.embedding_dim), nn.silu, dense(c.embedding_dim)])
    self.to_query = Affine((c.num_heads, dim))
    self.to_width = Affine((c.width,))
    self.to_conditioning = Affine((c.embedding_dim,))
    self.blocks = [ModulatedBlock(c.width) for _ in range(c.num_blocks)]
    self.norm = nn.LayerNorm()
    self.to_output = nn.Dense(dim, kernel_init=nn.initializers.zeros)

  def condition(self, label: jax.Array, memory: Memory) -> Context:
    """label [G] int in [0, num_classes], memory of G rows -> Context."""
    number = label.shape[0]
    parts = [self.class_embedding(label), memory.prototype, counted(memory)]
    summary = jnp.concatenate(parts + further(memory), axis=-1)
    nothing = jnp.broadcast_to(self.nothing[:, None, None], (2, number, 1, self.feature_dim))
    return Context(
      summary=summary,
      keys=jnp.concatenate([nothing[0], memory.slots], axis=1),
      values=jnp.concatenate([nothing[1], memory.slots], axis=1),
      mask=jnp.pad(memory.mask, ((0, 0), (1, 0)), constant_values=True),
    )

  def denoise(self, x_t: jax.Array, t: jax.Array, context: Context):
    """x_t [B, D], t [B] or [1] in [0, 1000) -> (output [B, D], bottleneck [B, width])."""
    time = self.time_mlp(time_embedding(t, self.config.embedding_dim))
    joint = (x_t, context.summary, time)
    attended = attend(self.to_query(*joint), context.keys, context.values, context.mask)
    joint = (*joint, attended.reshape(attended.shape[0], -1))
    conditioning = nn.silu(self.to_conditioning(*joint))
    h = self.to_width(*joint)
    for block in self.blocks:
      h = block(h, conditioning)
    return self.to_output(self.norm(h)), h

  def __call__(self, x_t: jax.Array, t: jax.Array, label: jax.Array, memory: Memory):
    return self.denoise(x_t, t, self.condition(label, memory))
