"""The table of generators, memdiff itself, its controls and its peers, and what is done with one.

A generator learns from runs of exemplars (seeds, or folds of cross-validation) and makes features
of given classes at given strengths. Some train a denoiser first, which stays in a folder. To add
one, write a `Generator` in a file of its own, or an `Untrained` one, and give it a row in
GENERATORS.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from memdiff.config import above, at_least, each, setting, some_of
from memdiff.errors import ConfigError
from memdiff.memory.feature_space import FeatureRuns
from memdiff.runtime import loop, results
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.stage import Run
from memdiff.synthesis import confidence as confidence_lib
from memdiff.synthesis import ldmlr
from memdiff.synthesis.confidence import ConfidenceConfig, SyntheticFeatures
from memdiff.synthesis.fasa import FASA, FASAConfig
from memdiff.synthesis.feature_diffusion import DiffusionConfig
from memdiff.synthesis.generator import Generator
from memdiff.synthesis.hallucination import SamplerConfig
from memdiff.synthesis.memory_diffusion import MemoryDiffusion, class_only, described
from memdiff.synthesis.untrained import UNTRAINED


@dataclasses.dataclass(frozen=True)
class Row:
  """A generator by name: what reports say of it, and how it is made of the settings."""

  description: str
  make: Callable[["SynthesisSettings"], Generator]


GENERATORS = {
  name: Row(description, lambda _, generator=generator: generator)
  for name, (description, generator) in UNTRAINED.items()
} | {
  "fasa": Row(
    "virtual features with adapted sampling (FASA, Zang et al. 2021)",
    lambda settings: FASA(settings.generators.fasa),
  ),
  "ldmlr": Row(
    "latent diffusion of LDMLR (Han et al. 2024), its defects mended",
    lambda s: ldmlr.row("ldmlr", s.generators.ldmlr_share, s.num_classes),
  ),
  "ldmlr_published": Row(
    "latent diffusion of LDMLR as its code has it, 20 % of each class",
    lambda s: ldmlr.row("ldmlr_published", s.generators.ldmlr_share, s.num_classes),
  ),
  "memdiff": Row(
    "diffusion conditioned on the memory of the class",
    lambda s: MemoryDiffusion(s.diffusion, s.hallucination, s.num_classes),
  ),
  "memdiff_described": Row(
    "the same, told embeddings of the classes, config.class_embeddings, instead of labels",
    lambda s: described(s.diffusion, s.hallucination, s.num_classes),
  ),
  "class_only": Row(
    "the same diffusion conditioned on the class alone (DDPM)",
    lambda s: class_only(s.diffusion, s.hallucination, s.num_classes),
  ),
}


@dataclasses.dataclass(frozen=True)
class GeneratorsConfig:
  """Which generators a run compares, and how much they make."""

  names: tuple[str, ...] = setting(
    (
      "duplicate", "kernel_jitter", "feature_mixup", "gaussian_shared", "gaussian_shrunk",
      "class_only", "memdiff",
    ),
    "what makes features",
    some_of(GENERATORS),
  )  # fmt: skip
  tail_below: int = setting(100, "classes with fewer training examples are filled up", at_least(1))
  fill_to: tuple[int, ...] = setting(
    (100,), "candidates; up to how many examples", each(lambda n: n >= 1, "whole numbers from 1")
  )
  confidence: ConfidenceConfig = setting(ConfidenceConfig(), "how far features are trusted")
  fasa: FASAConfig = setting(FASAConfig(), "of the generator fasa")
  ldmlr_share: float = setting(1.0, "of the training steps that LDMLR publishes", above(0))

  def __post_init__(self):
    if not self.names:
      raise ValueError("names is empty, but something must make synthetic features.")


@dataclasses.dataclass(frozen=True)
class SynthesisSettings:
  """What the generators of an experiment are made of."""

  generators: GeneratorsConfig
  diffusion: DiffusionConfig
  hallucination: SamplerConfig
  num_classes: int

  def generator(self, name: str) -> Generator:
    return GENERATORS[name].make(self)

  def numbers(self, name: str, train_counts: np.ndarray) -> np.ndarray:
    """Features that a generator makes per class. [C] int32."""
    numbers = self.generator(name).numbers(train_counts)
    return plan(train_counts, self.generators) if numbers is None else numbers.astype(np.int32)


def plan(counts: np.ndarray, config: GeneratorsConfig) -> np.ndarray:
  """Features to make per class: tail classes are filled up to the largest of `fill_to`. [C].

  Raises:
    ConfigError: if no class needs any.
  """
  target, smallest = max(config.fill_to), int(counts.min())
  numbers = np.where(counts < config.tail_below, np.maximum(target - counts, 0), 0)
  if not numbers.any():
    advice = (
      f"set tail_below above {smallest} and fill_to above that"
      if counts.max() > smallest
      else f"all classes have {smallest}, so there is no tail to fill; cut one with"
      " config.dataset.profile=exponential, or set tail_below and fill_to above that"
    )
    raise ConfigError(
      f"config.generators: no class with fewer than tail_below={config.tail_below} training"
      f" examples needs filling to fill_to={target} (the smallest class has {smallest}, the largest"
      f" {int(counts.max())}); {advice}."
    )
  return numbers.astype(np.int32)


def train(
  name: str,
  settings: SynthesisSettings,
  runs: FeatureRuns,
  run: Run,
  folder: pathlib.Path,
  stage_name: str,
) -> None:
  """Trains what the generator has to train, if anything, in `folder`.

  Args:
    name: of the generator.
    settings: see there.
    runs: what it learns from.
    run: seeds, mesh, progress.
    folder: for checkpoints, curve and result.
    stage_name: names the random numbers and the curve.
  """
  generator = settings.generator(name)
  if generator.trains:
    stage = dataclasses.replace(generator.stage(runs, run.mesh), name=stage_name)
    loop.train(stage, run, folder)


def _put(array: jax.Array, value: jax.Array, run: jax.Array, number: jax.Array) -> jax.Array:
  """`array` [R, K, ...] with `own` [...] at (run, number)."""
  start = (run, number, *(0,) * value.ndim)
  return jax.lax.dynamic_update_slice(array, value[None, None], start)


@functools.lru_cache(maxsize=16)
def sampling_program(
  generator: Generator, config: ConfidenceConfig, dim: int, numbers: tuple[int, ...], mesh: Mesh
) -> Callable:
  """The jitted program that makes a generator's features and judges them; one for seeds and folds.

  Args:
    generator: see there.
    config: how far features are trusted.
    dim: D.
    numbers: features per class, M in all.
    mesh: the device mesh.

  Returns:
    (keys [R], strengths [K], runs, what it has learned) -> features [R, K, M, D], standardised, and
    confidence [R, K, M], both whole on every device.
  """
  labels = np.repeat(np.arange(len(numbers)), numbers).astype(np.int32)
  sampler = generator.sampler(labels, dim, mesh)

  def judge(samples, trust, known, standardizer, head):
    """Of one run and strength: what the head trains on is what is judged and exported."""
    features = standardizer.forward(standardizer.backward(samples))
    confidence = confidence_lib.confidence(features, labels, known, head, config)
    return features, trust * confidence

  def make_all(keys, strengths, runs, learned):
    num_runs, num_strengths = keys.shape[0], strengths.shape[0]
    shape = (num_runs, num_strengths, labels.shape[0])
    everything = jnp.zeros((*shape, runs.exemplars.features.shape[-1])), jnp.zeros(shape)
    known = jax.lax.map(
      lambda run: confidence_lib.class_statistics(*run, config), (runs.exemplars, runs.head)
    )

    def add_strength(number, everything):
      of_run = sampler(keys, strengths[number], runs, learned)

      def add_run(run, everything):
        parts = known, runs.standardizer, runs.head
        judged = judge(*of_run(run), *jax.tree.map(lambda x: x[run], parts))
        return jax.tree.map(lambda x, value: _put(x, value, run, number), everything, judged)

      return jax.lax.fori_loop(0, num_runs, add_run, everything)

    # Written in place: the output of a map would lie beside it.
    return jax.lax.fori_loop(0, num_strengths, add_strength, everything)

  return jax.jit(make_all, out_shardings=mesh_lib.replicated(mesh))


def make(
  name: str,
  settings: SynthesisSettings,
  runs: FeatureRuns,
  run: Run,
  folder: pathlib.Path,
  numbers: np.ndarray,
  chosen: Sequence[float],
) -> SyntheticFeatures:
  """Synthetic features of R runs, on the devices.

  Args:
    name: of the generator.
    settings: see there.
    runs: what it learns from.
    run: seeds, of which there are R, mesh and progress.
    folder: in which `train` has trained it.
    numbers: [C] features per class, M in all.
    chosen: K strengths.
  """
  labels = np.repeat(np.arange(len(numbers)), numbers).astype(np.int32)
  number = np.concatenate([np.arange(n) for n in numbers]).astype(np.int32)
  generator = settings.generator(name)
  params = results.load(folder, run.mesh).ema_params if generator.trains else None
  prepared = generator.prepare(runs, params)
  program = sampling_program(
    generator,
    settings.generators.confidence,
    runs.exemplars.features.shape[-1],
    tuple(numbers.tolist()),
    run.mesh,
  )
  run.progress.say(f"sampling {len(labels):,} features per run with {name} ...")
  features, confidence = jax.block_until_ready(
    program(run.keys(f"sample/{name}"), jnp.asarray(chosen, jnp.float32), runs, prepared)
  )
  return SyntheticFeatures(features=features, labels=labels, confidence=confidence, number=number)
