"""Sentences as a condition of the U-Net: their embeddings, zeros where nothing is said."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Captioned:
  """A memory and, row by row, the embedding of a sentence that says what the image shows."""

  memory: Any  # as without sentences
  vectors: Any  # [G, D] of length one, or 0 if nothing is said

  def forget(self, rows: jax.Array) -> "Captioned":
    """Without memory and sentence where `rows` [G] is True."""
    memory = self.memory.forget(rows) if self.memory else self.memory
    return Captioned(memory, jnp.where(rows[:, None], 0, self.vectors))


class SentenceLayer(nn.Module):
  """Embeddings [G, D] -> [G, width]; nothing said adds nothing."""

  width: int

  @nn.compact
  def __call__(self, vectors: jax.Array) -> jax.Array:
    # Of length one, their numbers are far smaller than those of time and label.
    x = vectors * jnp.sqrt(jnp.float32(vectors.shape[-1]))
    x = nn.silu(nn.Dense(self.width, use_bias=False)(x))
    return nn.Dense(self.width, use_bias=False)(x)
