"""Every way to make synthetic features, by one interface: memdiff itself, its controls, its peers.

A generator learns from runs of exemplars (seeds, or folds of cross-validation) and makes features
of given classes at given strengths. Some train a denoiser first, which stays in a folder.

To add one that needs no training: a row in baselines.generators.GENERATORS.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from memdiff.config import above, at_least, each, some_of
from memdiff.diffusion.schedules import NoiseSchedule
from memdiff.errors import ConfigError
from memdiff.evaluation import cross_validation
from memdiff.memory import exemplars as exemplars_lib
from memdiff.memory.exemplars import Exemplars
from memdiff.memory.feature_space import FeatureRuns
from memdiff.runtime import loop
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.loop import Stage
from memdiff.runtime.random import stream
from memdiff.synthesis import confidence as confidence_lib
from memdiff.synthesis import fasa, feature_diffusion, hallucination, ldmlr
from memdiff.synthesis.confidence import ConfidenceConfig, SyntheticFeatures
from memdiff.synthesis.fasa import FASAConfig
from memdiff.synthesis.feature_diffusion import DiffusionConfig
from memdiff.synthesis.hallucination import SamplerConfig
from memdiff.synthesis.untrained import GENERATORS

DIFFUSIONS = {
  "memdiff": "diffusion conditioned on the memory of the class",
  "class_only": "the same diffusion conditioned on the class alone (DDPM)",
}
LDMLR = {
  "ldmlr": "latent diffusion of LDMLR (Han et al. 2024), its defects mended",
  "ldmlr_published": "latent diffusion of LDMLR as its code has it, 20 % of each class",
}
DESCRIPTIONS = (
  {name: generator.description for name, generator in GENERATORS.items()}
  | {"fasa": "virtual features with adapted sampling (FASA, Zang et al. 2021)"}
  | LDMLR
  | DIFFUSIONS
)


@dataclasses.dataclass(frozen=True)
class GeneratorsConfig:
  """Which generators a run compares, and how much they make."""

  names: tuple[str, ...] = some_of(DESCRIPTIONS)
  tail_below: int = at_least(1)
  fill_to: tuple[int, ...] = each(lambda n: n >= 1, "whole numbers from 1")
  confidence: ConfidenceConfig
  fasa: FASAConfig
  ldmlr_share: float = above(0)

  def __post_init__(self):
    if not self.names:
      raise ValueError("names is empty, but something must make synthetic features.")


@dataclasses.dataclass(frozen=True)
class Workshop:
  """What the generators of an experiment work with."""

  config: GeneratorsConfig
  diffusion: DiffusionConfig
  sampler: SamplerConfig
  num_classes: int


def plan(counts: np.ndarray, config: GeneratorsConfig) -> np.ndarray:
  """Features to make per class: tail classes are filled up to the largest of `fill_to`. [C].

  Raises:
    ConfigError: where no class needs any.
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


def numbers(name: str, counts: np.ndarray, config: GeneratorsConfig) -> np.ndarray:
  """Features that the generator `name` makes per class. [C]."""
  if name == "ldmlr_published":
    return ldmlr.published_numbers(counts).astype(np.int32)
  return plan(counts, config)


def fills(name: str, config: GeneratorsConfig) -> tuple[int, ...]:
  """Candidates of how far classes are filled; none if all that the generator makes is used."""
  return () if name == "ldmlr_published" else config.fill_to


def strengths(name: str, shop: Workshop) -> tuple[float, ...]:
  """Candidates of the generator's strength."""
  if name in GENERATORS:
    return GENERATORS[name].strengths
  return shop.sampler.strengths if name == "memdiff" else (1.0,)


def _diffusion(name: str, shop: Workshop) -> DiffusionConfig:
  """The settings that a diffusion generator trains with."""
  if name == "class_only":
    return dataclasses.replace(shop.diffusion, condition="class")
  return shop.diffusion


def _ldmlr(name: str, shop: Workshop) -> ldmlr.LDMLRConfig:
  row = ldmlr.ROWS[name]
  return dataclasses.replace(row, num_steps=max(round(shop.config.ldmlr_share * row.num_steps), 1))


def stage(name: str, shop: Workshop, runs: FeatureRuns, mesh: Mesh) -> Stage | None:
  """The training of the generator's denoiser; None where it needs none."""
  if name in DIFFUSIONS:
    config = _diffusion(name, shop)
    own = feature_diffusion.make_data(
      runs.exemplars.features, mesh_lib.fetch(runs.exemplars.labels), runs.bank, shop.num_classes,
      config.class_exponent, mesh,
    )  # fmt: skip
    return feature_diffusion.make_stage(config, own, shop.num_classes, mesh)
  if name in LDMLR:
    return ldmlr.make_stage(
      name, _ldmlr(name, shop), runs.exemplars, runs.standardizer, shop.num_classes, mesh
    )
  return None


def train(name: str, shop: Workshop, runs: FeatureRuns, run: loop.Run, folder: pathlib.Path):
  """Trains the generator's denoiser in `folder`, where it has one."""
  made = stage(name, shop, runs, run.mesh)
  if made is not None:
    loop.train(_named(made, folder), run, folder)


def _named(made: Stage, folder: pathlib.Path) -> Stage:
  """The stage with the name of its folder, so that curves of folds and seeds stay apart."""
  return dataclasses.replace(made, name="/".join(folder.parts[-2:]))


# --- sampling --------------------------------------------------------------------------------

# (keys [R], strength [], runs, what it has learned) -> (number of a run -> its features [M, D] and
# trust [M], which multiplies the confidence).
Made = Callable[[jax.Array], tuple[jax.Array, jax.Array]]
Sampler = Callable[[jax.Array, jax.Array, FeatureRuns, Any], Made]


def _plain_sampler(name: str, labels: jax.Array) -> Sampler:
  """Of a generator without training; a run at a time, which bounds the memory."""

  def of_runs(keys, strength, runs, fitted):
    def of_run(run):
      key, exemplars, own = jax.tree.map(lambda x: x[run], (keys, runs.exemplars, fitted))
      made = GENERATORS[name].sample(key, exemplars, own, labels, strength)
      return made, jnp.ones(labels.shape)

    return of_run

  return of_runs


def _fit_plain(name: str, runs: FeatureRuns) -> Any:
  """What a generator without training takes from the exemplars of each run; once if alike."""
  exemplars, num_runs = runs.exemplars, runs.exemplars.labels.shape[0]
  if runs.alike:
    exemplars = jax.tree.map(lambda x: x[:1], exemplars)
  fitted = jax.jit(lambda exemplars: jax.lax.map(GENERATORS[name].fit, exemplars))(exemplars)
  return jax.tree.map(lambda x: jnp.broadcast_to(x, (num_runs, *x.shape[1:])), fitted)


def _fasa_parts(runs: FeatureRuns) -> tuple[Exemplars, Exemplars, np.ndarray]:
  """Four fifths of each run's exemplars, the fifth that is held out, and groups of the classes."""
  num_classes = runs.exemplars.by_class.counts.shape[-1]
  parts, groups = ([], []), []
  features, labels = mesh_lib.fetch((runs.exemplars.features, runs.exemplars.labels))
  for own, own_labels in zip(features, labels, strict=True):
    fold = cross_validation.deal(own_labels, 5, seed=0)
    for part, inside in zip(parts, (fold != 0, fold == 0), strict=True):
      masked = np.where(inside, own_labels, num_classes)
      part.append(exemplars_lib.make(own, masked, num_classes))
    train = parts[0][-1]
    means = np.asarray(exemplars_lib.class_means(jax.tree.map(jnp.asarray, train)))
    groups.append(fasa.group_classes(means, train.by_class.counts))
  train, held_out = (jax.tree.map(lambda *leaves: np.stack(leaves), *part) for part in parts)
  return train, held_out, np.stack(groups)


def _fasa_sampler(config: FASAConfig, labels: jax.Array) -> Sampler:
  def of_runs(keys, _, runs, parts):
    del runs

    def of_run(run):
      key, (train, held_out, groups) = jax.tree.map(lambda x: x[run], (keys, parts))
      adapted = fasa.adapt(stream(key, "adapt"), train, held_out, groups, config)
      made = fasa.sample(stream(key, "sample"), adapted, labels)
      return made, fasa.class_weights(adapted)[labels]

    return of_run

  return of_runs


def _ldmlr_sampler(config: ldmlr.LDMLRConfig, labels: jax.Array, num_classes: int) -> Sampler:
  def of_runs(keys, _, runs, params):
    def of_run(key, params, standardizer):
      return ldmlr.sample(key, config, params, standardizer, labels, num_classes)

    made = jax.vmap(of_run)(keys, params, runs.standardizer)
    return lambda run: (made[run], jnp.ones(labels.shape))

  return of_runs


_TOGETHER = 2**26  # bytes of features up to which all runs are sampled at once


def diffusion_sampler(
  name: str, shop: Workshop, feature_dim: int, labels: jax.Array, mesh: Mesh
) -> Sampler:
  """Of a row of DIFFUSIONS; what it has learned is the denoiser's parameters, leading with R.

  A single strength is static, which spares guidance's pair of calls at a scale of 1.
  """
  config, sampler = _diffusion(name, shop), shop.sampler
  if name == "class_only":
    sampler = dataclasses.replace(sampler, condition="class", guidance=(1.0,), start=(1.0,))
  denoiser = feature_diffusion.make_denoiser(config, shop.num_classes, feature_dim)
  schedule = NoiseSchedule(config.schedule)

  def of_runs(keys, strength, runs, params):
    if len(sampler.strengths) == 1:
      strength = sampler.strengths[0]

    def of_run(key, params, bank, exemplars):
      origins = None
      if min(sampler.start) < 1:
        origins = exemplars_lib.draw(stream(key, "origin"), exemplars, labels)
      return hallucination.sample_features(
        denoiser, params, schedule, bank, labels, key, sampler, config.prediction, mesh,
        origins=origins, **sampler.at(strength),
      )  # fmt: skip

    own = keys, params, runs.bank, runs.exemplars
    if len(keys) * labels.size * feature_dim * 4 > _TOGETHER:
      return lambda run: (of_run(*jax.tree.map(lambda x: x[run], own)), jnp.ones(labels.shape))
    made = jax.vmap(of_run)(*own)
    return lambda run: (made[run], jnp.ones(labels.shape))

  return of_runs


def _learned(name: str, shop: Workshop, runs: FeatureRuns, run: loop.Run, folder: pathlib.Path):
  """What the generator's sampler takes beside the exemplars, of all runs."""
  if name in GENERATORS:
    return _fit_plain(name, runs)
  if name == "fasa":
    return _fasa_parts(runs)
  trained = _named(stage(name, shop, runs, run.mesh), folder)
  return loop.load_final(trained, run, folder).ema_params


def _sampler(name: str, shop: Workshop, dim: int, labels: jax.Array, mesh: Mesh) -> Sampler:
  if name in GENERATORS:
    return _plain_sampler(name, labels)
  if name == "fasa":
    return _fasa_sampler(shop.config.fasa, labels)
  if name in LDMLR:
    return _ldmlr_sampler(_ldmlr(name, shop), labels, shop.num_classes)
  return diffusion_sampler(name, shop, dim, labels, mesh)


def _put(array: jax.Array, own: jax.Array, run: jax.Array, number: jax.Array) -> jax.Array:
  """`array` [R, K, ...] with `own` [...] at (run, number)."""
  start = (run, number, *(0,) * own.ndim)
  return jax.lax.dynamic_update_slice(array, own[None, None], start)


@functools.lru_cache(maxsize=16)
def sampling_program(
  name: str, shop: Workshop, dim: int, numbers: tuple[int, ...], mesh: Mesh
) -> Callable:
  """The jitted program that makes a generator's features and judges them; one for seeds and folds.

  Args:
    name: of the generator.
    shop: its settings.
    dim: D.
    numbers: features per class, M in all.
    mesh: the device mesh.

  Returns:
    (keys [R], strengths [K], runs, what it has learned) -> features [R, K, M, D], standardised, and
    confidence [R, K, M], both whole on every device.
  """
  labels = np.repeat(np.arange(len(numbers)), numbers).astype(np.int32)
  sampler = _sampler(name, shop, dim, labels, mesh)

  def judge(samples, trust, known, standardizer, head):
    """Of one run and strength: what the head trains on is what is judged and exported."""
    features = standardizer.forward(standardizer.backward(samples))
    confidence = confidence_lib.confidence(features, labels, known, head, shop.config.confidence)
    return features, trust * confidence

  def make_all(keys, strengths, runs, learned):
    num_runs, num_strengths = keys.shape[0], strengths.shape[0]
    shape = (num_runs, num_strengths, labels.shape[0])
    everything = jnp.zeros((*shape, runs.exemplars.features.shape[-1])), jnp.zeros(shape)
    known = jax.lax.map(
      lambda own: confidence_lib.known(*own, shop.config.confidence), (runs.exemplars, runs.head)
    )

    def add_strength(number, everything):
      of_run = sampler(keys, strengths[number], runs, learned)

      def add_run(run, everything):
        parts = known, runs.standardizer, runs.head
        made = judge(*of_run(run), *jax.tree.map(lambda x: x[run], parts))
        return jax.tree.map(lambda x, own: _put(x, own, run, number), everything, made)

      return jax.lax.fori_loop(0, num_runs, add_run, everything)

    # Written in place: the output of a map would lie beside it.
    return jax.lax.fori_loop(0, num_strengths, add_strength, everything)

  return jax.jit(make_all, out_shardings=mesh_lib.replicated(mesh))


def make(
  name: str,
  shop: Workshop,
  runs: FeatureRuns,
  run: loop.Run,
  folder: pathlib.Path,
  made: np.ndarray,
  chosen: Sequence[float],
) -> SyntheticFeatures:
  """Synthetic features of R runs, on the devices.

  Args:
    name: of the generator.
    shop: its settings.
    runs: what it learns from.
    run: seeds, of which there are R, mesh and progress.
    folder: where `train` left its denoiser.
    made: [C] features per class, M in all.
    chosen: K strengths.
  """
  labels = np.repeat(np.arange(len(made)), made).astype(np.int32)
  number = np.concatenate([np.arange(n) for n in made]).astype(np.int32)
  learned = _learned(name, shop, runs, run, folder)
  dim = runs.exemplars.features.shape[-1]
  program = sampling_program(name, shop, dim, tuple(made.tolist()), run.mesh)
  run.progress.say(f"sampling {len(labels):,} features per run with {name} ...")
  features, confidence = jax.block_until_ready(
    program(run.keys(f"sample/{name}"), jnp.asarray(chosen, jnp.float32), runs, learned)
  )
  return SyntheticFeatures(features=features, labels=labels, confidence=confidence, number=number)
