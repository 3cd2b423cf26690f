"""memdiff's generator, the diffusion conditioned on the memory, and the same without it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from memdiff.diffusion.schedules import NoiseSchedule
from memdiff.memory import exemplars as exemplars_lib
from memdiff.memory.feature_space import FeatureRuns
from memdiff.memory.memory_bank import MemoryBank
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.random import stream
from memdiff.runtime.stage import Stage
from memdiff.synthesis import feature_diffusion, hallucination
from memdiff.synthesis.feature_diffusion import DESCRIBED, DiffusionConfig
from memdiff.synthesis.generator import Generator, Sampler
from memdiff.synthesis.hallucination import SamplerConfig, TrainedDenoiser

_TOGETHER = 2**26  # bytes of features up to which all runs are sampled at once


@dataclasses.dataclass(frozen=True)
class MemoryDiffusion(Generator):
  """Diffusion of features; `diffusion` and `hallucination` say how it trains and how it samples."""

  trains = True
  diffusion: DiffusionConfig
  hallucination: SamplerConfig
  num_classes: int

  @property
  def strengths(self) -> tuple[float, ...]:
    return self.hallucination.strengths

  @property
  def needs_class_embeddings(self) -> bool:
    return self.diffusion.condition == DESCRIBED

  def _bank(self, runs: FeatureRuns) -> MemoryBank:
    """Without what this generator is not to be told."""
    return runs.bank if self.needs_class_embeddings else runs.bank.replace(class_embeddings=None)

  def stage(self, runs: FeatureRuns, mesh: Mesh) -> Stage:
    data = feature_diffusion.make_data(
      runs.exemplars.features, mesh_lib.fetch(runs.exemplars.labels), self._bank(runs),
      self.num_classes, self.diffusion.class_exponent, mesh,
    )  # fmt: skip
    return feature_diffusion.make_stage(self.diffusion, data, self.num_classes, mesh)

  def sampler(self, labels: np.ndarray, feature_dim: int, mesh: Mesh) -> Sampler:
    """A single strength is static, which spares guidance's pair of calls at a scale of 1."""
    config = self.hallucination
    module = feature_diffusion.make_denoiser(self.diffusion, self.num_classes, feature_dim)
    schedule = NoiseSchedule(self.diffusion.schedule)

    def of_runs(keys, strength, runs, params):
      if len(config.strengths) == 1:
        strength = config.strengths[0]

      def of_run(key, params, bank, exemplars):
        origins = None
        if min(config.start) < 1:
          origins = exemplars_lib.draw(stream(key, "origin"), exemplars, labels)
        denoiser = TrainedDenoiser(module, params, schedule, self.diffusion.prediction)
        return hallucination.sample_features(
          denoiser, bank, labels, key, config, mesh, config.at(strength, origins)
        )

      arguments = keys, params, self._bank(runs), runs.exemplars
      trust = jnp.ones(labels.shape)
      if len(keys) * labels.size * feature_dim * 4 > _TOGETHER:
        return lambda run: (of_run(*_of_run(arguments, run)), trust)
      features = jax.vmap(of_run)(*arguments)
      return lambda run: (features[run], trust)

    return of_runs


def _of_run(tree: Any, run: jax.Array) -> Any:
  return jax.tree.map(lambda x: x[run], tree)


def described(
  diffusion: DiffusionConfig, hallucination: SamplerConfig, num_classes: int
) -> MemoryDiffusion:
  """The same denoiser, told what is known of the class beside its features instead of the label."""
  return MemoryDiffusion(
    dataclasses.replace(diffusion, condition=DESCRIBED),
    dataclasses.replace(hallucination, condition=DESCRIBED),
    num_classes,
  )


def class_only(
  diffusion: DiffusionConfig, hallucination: SamplerConfig, num_classes: int
) -> MemoryDiffusion:
  """The same denoiser, conditioned on the class alone and sampled from noise."""
  return MemoryDiffusion(
    dataclasses.replace(diffusion, condition="class"),
    dataclasses.replace(hallucination, condition="class", guidance=(1.0,), start=(1.0,)),
    num_classes,
  )
