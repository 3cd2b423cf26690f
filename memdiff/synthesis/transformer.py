"""A Transformer denoiser of feature vectors, which looks up the class's memory in every block."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from memdiff.diffusion.schedules import time_embedding
from memdiff.memory.memory_bank import Memory
from memdiff.synthesis.denoisers import DenoiserConfig, attend, counted, dense, further, spread


@flax.struct.dataclass
class Context:
  """Conditioning as K + 2 tokens: class, prototype, and the K stored features."""

  start: jax.Array  # [G, W] the part of prototype, count and class embedding in the token of x_t
  keys: jax.Array  # [G, L + 1, K + 2, E] of L blocks and of the last look-up
  values: jax.Array  # [G, L, K + 2, E]
  rows: jax.Array  # [G, K + 2, D] the features that tokens stand for; the class's is zero
  mask: jax.Array  # [G, K + 2] bool


def modulate(h: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
  """Layer norm of h [B, W], scaled and shifted by B rows or one."""
  return jax.nn.standardize(h, epsilon=1e-6) * (1 + scale) + shift


class Block(nn.Module):
  """Attention to the memory and a two-layer MLP, both modulated and gated by the time alone.

  The zero-initialised modulation of DiT (Peebles and Xie 2023, adaLN-Zero): a fresh block passes h
  on.
  """

  config: DenoiserConfig

  @nn.compact
  def __call__(self, h, time, keys, values, mask):
    """h [B, W], time [B or 1, E], keys and values [G, K + 2, E] -> h [B, W]."""
    c = self.config
    modulation = nn.Dense(6 * c.width, kernel_init=nn.initializers.zeros)(time)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = jnp.split(modulation, 6, axis=-1)
    query = nn.DenseGeneral((c.num_heads, c.embedding_dim))(modulate(h, shift, scale))
    found = attend(query, keys, values, mask)
    h = h + gate * dense(c.width)(found.reshape(h.shape[0], -1))
    hidden = nn.silu(dense(c.width)(modulate(h, shift_mlp, scale_mlp)))
    return h + gate_mlp * dense(c.width)(hidden)


class TransformerDenoiser(nn.Module):
  """Denoises feature vectors by attending to tokens of class, prototype and stored features.

  The noised feature is one token, not several patches: the dimensions of a feature vector have no
  order that patches could respect, which exemplars a noised feature resembles is a matter of the
  whole vector, and heads already look up several mixtures of exemplars. What a token narrower than
  the feature cannot carry is added at the end, dimension by dimension: the output is
  `shift + scale x_t + trust m`, the three read off the token, m a mixture of prototype and stored
  features that a last attention picks. Thus a class at a place never seen is no extrapolation.

  Tokens of the memory do not depend on x_t or t, so `condition` makes their keys and values once
  for all steps. The time is no token but modulates the blocks, which costs nothing per sample where
  all have the same. Label `num_classes` means "no class". The order of the slots does not matter.
  """

  num_classes: int
  feature_dim: int
  config: DenoiserConfig

  def setup(self):
    c = self.config
    self.embed_class = nn.Embed(
      self.num_classes + 1, c.embedding_dim, embedding_init=nn.initializers.normal(1.0)
    )
    self.embed_prototype = dense(c.embedding_dim)
    self.embed_exemplar = dense(c.embedding_dim)
    self.to_keys = nn.DenseGeneral((c.num_blocks + 1, c.embedding_dim))
    self.to_values = nn.DenseGeneral((c.num_blocks, c.embedding_dim))
    self.to_start = dense(c.width)
    self.to_width = dense(c.width)
    self.time_mlp = nn.Sequential([dense(c.embedding_dim), nn.silu, dense(c.embedding_dim)])
    self.blocks = [Block(c) for _ in range(c.num_blocks)]
    self.modulation = nn.Dense(2 * c.width, kernel_init=nn.initializers.zeros)
    self.to_query = nn.DenseGeneral((1, c.embedding_dim))
    self.to_output = nn.DenseGeneral((3, self.feature_dim), kernel_init=nn.initializers.zeros)

  def condition(self, label: jax.Array, memory: Memory) -> Context:
    """label [G] int in [0, num_classes], memory of G rows -> Context."""
    parts = [memory.prototype, counted(memory), *further(memory)]
    prototype = jnp.concatenate(parts, axis=-1)
    first = [self.embed_class(label)[:, None], self.embed_prototype(prototype)[:, None]]
    tokens = nn.silu(jnp.concatenate([*first, self.embed_exemplar(memory.slots)], axis=1))
    rows = jnp.concatenate([memory.prototype[:, None], memory.slots], axis=1)
    return Context(
      start=self.to_start(prototype),
      keys=jnp.moveaxis(self.to_keys(tokens), 2, 1),
      values=jnp.moveaxis(self.to_values(tokens), 2, 1),
      rows=jnp.pad(rows, ((0, 0), (1, 0), (0, 0))),
      mask=jnp.pad(memory.mask, ((0, 0), (2, 0)), constant_values=True),
    )

  def denoise(self, x_t: jax.Array, t: jax.Array, context: Context):
    """x_t [B, D], t [B] or [1] in [0, 1000) -> (output [B, D], bottleneck [B, width])."""
    time = nn.silu(self.time_mlp(time_embedding(t, self.config.embedding_dim)))
    h = self.to_width(x_t) + spread(context.start, x_t.shape[0])
    for i, block in enumerate(self.blocks):
      h = block(h, time, context.keys[:, i], context.values[:, i], context.mask)
    token = modulate(h, *jnp.split(self.modulation(time), 2, axis=-1))
    found = attend(self.to_query(token), context.keys[:, -1], context.rows, context.mask)[:, 0]
    shift, scale, trust = jnp.moveaxis(self.to_output(token), 1, 0)
    return shift + scale * x_t + trust * found, h

  def __call__(self, x_t: jax.Array, t: jax.Array, label: jax.Array, memory: Memory):
    return self.denoise(x_t, t, self.condition(label, memory))
