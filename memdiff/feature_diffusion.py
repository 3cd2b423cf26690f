"""Feature diffusion: the diffusion engine's stage on the encoder's features and the memory bank."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from memdiff import memory_bank
from memdiff.diffusion import training
from memdiff.diffusion.denoisers import MLPDenoiser
from memdiff.diffusion.training import Batch, DiffusionConfig
from memdiff.memory_bank import Memory, MemoryBank
from memdiff.runtime.loop import Stage
from memdiff.runtime.mesh import replicate
from memdiff.runtime.random import stream


@flax.struct.dataclass
class FeatureData:
  """One seed's standardised training features and its bank in the same units."""

  features: Any  # [N, D]
  bank: MemoryBank


def draw_probabilities(train_counts: np.ndarray, exponent: float) -> np.ndarray:
  """Probability of drawing each class, n^exponent / sum: 1 as in the data, 0 balanced."""
  weights = np.where(train_counts > 0, np.maximum(train_counts, 1) ** exponent, 0.0)
  return weights / weights.sum()


@flax.struct.dataclass
class Deck:
  """The training set as a draw pile: a class first, then one of its members."""

  labels: Any  # [N] int32
  by_class: Any  # [N] int32, indices of the training set in order of class
  first: Any  # [C] int32, where each class begins in `by_class`
  counts: Any  # [C] int32
  cumulative: Any  # [C] float32, cumulated probability of the classes


def make_deck(labels: np.ndarray, num_classes: int, exponent: float) -> Deck:
  counts = np.bincount(labels, minlength=num_classes)
  return Deck(
    labels=labels,
    by_class=np.argsort(labels, kind="stable").astype(np.int32),
    first=(np.cumsum(counts) - counts).astype(np.int32),
    counts=counts.astype(np.int32),
    cumulative=np.cumsum(draw_probabilities(counts, exponent)).astype(np.float32),
  )


def draw_indices(key: jax.Array, deck: Deck, batch_size: int) -> jax.Array:
  """Indices of training examples drawn with replacement. [B] int32."""
  class_key, member_key = jax.random.split(key)
  # Below the last cumulated value, so that rounding cannot pick a class of no probability.
  u = jax.random.uniform(class_key, (batch_size,), maxval=deck.cumulative[-1])
  label = jnp.searchsorted(deck.cumulative, u, side="right")
  member = jax.random.randint(member_key, (batch_size,), 0, deck.counts[label])
  return deck.by_class[deck.first[label] + member]


def draw_batch(
  key: jax.Array,
  deck: Deck,
  own: FeatureData,
  config: DiffusionConfig,
  num_classes: int,
  mesh: Mesh,
) -> Batch:
  """A batch of features of all classes, each with its class's memory, itself left out.

  Args:
    key: of the step.
    deck: the labels, ready to draw from.
    own: features and bank of the seed.
    config: batch size; `label_dropout` is the share of rows without label and memory (the
      unconditional model of guidance), `anonymous` the share of the others without label: what the
      denoiser knows of those classes it must take from their exemplars.
    num_classes: C, also the label that means "no class".
    mesh: of the bank.
  """
  pick, thin, drop, hide = (stream(key, name) for name in ("pick", "thin", "drop", "hide"))
  index = draw_indices(pick, deck, config.batch_size)
  x0, label = own.features[index], deck.labels[index]
  memory = memory_bank.read(own.bank, label, mesh=mesh)
  memory = memory_bank.thin_out(memory_bank.leave_one_out(memory, x0), thin)
  dropped = jax.random.bernoulli(drop, config.label_dropout, label.shape)
  hidden = jax.random.bernoulli(hide, config.anonymous, label.shape) & ~dropped
  movable = hidden & (memory.count > 0)
  x0, memory = displace(stream(key, "displace"), x0, memory, movable, config.displacement)
  return Batch(
    x0=x0,
    label=jnp.where(dropped | hidden, num_classes, label),
    memory=memory_bank.forget(memory, dropped),
  )


def displace(key: jax.Array, x0: jax.Array, memory: Memory, chosen: jax.Array, strength: float):
  """Moves chosen features together with their memories, as if they were classes never seen.

  A denoiser that meets the same few exemplars of a tail class again and again learns them by
  heart. A moved class it cannot know: it has to read place and spread off the exemplars, and learns
  from the large classes how members scatter around few exemplars. Each row moves by `strength`
  times a standard normal number times the difference of two prototypes out of the batch, so that it
  stays in the directions in which classes differ.

  Args:
    key: randomness.
    x0: [B, D] features.
    memory: of B rows.
    chosen: [B] bool, the rows to move; their memories must not be empty.
    strength: 0 moves nothing.

  Returns:
    (x0, memory), moved.
  """
  first, second, size = jax.random.split(key, 3)
  a = jax.random.permutation(first, memory.prototype)
  b = jax.random.permutation(second, memory.prototype)
  amount = strength * jax.random.normal(size, chosen.shape) * chosen
  shift = amount[:, None] * (a - b)
  return x0 + shift, memory.replace(
    prototype=memory.prototype + shift,
    slots=jnp.where(memory.mask[:, :, None], memory.slots + shift[:, None], memory.slots),
  )


def make_denoiser(config: DiffusionConfig, num_classes: int, feature_dim: int) -> MLPDenoiser:
  return MLPDenoiser(num_classes, feature_dim, config.denoiser)


def make_stage(
  config: DiffusionConfig,
  own: FeatureData,
  labels: np.ndarray,
  num_classes: int,
  mesh: Mesh,
) -> Stage:
  """The stage that trains the memory-conditioned denoiser; `own` leads with seeds."""
  deck = replicate(mesh, make_deck(labels, num_classes, config.class_exponent))
  denoiser = make_denoiser(config, num_classes, own.features.shape[-1])

  def draw(key, deck, own):
    return draw_batch(key, deck, own, config, num_classes, mesh)

  return training.make_stage(config, denoiser, draw, deck, own, mesh)
