"""LDMLR, the closest published peer: class-conditional diffusion of features, without a memory.

Han et al., "Latent-based diffusion model for long-tailed recognition", CVPR workshop L3D-IVU 2024,
arXiv 2404.04517, as two rows: `ldmlr_published` does what the authors' code does, `ldmlr` has those
defects mended that are not the idea. Each is a field of LDMLRConfig and can be mended alone:

- `units`: the code maps the encoder's features x to 2 x - 1 and clips what it samples to [-1, 1],
  so that no generated feature is above 1 or below 0, while ReLU features have no upper bound;
- `positions`: its U-Net cannot tell one dimension of a feature from another (`unet1d`);
- `fixed_batches`: the same minibatches in every epoch;
- `optimizer`, `ema_decay`: SGD at 1e-4 without momentum, and no average of the weights;
- `snr_weighted`: the x0 error weighs by signal / noise, up to 2.5e4 at the first step: next to no
  weight where a class is decided.

The code also generates 20 % of each class's own count (`published_numbers`), which keeps the
imbalance; `ldmlr` is filled like every other generator. Both rows are trained and sampled by the
one diffusion engine. Different from the code in both: features of the encoder in evaluation mode.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from memdiff.diffusion import denoiser_training, sampler
from memdiff.diffusion.denoiser_training import Batch, TrainingConfig
from memdiff.diffusion.sampler import Solver
from memdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig
from memdiff.diffusion.terms import ObjectiveConfig
from memdiff.memory.exemplars import Exemplars
from memdiff.memory.feature_space import FeatureRuns, Standardizer
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.loop import Stage
from memdiff.runtime.mesh import replicate
from memdiff.runtime.train_state import OptimizerConfig
from memdiff.synthesis.generator import Generator, Sampler
from memdiff.synthesis.unet1d import GROUPS, UNet1D

UNITS = ("raw_range", "standardized")
_CHUNK = 1024  # samples at a time, at most


@dataclasses.dataclass(frozen=True)
class LDMLRConfig:
  """One row; see the module for what the fields stand for."""

  width: int
  multipliers: tuple[int, ...]  # of the width, by level
  positions: bool
  units: str  # one of UNITS
  fixed_batches: bool
  snr_weighted: bool
  schedule: ScheduleConfig
  ema_decay: float
  batch_size: int
  num_steps: int
  optimizer: OptimizerConfig
  sampler: str  # one of memdiff.diffusion.sampler.SAMPLERS
  sample_steps: int
  x0_limit: float

  def __post_init__(self):
    if self.width % GROUPS:
      raise ValueError(f"width is {self.width}, but must be a multiple of {GROUPS}.")


ROWS = {
  "ldmlr_published": LDMLRConfig(
    width=64,
    multipliers=(1, 2, 4, 8),
    positions=False,
    units="raw_range",
    fixed_batches=True,
    snr_weighted=True,
    schedule=ScheduleConfig("cosine", 1000),
    ema_decay=0.0,  # the average is the weights
    batch_size=256,
    num_steps=8643,  # 201 epochs of CIFAR-100-LT at imbalance 100
    optimizer=OptimizerConfig(
      "sgd", 1e-4, "constant", milestones=(), factors=(), momentum=0.0, weight_decay=0.0, warmup=0.0
    ),
    sampler="ddpm",
    sample_steps=1000,
    x0_limit=1.0,
  ),
  "ldmlr": LDMLRConfig(
    width=64,
    multipliers=(1, 2, 4, 8),
    positions=True,
    units="standardized",
    fixed_batches=False,
    snr_weighted=False,
    schedule=ScheduleConfig("cosine", 1000),
    ema_decay=0.999,
    batch_size=256,
    num_steps=8643,
    optimizer=OptimizerConfig(
      "adamw",
      3e-4,
      "cosine",
      milestones=(),
      factors=(),
      weight_decay=0.01,
      warmup=0.05,
      clip_norm=1.0,
    ),
    sampler="ddim",
    sample_steps=50,
    x0_limit=8.0,
  ),
}


@flax.struct.dataclass
class TrainingRows:
  """One run's features in the denoiser's units and a random order; padding comes last."""

  features: Any  # [N, D]
  labels: Any  # [N] int32
  count: Any  # [] int32, rows that are not padding


class NoiseFromSample(nn.Module):
  """The noise that a denoiser's x0 stands for: eps = (x_t - s x0) / n.

  Its squared error is that of x0 times the signal-to-noise ratio s^2 / n^2 (Salimans and Ho 2022,
  section 4), so that the engine, which weighs all times alike, weighs as LDMLR does.
  """

  denoiser: nn.Module
  schedule: ScheduleConfig

  @nn.compact
  def __call__(self, x_t: jax.Array, t: jax.Array, label: jax.Array, memory: Any):
    x0, bottleneck = self.denoiser(x_t, t, label, memory)
    schedule = NoiseSchedule(self.schedule)
    step = jnp.round(t * (schedule.num_steps / 1000)).astype(jnp.int32)  # inverts model_time
    signal, noise = schedule.scales(step, x_t)
    return (x_t - signal * x0) / noise, bottleneck


def published_numbers(train_counts: np.ndarray) -> np.ndarray:
  """How many features the published code makes per class: max(round(0.2 n), 5), 0 of none. [C]."""
  train_counts = np.asarray(train_counts)
  numbers = np.maximum(np.round(0.2 * train_counts).astype(int), 5)
  return np.where(train_counts > 0, numbers, 0)


def to_denoiser(config: LDMLRConfig, standardizer: Standardizer, features: jax.Array) -> jax.Array:
  """Standardised features [N, D] in the units that the denoiser is trained on."""
  if config.units == "standardized":
    return features
  return 2 * (features * standardizer.scale[None] + standardizer.mean[None]) - 1


def from_denoiser(config: LDMLRConfig, standardizer: Standardizer, x: jax.Array) -> jax.Array:
  """The inverse of `to_denoiser`."""
  return x if config.units == "standardized" else standardizer.forward((x + 1) / 2)


def make_rows(
  config: LDMLRConfig, exemplars: Exemplars, standardizer: Standardizer, num_classes: int
) -> TrainingRows:
  """Of exemplars and a standardizer that lead with runs."""
  features = jax.vmap(lambda s, x: to_denoiser(config, s, x))(standardizer, exemplars.features)
  labels = mesh_lib.fetch(exemplars.labels)
  place = np.random.default_rng(0).random(labels.shape)
  order = np.argsort(np.where(labels < num_classes, place, 2.0), axis=1)
  return TrainingRows(
    features=np.take_along_axis(mesh_lib.fetch(features), order[:, :, None], axis=1),
    labels=np.take_along_axis(labels, order, axis=1),
    count=np.sum(labels < num_classes, axis=1, dtype=np.int32),
  )


def draw_batch(key: jax.Array, rows: TrainingRows, config: LDMLRConfig) -> Batch:
  """A minibatch of one run: rows drawn at random, or one of the fixed minibatches at random.

  The last fixed minibatch of an epoch is filled up from the first rows.
  """
  size = config.batch_size
  if config.fixed_batches:
    first = size * jax.random.randint(key, (), 0, -(-rows.count // size))
    index = (first + jnp.arange(size)) % rows.count
  else:
    index = jax.random.randint(key, (size,), 0, rows.count)
  return Batch(x0=rows.features[index], label=rows.labels[index], memory=())


@functools.lru_cache(maxsize=8)
def _draw(config: LDMLRConfig) -> Callable:
  """(key, shared, rows) -> Batch; the same function for seeds and folds."""
  return lambda key, _, rows: draw_batch(key, rows, config)


def make_denoiser(config: LDMLRConfig, num_classes: int, feature_dim: int) -> UNet1D:
  return UNet1D(num_classes, feature_dim, config.width, config.multipliers, config.positions)


def make_stage(
  name: str,
  config: LDMLRConfig,
  exemplars: Exemplars,
  standardizer: Standardizer,
  num_classes: int,
  mesh: Mesh,
) -> Stage:
  """The stage that trains a row's denoiser.

  Args:
    name: of the row, for folder and curves.
    config: for example ROWS[name].
    exemplars: to learn from, leading with runs.
    standardizer: of the exemplars, leading with runs.
    num_classes: C.
    mesh: the device mesh.
  """
  denoiser = make_denoiser(config, num_classes, exemplars.features.shape[-1])
  settings = TrainingConfig(
    schedule=config.schedule,
    prediction="eps" if config.snr_weighted else "x0",
    objective=ObjectiveConfig(),
    ema_decay=config.ema_decay,
    num_steps=config.num_steps,
    optimizer=config.optimizer,
  )
  stage = denoiser_training.make_stage(
    settings,
    NoiseFromSample(denoiser, config.schedule) if config.snr_weighted else denoiser,
    _draw(config),
    (),
    replicate(mesh, make_rows(config, exemplars, standardizer, num_classes)),
    mesh,
  )
  return dataclasses.replace(stage, name=name)


def sample(
  key: jax.Array,
  config: LDMLRConfig,
  params: Any,
  standardizer: Standardizer,
  labels: jax.Array,
  num_classes: int,
) -> jax.Array:
  """Features of one run, chunk by chunk; pure, to be jitted and vmapped over runs.

  Args:
    key: randomness.
    config: of the row.
    params: the stage's `ema_params`.
    standardizer: of the run.
    labels: [M] int32.
    num_classes: C.

  Returns:
    [M, D] standardised.
  """
  denoiser = make_denoiser(config, num_classes, standardizer.mean.shape[0])
  variables = {"params": params["denoiser"] if config.snr_weighted else params}
  schedule = NoiseSchedule(config.schedule)
  solver = Solver(config.sampler, config.sample_steps, "x0", config.x0_limit)
  num_chunks = max(-(-labels.shape[0] // _CHUNK), 1)
  chunk = -(-labels.shape[0] // num_chunks)  # of one size, so that little is padding
  padded = jnp.pad(labels, (0, num_chunks * chunk - labels.shape[0])).reshape(num_chunks, chunk)

  def make_predict(labels):
    context = denoiser.apply(variables, labels, (), method="condition")
    return lambda x, t: denoiser.apply(variables, x, t, context, method="denoise")[0]

  samples = sampler.sample_in_chunks(
    make_predict, padded, schedule, (chunk, denoiser.feature_dim), key, solver
  )[: labels.shape[0]]
  return from_denoiser(config, standardizer, samples)


@dataclasses.dataclass(frozen=True)
class LDMLR(Generator):
  """A row as a generator."""

  trains = True
  name: str
  config: LDMLRConfig
  num_classes: int

  def numbers(self, train_counts: np.ndarray) -> np.ndarray | None:
    return published_numbers(train_counts) if self.name == "ldmlr_published" else None

  def stage(self, runs: FeatureRuns, mesh: Mesh) -> Stage:
    return make_stage(
      self.name, self.config, runs.exemplars, runs.standardizer, self.num_classes, mesh
    )

  def sampler(self, labels: np.ndarray, feature_dim: int, mesh: Mesh) -> Sampler:
    del feature_dim, mesh

    def of_runs(keys, strength, runs, params):
      del strength

      def of_run(key, params, standardizer):
        return sample(key, self.config, params, standardizer, labels, self.num_classes)

      features = jax.vmap(of_run)(keys, params, runs.standardizer)
      return lambda run: (features[run], jnp.ones(labels.shape))

    return of_runs


def row(name: str, share: float, num_classes: int) -> LDMLR:
  """A row of ROWS, trained for a share of its steps."""
  config = ROWS[name]
  num_steps = max(round(share * config.num_steps), 1)
  return LDMLR(name, dataclasses.replace(config, num_steps=num_steps), num_classes)
