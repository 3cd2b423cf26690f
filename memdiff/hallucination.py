"""Hallucination: bank and denoiser make features of classes."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from memdiff import memory_bank
from memdiff.config import above, at_least, each, one_of
from memdiff.diffusion import sampler
from memdiff.diffusion.sampler import SAMPLERS
from memdiff.diffusion.schedules import NoiseSchedule
from memdiff.feature_diffusion import CONDITIONS, DiffusionConfig
from memdiff.memory_bank import MemoryBank
from memdiff.runtime import mesh as mesh_lib


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
  sampler: str = one_of(SAMPLERS)
  num_steps: int = at_least(2)
  condition: str = one_of(CONDITIONS)
  guidance: tuple[float, ...] = each(lambda g: g >= 0, "numbers from 0")
  start: tuple[float, ...] = each(lambda s: 0 < s <= 1, "numbers above 0, up to 1")
  x0_limit: float | None = above(0)
  chunk_size: int = at_least(1)

  def __post_init__(self):
    if len(self.guidance) > 1 and len(self.start) > 1:
      raise ValueError(
        f"guidance is {self.guidance} and start {self.start}, but only one of them may have several"
        " candidates."
      )

  @property
  def strengths(self) -> tuple[float, ...]:
    """The candidates: of guidance where it has several, otherwise of `start`."""
    return self.guidance if len(self.guidance) > 1 else self.start

  def at(self, strength: float | jax.Array) -> dict[str, float | jax.Array]:
    """(guidance, start) at one of the strengths, which may be traced."""
    if len(self.guidance) > 1:
      return {"guidance": strength, "start": self.start[0]}
    return {"guidance": self.guidance[0], "start": strength}


def check_conditions(trained: DiffusionConfig, sampled: SamplerConfig) -> None:
  """Raises ValueError where sampling shows the denoiser what its training never did."""
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
  """(x [B, ...], t [1]) -> the denoiser's output, with the conditioning of the rows encoded once.

  At a scale of 1 the denoiser runs once per call; otherwise, and where the scale is traced (a sweep
  under `vmap`), conditional and unconditional rows run as one batch of 2B.
  """
  variables = {"params": params}

  def condition(label, memory):
    return denoiser.apply(variables, label, memory, method="condition")

  def denoise(x, t, context):
    return denoiser.apply(variables, x, t, context, method="denoise")[0]

  if isinstance(scale, (int, float)) and scale == 1:
    context = condition(label, memory)
    return lambda x, t: denoise(x, t, context)

  nothing = memory_bank.forget(memory, jnp.ones(label.shape, bool))
  no_class = jnp.full_like(label, denoiser.num_classes)
  pair = jax.tree.map(
    lambda a, b: jnp.concatenate([a, b]), condition(label, memory), condition(no_class, nothing)
  )

  def predict(x, t):
    both = denoise(jnp.concatenate([x, x]), t, pair)
    return sampler.guide(*jnp.split(both, 2), scale)

  return predict


def sample_features(
  denoiser: nn.Module,
  params: Any,
  schedule: NoiseSchedule,
  bank: MemoryBank,
  labels: jax.Array,
  key: jax.Array,
  config: SamplerConfig,
  prediction: str,
  mesh: Mesh,
  guidance: float | jax.Array,
  origins: jax.Array | None = None,
  start: float | jax.Array = 1.0,
) -> jax.Array:
  """Samples one standardised feature per label, chunk by chunk in one compiled program.

  Args:
    denoiser, params, schedule: of the training; `params` are usually the EMA weights.
    bank: in standardised units.
    labels: [M] int32.
    key: randomness.
    config: sampler, steps, condition and chunk size.
    prediction: what the denoiser was trained to predict.
    mesh: samples are split over it.
    guidance: its scale; may be traced, so that `vmap` or a map over it samples at several scales,
      from the same noise, in one program.
    origins: [M, D] features to begin from, for example exemplars; None: from noise alone.
    start: how far they are noised first, a share of all steps; may be traced, too.

  Returns:
    [M, D] float32.
  """
  num_samples = labels.shape[0]
  chunk = min(config.chunk_size, num_samples)
  num_chunks = -(-num_samples // chunk)

  def chunks(rows):
    """[M, ...] -> [num_chunks, chunk, ...]."""
    padding = [(0, num_chunks * chunk - num_samples)] + [(0, 0)] * (rows.ndim - 1)
    return jnp.pad(rows, padding).reshape(num_chunks, chunk, *rows.shape[1:])

  def sample_chunk(arguments):
    number, labels, origin = arguments
    labels = mesh_lib.shard_batch(labels, mesh)
    memory = memory_bank.read(bank, labels, mesh=mesh)
    if config.condition == "class":
      memory = memory_bank.forget(memory, jnp.ones(labels.shape, bool))
    if config.condition == "memory":
      labels = jnp.full_like(labels, denoiser.num_classes)
    predict = guided_denoiser(denoiser, params, labels, memory, guidance)
    return sampler.sample(
      predict,
      schedule,
      (chunk, denoiser.feature_dim),
      jax.random.fold_in(key, number),
      method=config.sampler,
      num_steps=config.num_steps,
      prediction=prediction,
      x0_limit=config.x0_limit,
      origin=origin,
      start=start,
    )

  inputs = (jnp.arange(num_chunks), *jax.tree.map(chunks, (labels, origins)))
  samples = jax.lax.map(sample_chunk, inputs)
  return samples.reshape(num_chunks * chunk, -1)[:num_samples]
