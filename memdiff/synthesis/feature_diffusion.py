"""Feature diffusion: the diffusion engine's stage on the encoder's features and the memory bank."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from input_pipeline.batches import draw_labels, draw_members, draw_probabilities, group_by_class
from memdiff.config import at_least, between, one_of, setting
from memdiff.diffusion import denoiser_training, objectives, terms
from memdiff.diffusion.denoiser_training import Batch, TrainingConfig
from memdiff.memory import memory_bank
from memdiff.memory.exemplars import Exemplars
from memdiff.memory.memory_bank import Memory, MemoryBank
from memdiff.runtime.loop import Stage
from memdiff.runtime.mesh import replicate
from memdiff.runtime.random import stream
from memdiff.synthesis.denoisers import DenoiserConfig, MLPDenoiser
from memdiff.synthesis.transformer import TransformerDenoiser

CONDITIONS = ("class_and_memory", "memory", "class")
DESCRIBED = "description_and_memory"  # the class embedding takes the place of the label
DENOISERS = {"mlp": MLPDenoiser, "transformer": TransformerDenoiser}


@dataclasses.dataclass(frozen=True)
class DiffusionConfig(TrainingConfig):
  """The engine's settings, the denoiser's, and what a batch is made of."""

  denoiser: DenoiserConfig = setting(DenoiserConfig(), "the network")
  condition: str = setting("class_and_memory", "what the denoiser is told", one_of(CONDITIONS))
  class_exponent: float = setting(
    0.5, "classes are drawn by count^this: 1 as they are, 0 balanced", between(0, 1)
  )
  label_dropout: float = setting(
    0.1, "share of the samples without label and memory", between(0, 1)
  )
  anonymous: float = setting(
    0.5, "share of the others that stand for unseen classes, their label hidden", between(0, 1)
  )
  displacement: float = setting(
    1.0, "by how many class differences those are moved; unused by the condition class", at_least(0)
  )
  batch_size: int = setting(128, "features", at_least(1))

  def __post_init__(self):
    if terms.uses_reserve(self.objective):
      raise ValueError("objective.capacity is on, but denoisers of features have no reserve.")

  def learned(self) -> tuple[str, ...]:
    """The conditions that training shows the denoiser; those it can be sampled with."""
    if self.label_dropout == 1:
      return ()
    if self.condition not in ("class_and_memory", DESCRIBED):
      return (self.condition,)
    shares = {self.condition: 1 - self.anonymous, "memory": self.anonymous}
    return tuple(name for name, share in shares.items() if share > 0)


@flax.struct.dataclass
class FeatureData:
  """What one run learns from; arrays lead with runs (seeds, folds) outside of a step."""

  exemplars: Exemplars  # standardised training features
  cumulative: Any  # [C] float32, cumulated probability of drawing each class
  bank: MemoryBank  # of the exemplars, in the same units


def make_data(
  features: jax.Array,
  labels: np.ndarray,
  bank: MemoryBank,
  num_classes: int,
  exponent: float,
  mesh: Mesh,
) -> FeatureData:
  """Data of R runs, on the devices.

  Args:
    features: [R, N, D] standardised.
    labels: [R, N] int, or [N] of all runs; C or more in rows that pad a run and are never drawn.
    bank: of the features, leading with R.
    num_classes: C.
    exponent: classes are drawn by count^exponent.
    mesh: the device mesh.
  """
  labels = np.broadcast_to(np.asarray(labels, np.int32), features.shape[:2])
  runs = [group_by_class(row, num_classes) for row in labels]
  by_class = jax.tree.map(lambda *leaves: np.stack(leaves), *runs)
  probabilities = [draw_probabilities(counts, exponent) for counts in by_class.counts]
  labels, by_class, cumulative = replicate(
    mesh, (labels, by_class, np.cumsum(probabilities, axis=1).astype(np.float32))
  )
  return FeatureData(Exemplars(features, labels, by_class), cumulative, bank)


def draw_rows(key: jax.Array, per_seed: FeatureData, number: int) -> tuple[jax.Array, jax.Array]:
  """Training examples drawn with replacement, a class first: (index, label), [number] int32."""
  class_key, member_key = jax.random.split(key)
  label = draw_labels(class_key, per_seed.cumulative, number)
  return draw_members(member_key, per_seed.exemplars.by_class, label), label


def draw_batch(
  key: jax.Array, per_seed: FeatureData, config: DiffusionConfig, num_classes: int, mesh: Mesh
) -> Batch:
  """A batch of features of all classes, each with its class's memory, itself left out.

  Args:
    key: of the step.
    per_seed: the run's data.
    config: batch size and condition; `label_dropout` is the share of rows without label and memory
      (the unconditional model of guidance), `anonymous` the share of the others that are classes
      never seen: without label and, with `displacement`, moved. What the denoiser knows of those
      it must take from their exemplars. Under the condition `memory` no row has a label, under
      `class` none has a memory and none is anonymous, and under DESCRIBED none has a label, but all
      that are neither dropped nor anonymous have the embedding of their class.
    num_classes: C, also the label that means "no class".
    mesh: of the bank.
  """
  index, label = draw_rows(stream(key, "pick"), per_seed, config.batch_size)
  x0 = per_seed.exemplars.features[index]
  memory = memory_bank.read(per_seed.bank, label, mesh=mesh)
  memory = memory_bank.thin_out(memory_bank.leave_one_out(memory, x0), stream(key, "thin"))
  dropped = jax.random.bernoulli(stream(key, "drop"), config.label_dropout, label.shape)
  anonymous = 0.0 if config.condition == "class" else config.anonymous
  hidden = jax.random.bernoulli(stream(key, "hide"), anonymous, label.shape) & ~dropped
  moved = hidden & (memory.count > 0)
  shift = displacements(stream(key, "displace"), memory, moved, config.displacement)

  def shown(label, memory):
    """What the denoiser is told of a class."""
    no_label = dropped | hidden | (config.condition in ("memory", DESCRIBED))
    no_memory = dropped | (config.condition == "class")
    told = jnp.where(no_label, num_classes, label)
    memory = memory_bank.without_class_embeddings(move(memory, shift), hidden)
    return told, memory_bank.forget(memory, no_memory)

  told, told_memory = shown(label, memory)
  batch = Batch(x0=x0 + shift, label=told, memory=told_memory)
  needed = terms.needed(config.objective)
  if "true_label" in needed:  # a class that was moved has no other member in the batch
    itself = num_classes + jnp.arange(config.batch_size)
    alone = moved & (config.displacement > 0)
    batch = batch.replace(true_label=jnp.where(alone, itself, label))
  if "class_count" in needed:
    count = per_seed.exemplars.by_class.counts[label]
    made_up = moved & (config.displacement > 0)
    batch = batch.replace(class_count=jnp.where(made_up, 0, count))
  if "other_label" in needed:
    labels = config.objective.other_labels
    other, other_memory = shown(*draw_other(key, per_seed, label, memory, labels, mesh))
    batch = batch.replace(other_label=other, other_memory=other_memory)
  return batch


def draw_other(
  key: jax.Array, per_seed: FeatureData, label: jax.Array, memory: Memory, labels: str, mesh: Mesh
) -> tuple[jax.Array, Memory]:
  """For each row another class y', with its memory; the same memory if y' is the class itself.

  Args:
    key: of the step.
    per_seed: the run's data.
    label: [B] the rows' classes.
    memory: of the rows, themselves left out.
    labels: y' is drawn by the classes' counts (`empirical`) or is any class (`uniform`).
    mesh: of the bank.
  """
  cumulative = objectives.other_weights(per_seed.exemplars.by_class.counts, labels)
  other = draw_labels(stream(key, "other"), cumulative, label.shape[0])
  drawn = memory_bank.read(per_seed.bank, other, mesh=mesh)
  drawn = memory_bank.thin_out(drawn, stream(key, "thin_other"))
  same = other == label
  return other, jax.tree.map(
    lambda a, b: jnp.where(same.reshape(-1, *(1,) * (a.ndim - 1)), a, b), memory, drawn
  )


def displacements(key: jax.Array, memory: Memory, chosen: jax.Array, strength: float) -> jax.Array:
  """How far to move chosen rows, so that they are classes never seen.

  A denoiser that meets the same few exemplars of a tail class again and again learns them by
  heart. A class that is moved, feature and memory together, it cannot know: it has to read place
  and spread off the exemplars, and learns from the large classes how members scatter around few
  exemplars. Each row moves by `strength` times a standard normal number times the difference of
  two prototypes out of the batch, so that it stays in the directions in which classes differ.

  Args:
    key: randomness.
    memory: of B rows.
    chosen: [B] bool, the rows to move; their memories must not be empty.
    strength: 0 moves nothing.

  Returns:
    [B, D], zero if not chosen.
  """
  first, second, size = jax.random.split(key, 3)
  a = jax.random.permutation(first, memory.prototype)
  b = jax.random.permutation(second, memory.prototype)
  amount = strength * jax.random.normal(size, chosen.shape) * chosen
  return amount[:, None] * (a - b)


def move(memory: Memory, shift: jax.Array) -> Memory:
  """The memory [B rows] of classes that lie `shift` [B, D] from where they are."""
  slots = jnp.where(memory.mask[:, :, None], memory.slots + shift[:, None], memory.slots)
  return memory.replace(prototype=memory.prototype + shift, slots=slots)


def make_denoiser(config: DiffusionConfig, num_classes: int, feature_dim: int) -> nn.Module:
  return DENOISERS[config.denoiser.name](num_classes, feature_dim, config.denoiser)


def make_stage(
  config: DiffusionConfig, per_seed: FeatureData, num_classes: int, mesh: Mesh
) -> Stage:
  """The stage that trains the memory-conditioned denoiser; `per_seed` leads with runs."""
  denoiser = make_denoiser(config, num_classes, per_seed.exemplars.features.shape[-1])
  return denoiser_training.make_stage(
    config, denoiser, _draw(config, num_classes, mesh), (), per_seed, mesh
  )


@functools.lru_cache(maxsize=8)
def _draw(config: DiffusionConfig, num_classes: int, mesh: Mesh):
  """(key, shared, per_seed) -> Batch; the same function for seeds and folds."""
  return lambda key, _, per_seed: draw_batch(key, per_seed, config, num_classes, mesh)
