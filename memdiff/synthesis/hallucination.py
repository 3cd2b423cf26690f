"""Hallucination: bank and denoiser make features of classes."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike

from memdiff.config import at_least, each, one_of, setting
from memdiff.diffusion import guidance, sampler
from memdiff.diffusion.sampler import SAMPLERS, Solver
from memdiff.diffusion.schedules import NoiseSchedule
from memdiff.memory import memory_bank
from memdiff.memory.memory_bank import MemoryBank
from memdiff.runtime import mesh as mesh_lib
from memdiff.synthesis.feature_diffusion import CONDITIONS, DESCRIBED, DiffusionConfig

_GROUP_SIZES = (16, 10, 8, 5, 4, 3, 2, 1)
_ROOM = 1.25  # times as many samples may be drawn as are wanted, so that groups are whole


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
  sampler: str = setting("ddim", "of the reverse process", one_of(SAMPLERS))
  num_steps: int = setting(50, "denoiser calls per sample", at_least(2))
  condition: str = setting("memory", "what the denoiser is told", one_of(CONDITIONS))
  guidance: tuple[float, ...] = setting(
    (1.0,),
    "candidates; 1: none, above: towards the class",
    each(lambda g: g >= 0, "numbers from 0"),
  )
  start: tuple[float, ...] = setting(
    (1.0,),
    "candidates; below 1: from exemplars noised for this share of the steps",
    each(lambda s: 0 < s <= 1, "numbers above 0, up to 1"),
  )
  x0_limit: float = setting(
    8.0, "limit of predicted features, in standard deviations; 0: none", at_least(0)
  )
  chunk_size: int = setting(
    1024, "samples at a time, bounds the memory; devices share groups of up to 16", at_least(1)
  )

  def __post_init__(self):
    if len(self.guidance) > 1 and len(self.start) > 1:
      raise ValueError(
        f"guidance is {self.guidance} and start {self.start}, but only one of them may have several"
        " candidates."
      )

  @property
  def strengths(self) -> tuple[float, ...]:
    """The candidates: of guidance if it has several, otherwise of `start`."""
    return self.guidance if len(self.guidance) > 1 else self.start

  def at(self, strength: float | jax.Array, origins: jax.Array | None = None) -> "Steering":
    """Guidance and start at one of the strengths, which may be traced."""
    if len(self.guidance) > 1:
      return Steering(strength, self.start[0], origins)
    return Steering(self.guidance[0], strength, origins)


@dataclasses.dataclass(frozen=True)
class Steering:
  """How far samples are guided, and what they begin from.

  Attributes:
    guidance: its scale; may be traced, so that `vmap` or a map over it samples at several scales,
      from the same noise, in one program.
    start: how far `origins` are noised first, a share of all steps; may be traced, too.
    origins: [M, D] features to begin from, for example exemplars; None: from noise alone.
  """

  guidance: float | jax.Array = 1.0
  start: float | jax.Array = 1.0
  origins: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class TrainedDenoiser:
  """A denoiser with parameters, usually the EMA weights, and what its training settled."""

  module: nn.Module
  params: Any
  schedule: NoiseSchedule
  prediction: str  # what it predicts


_UNSTEERED = Steering()


def check_conditions(trained: DiffusionConfig, sampled: SamplerConfig) -> None:
  """Raises ValueError if sampling shows the denoiser what its training never did."""
  learned = trained.learned()
  if sampled.condition not in learned:
    raise ValueError(
      f"hallucination.condition is {sampled.condition!r}, but with diffusion.condition"
      f" {trained.condition!r}, anonymous {trained.anonymous} and label_dropout"
      f" {trained.label_dropout} the denoiser learns {' and '.join(learned) or 'no condition'};"
      " change one or the other."
    )
  if set(sampled.guidance) != {1.0} and trained.label_dropout == 0:
    raise ValueError(
      f"hallucination.guidance is {sampled.guidance}, but without diffusion.label_dropout the"
      " denoiser does not learn the unconditional model that guidance needs; set guidance to (1.0,)"
      " or label_dropout to 0.1, say."
    )


def guided_denoiser(denoiser: nn.Module, params, label, memory, scale: float | jax.Array):
  """(x [B, ...], t [1]) -> the denoiser's output, with the conditioning encoded once.

  Each of the G rows of `label` and `memory` conditions B / G rows of x in a row; see
  `guidance.guided` for the scale.
  """
  variables = {"params": params}

  def condition(label, memory):
    return denoiser.apply(variables, label, memory, method="condition")

  def unconditional():
    nothing = memory_bank.forget(memory, jnp.ones(label.shape, bool))
    return condition(jnp.full_like(label, denoiser.num_classes), nothing)

  def denoise(x, t, context):
    return denoiser.apply(variables, x, t, context, method="denoise")[0]

  return guidance.guided(denoise, condition(label, memory), unconditional, scale)


def group(labels: np.ndarray, chunk_size: int) -> tuple[np.ndarray, np.ndarray, int]:
  """Puts samples of a class together, so that they share one reading of its memory.

  Args:
    labels: [M] of the samples, in any order.
    chunk_size: no group is larger.

  Returns:
    The class of every group, the place of every sample [M] when groups lie one behind the other,
    and the size of a group, the largest that leaves few places empty. A function of the labels
    alone, so that samples do not depend on the devices.
  """
  classes, row, counts = np.unique(labels, return_inverse=True, return_counts=True)
  for size in _GROUP_SIZES:
    groups = -(-counts // size)
    if size <= chunk_size and groups.sum() * size <= _ROOM * len(labels):
      break
  order = np.argsort(row, kind="stable")
  first = np.cumsum(groups) - groups
  within = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
  place = np.empty(len(labels), int)
  place[order] = first[row[order]] * size + within
  return np.repeat(classes, groups), place, size


def sample_features(
  denoiser: TrainedDenoiser,
  bank: MemoryBank,
  labels: ArrayLike,
  key: jax.Array,
  config: SamplerConfig,
  mesh: Mesh,
  steering: Steering = _UNSTEERED,
) -> jax.Array:
  """Samples one standardised feature per label, chunk by chunk in one compiled program.

  Args:
    denoiser: may hold traced parameters.
    bank: in standardised units.
    labels: [M] int32, not traced: how they repeat decides the program.
    key: randomness.
    config: sampler, steps, condition and chunk size.
    mesh: groups of samples are split over it.
    steering: by default no guidance, from noise alone.

  Returns:
    [M, D] float32.
  """
  of_groups, place, size = group(np.asarray(labels), config.chunk_size)
  room = 1 << (size - 1).bit_length()  # a power of two, so that devices share the groups evenly
  groups_per_chunk = min(max(config.chunk_size // room, 1), len(of_groups))
  num_chunks = -(-len(of_groups) // groups_per_chunk)
  of_groups = np.pad(of_groups, (0, num_chunks * groups_per_chunk - len(of_groups)))
  chunk = groups_per_chunk * size

  def chunks(rows):
    """[M, D] -> [num_chunks, chunk, D], every row at its place."""
    empty = jnp.zeros((num_chunks * chunk, rows.shape[1]), rows.dtype)
    return empty.at[place].set(rows).reshape(num_chunks, chunk, -1)

  def make_predict(labels):
    labels = mesh_lib.shard_batch(labels, mesh)
    memory = memory_bank.read(bank, labels, mesh=mesh)
    if config.condition == "class":
      memory = memory_bank.forget(memory, jnp.ones(labels.shape, bool))
    if config.condition in ("memory", DESCRIBED):
      labels = jnp.full_like(labels, denoiser.module.num_classes)
    return guided_denoiser(denoiser.module, denoiser.params, labels, memory, steering.guidance)

  samples = sampler.sample_in_chunks(
    make_predict,
    jnp.asarray(of_groups.reshape(num_chunks, -1), jnp.int32),
    denoiser.schedule,
    (chunk, denoiser.module.feature_dim),
    key,
    Solver(config.sampler, config.num_steps, denoiser.prediction, config.x0_limit),
    origin=jax.tree.map(chunks, steering.origins),
    start=steering.start,
  )
  return samples[place]
