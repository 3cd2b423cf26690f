"""Pixel diffusion: the diffusion engine's stage on images of classes, and its samples."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from input_pipeline.batches import (
  ByClass,
  draw_labels,
  draw_members,
  draw_probabilities,
  group_by_class,
)
from memdiff.config import at_least, between, each, one_of, setting
from memdiff.diffusion import denoiser_training, objectives, terms
from memdiff.diffusion.denoiser_training import Batch, LateBatches, TrainingConfig
from memdiff.diffusion.exemplar_images import ExemplarImages
from memdiff.diffusion.sampler import SAMPLERS, Solver, guided, sample
from memdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig
from memdiff.diffusion.unet import Augmented, UNet, UNetConfig
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.loop import Stage
from memdiff.runtime.random import stream
from memdiff.runtime.train_state import OptimizerConfig
from memdiff.synthesis import pixel_augmentation, pixel_memory
from memdiff.synthesis.pixel_augmentation import AugmentationConfig
from memdiff.synthesis.pixel_memory import PixelMemoryConfig

DROPS = ("image", "batch")


@dataclasses.dataclass(frozen=True)
class PixelDiffusionConfig(TrainingConfig):
  """DDPM as long-tailed image generation trains it; the defaults are CORAL's and CBDM's."""

  schedule: ScheduleConfig = setting(
    ScheduleConfig(name="linear"), "how noise grows over the steps"
  )
  prediction: str = setting("eps", "what the denoiser predicts", one_of(objectives.PREDICTIONS))
  ema_decay: float = setting(0.9999, "of the averaged weights, which sample", between(0, 0.999999))
  num_steps: int = setting(150_000, "training steps", at_least(1))
  optimizer: OptimizerConfig = setting(
    OptimizerConfig(
      name="adamw", learning_rate=2e-4, schedule="constant", milestones=(), factors=(),
      weight_decay=0.0, warmup=0.033, clip_norm=1.0,
    ),
    "of the denoiser; Adam, since nothing decays",
  )  # fmt: skip
  unet: UNetConfig = setting(UNetConfig(), "the network")
  class_exponent: float = setting(
    1.0, "classes are drawn by count^this: 1 as they are, 0 balanced", between(0, 1)
  )
  balanced_last: float = setting(
    0.0, "share of the steps, the last ones, that draw every class equally often", between(0, 1)
  )
  label_dropout: float = setting(0.1, "share of the images without label", between(0, 1))
  dropped_by: str = setting(
    "image", "whose labels are dropped together; batch: as CBDM's and CORAL's code", one_of(DROPS)
  )
  mirror: bool = setting(True, "whether half of the images are flipped left to right")
  augmentation: AugmentationConfig = setting(
    AugmentationConfig(), "ADA: images are changed, and the U-Net is told how"
  )
  memory: PixelMemoryConfig = setting(PixelMemoryConfig(), "memdiff: exemplars as a condition")
  batch_size: int = setting(128, "images", at_least(1))

  def __post_init__(self):
    if terms.uses_reserve(self.objective) and not self.unet.reserve.rank_ratio:
      raise ValueError(
        "objective.capacity is on, but the U-Net has no reserve; set unet.reserve.rank_ratio."
      )


@dataclasses.dataclass(frozen=True)
class SolverConfig:
  """How a trained denoiser is run backwards."""

  sampler: str = setting("dpm++", "the solver of the reverse process", one_of(SAMPLERS))
  num_steps: int = setting(20, "visited steps", at_least(2))
  chunk_size: int = setting(500, "images at a time, and in a file", at_least(1))
  start: float = setting(
    1.0,
    "how far training images of the class are noised to begin with, as a share of the steps; 1:"
    " noise alone (SDEdit)",
    between(0.01, 1),
  )

  @property
  def from_images(self) -> bool:
    return self.start < 1


@dataclasses.dataclass(frozen=True)
class SamplingConfig(SolverConfig):
  """How many images are drawn, and how they are guided."""

  guidance: tuple[float, ...] = setting(
    (1.0,),
    "scales of the guidance, 1 + omega; the first is the one of the tables, 1: none",
    each(lambda s: s >= 0, "numbers from 0"),
  )
  per_class: int = setting(1000, "images of every class", at_least(1))
  png: bool = setting(False, "whether every image is written as a .png file too")


@flax.struct.dataclass
class ImageData:
  """What all seeds learn from, on the devices."""

  images: Any  # [N, H, W, ch] uint8
  by_class: ByClass
  places: Any  # [N] int32, where each image is in `by_class.order`
  probe: Any = None  # real images to look at while training, a `pixel_bottlenecks.Probe`


def make_data(images: np.ndarray, labels: np.ndarray, num_classes: int, mesh: Mesh) -> ImageData:
  """Images [N, H, W, ch] uint8 and labels [N] on every device."""
  by_class = group_by_class(labels, num_classes)
  places = np.argsort(by_class.order).astype(np.int32)
  return mesh_lib.replicate(mesh, ImageData(images, by_class, places))


@flax.struct.dataclass
class Part:
  """The training images that a run learns from if it is not all; of several runs, they lead."""

  by_class: ByClass
  places: Any  # [N] int32, as in ImageData
  cumulative: Any  # [C] cumulated probability of drawing each class
  late: Any  # [C] the same in balanced batches at the end of the training

  def of(self, data: ImageData) -> ImageData:
    """The images of one run."""
    return data.replace(by_class=self.by_class, places=self.places)


def make_parts(
  config: PixelDiffusionConfig, labels: np.ndarray, rows: np.ndarray, num_classes: int, mesh: Mesh
) -> Part:
  """Of runs that learn from `rows` [R, A] of the images with `labels` [N]; -1 is no image."""
  parts = []
  for chosen in rows:
    of_run = np.full(len(labels), num_classes)  # an image that does not train is of no class
    of_run[chosen[chosen >= 0]] = labels[chosen[chosen >= 0]]
    by_class = group_by_class(of_run, num_classes)
    exponents = (config.class_exponent, 0.0)
    weights = [np.cumsum(draw_probabilities(by_class.counts, e)) for e in exponents]
    weights = np.array(weights, np.float32)
    parts.append(Part(by_class, np.argsort(by_class.order).astype(np.int32), *weights))
  return mesh_lib.replicate(mesh, jax.tree.map(lambda *leaves: np.stack(leaves), *parts))


def to_model(images: jax.Array) -> jax.Array:
  """uint8 -> float32 from -1 to 1."""
  return images.astype(jnp.float32) / 127.5 - 1


def to_pixels(x: jax.Array) -> jax.Array:
  """float32 from -1 to 1, or beyond, -> uint8."""
  return jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8)


def draw_batch(
  key: jax.Array,
  data: ImageData,
  cumulative: np.ndarray | jax.Array,
  config: PixelDiffusionConfig,
) -> Batch:
  """A batch of images, a class first, drawn with replacement.

  Args:
    key: of the step.
    data: see there.
    cumulative: [C] cumulated probability of drawing each class.
    config: batch size, flips, and how labels are dropped (the unconditional model of guidance).
  """
  size, num_classes = config.batch_size, len(cumulative)
  label = draw_labels(stream(key, "class"), jnp.asarray(cumulative, jnp.float32), size)
  index = draw_members(stream(key, "member"), data.by_class, label)
  coins = (1,) if config.dropped_by == "batch" else (size,)
  dropped = jax.random.bernoulli(stream(key, "drop"), config.label_dropout, coins)
  dropped = jnp.broadcast_to(dropped, (size,))
  x0, condition = to_model(data.images[index]), _Conditions(key, data, config, dropped)
  if config.memory.num_exemplars:
    memory, shown = condition.with_exemplars(label, index)
    x0 = pixel_memory.turned(x0, shown.ways)
  else:
    memory, shown = (), None
  x0, vector = _changed(key, x0, config)
  batch = Batch(x0=x0, label=condition.told(label, shown), memory=memory)
  needed = terms.needed(config.objective)
  invented = jnp.zeros(size, bool) if shown is None else shown.invented
  if "true_label" in needed:  # a class that was made up has no other member in the batch
    batch = batch.replace(true_label=jnp.where(invented, num_classes + jnp.arange(size), label))
  if "class_count" in needed:
    batch = batch.replace(class_count=jnp.where(invented, 0, data.by_class.counts[label]))
  if "class_share" in needed:
    share, rarity = (w[label] for w in objectives.capacity_weights(data.by_class.counts))
    batch = batch.replace(
      class_share=jnp.where(invented, 0, share), class_rarity=jnp.where(invented, 0, rarity)
    )
  if "other_label" in needed:
    weights = objectives.other_weights(data.by_class.counts, config.objective.other_labels)
    other = draw_labels(stream(key, "other"), weights, size)
    other_memory = () if shown is None else condition.of_others(other, label, memory, shown)
    batch = batch.replace(other_label=condition.told(other, shown), other_memory=other_memory)
  if vector is None:
    return batch
  other_memory = None if batch.other_label is None else Augmented(batch.other_memory, vector)
  return batch.replace(memory=Augmented(batch.memory, vector), other_memory=other_memory)


def _changed(
  key: jax.Array, x0: jax.Array, config: PixelDiffusionConfig
) -> tuple[jax.Array, jax.Array | None]:
  """Images mirrored or augmented; (images, what the U-Net is told of it, or None)."""
  if probability := config.augmentation.probability:
    return pixel_augmentation.augment(stream(key, "augment"), x0, probability, config.mirror)
  return (_mirrored(stream(key, "mirror"), x0) if config.mirror else x0), None


def _mirrored(key: jax.Array, x: jax.Array) -> jax.Array:
  """Images [B, ..., H, W, ch], half of them flipped left to right."""
  flip = jax.random.bernoulli(key, 0.5, x.shape[:-3])
  return jnp.where(flip[..., None, None, None], x[..., ::-1, :], x)


@dataclasses.dataclass(frozen=True)
class _Conditions:
  """What the denoiser is told of the rows of a batch, whose labels are `dropped` or not [B]."""

  key: jax.Array
  data: ImageData
  config: PixelDiffusionConfig
  dropped: jax.Array

  def told(self, label: jax.Array, shown: pixel_memory.Shown | None) -> jax.Array:
    """The label, or "no class"."""
    silent = self.dropped if shown is None else self.dropped | shown.hidden
    return jnp.where(silent, self.data.by_class.counts.shape[0], label)

  def with_exemplars(self, label: jax.Array, index: jax.Array):
    """(exemplars, themselves left out, and what is shown of the rows)."""
    number = self.config.memory.num_exemplars
    found, mask = pixel_memory.draw_exemplars(
      stream(self.key, "exemplars"), self.data.by_class, label, number, self.data.places[index]
    )
    mask = pixel_memory.thin_out(stream(self.key, "thin"), mask)
    channels = self.data.images.shape[-1]
    shown = pixel_memory.draw_shown(
      self.key, self.config.memory, mask.any(axis=1), channels, self.config.mirror
    )
    return self._placed(found, mask, shown, "mirror_exemplars"), shown

  def of_others(self, other: jax.Array, label: jax.Array, memory: ExemplarImages, shown):
    """Exemplars of the other classes; those of the row itself if it is the same class."""
    found, mask = pixel_memory.draw_exemplars(
      stream(self.key, "other_exemplars"),
      self.data.by_class,
      other,
      self.config.memory.num_exemplars,
    )
    mask = pixel_memory.thin_out(stream(self.key, "thin_other"), mask)
    placed = self._placed(found, mask, shown, "mirror_others")
    same = other == label
    return jax.tree.map(
      lambda a, b: jnp.where(same.reshape(-1, *(1,) * (a.ndim - 1)), a, b), memory, placed
    )

  def _placed(self, index: jax.Array, mask: jax.Array, shown, name: str) -> ExemplarImages:
    """The exemplars of these indices as the U-Net sees them, turned as their rows are."""
    images = pixel_memory.turned(to_model(self.data.images[index]), shown.ways)
    if self.config.mirror:
      images = _mirrored(stream(self.key, name), images)
    return ExemplarImages(images, mask).forget(self.dropped)


def make_denoiser(config: PixelDiffusionConfig, num_classes: int, channels: int) -> UNet:
  return UNet(num_classes, channels, config.unet, config.memory.num_exemplars > 0)


def make_stage(
  config: PixelDiffusionConfig,
  data: ImageData,
  counts: np.ndarray,
  mesh: Mesh,
  parts: Part | None = None,
) -> Stage:
  """The stage that trains the U-Net.

  Args:
    config: of the training.
    data: the images; their `by_class` is not read if there are parts.
    counts: [C] images of the classes.
    mesh: the device mesh.
    parts: of `make_parts`, what each run learns from; None: all of it.
  """
  denoiser = make_denoiser(config, len(counts), data.images.shape[-1])
  numbers = tuple(int(count) for count in counts)
  if parts is None:
    draw, balanced = _draw(config, numbers, config.class_exponent), _draw(config, numbers, 0.0)
  else:
    draw, balanced = _draw_of_part(config, late=False), _draw_of_part(config, late=True)
  late = None
  if config.balanced_last:
    late = LateBatches(round((1 - config.balanced_last) * config.num_steps), balanced)
  per_seed = () if parts is None else parts
  return denoiser_training.make_stage(config, denoiser, draw, data, per_seed, mesh, late)


@functools.lru_cache(maxsize=16)
def _draw(config: PixelDiffusionConfig, counts: tuple[int, ...], exponent: float) -> Callable:
  """(key, data, per_seed) -> Batch; the same function for stages of one config."""
  cumulative = np.cumsum(draw_probabilities(np.array(counts), exponent))
  return lambda key, data, _: draw_batch(key, data, cumulative, config)


@functools.lru_cache(maxsize=16)
def _draw_of_part(config: PixelDiffusionConfig, *, late: bool) -> Callable:
  """(key, data, part) -> Batch; the same function for stages of one config."""

  def draw(key, data, part):
    return draw_batch(key, part.of(data), part.late if late else part.cumulative, config)

  return draw


@functools.partial(jax.jit, static_argnums=3)
def exemplars_of(data: ImageData, labels: jax.Array, key: jax.Array, number: int) -> ExemplarImages:
  """Exemplars of `labels` [B], `number` of each at most, drawn anew for every row."""
  index, mask = pixel_memory.draw_exemplars(key, data.by_class, labels, number)
  return ExemplarImages(to_model(data.images[index]), mask)


@jax.jit
def origins_of(data: ImageData, labels: jax.Array, key: jax.Array) -> jax.Array:
  """Images of `labels` [B] to begin from, drawn at random. uint8 [B, H, W, ch]."""
  return data.images[draw_members(key, data.by_class, labels)]


@functools.lru_cache(maxsize=16)
def sampling_program(
  config: PixelDiffusionConfig,
  sampling: SolverConfig,
  shape: tuple[int, ...],
  num_classes: int,
  guides: bool,
  mesh: Mesh,
) -> Callable:
  """The jitted (params, labels [B], memory, origin, seed, chunk, scale) -> uint8 [B, H, W, ch].

  Memory is () or, for a U-Net that looks at exemplars, ExemplarImages of B rows; label C with
  exemplars is a class that training need not have seen. Origin is () or, if the solver starts from
  images, uint8 [B, H, W, ch]. Seed and chunk, whole numbers, decide the noise; it is the same for
  all methods and scales.

  Args:
    config: of the training.
    sampling: its solver.
    shape: [H, W, ch] of an image.
    num_classes: C, the label that means "no class".
    guides: whether there is guidance; at a scale of 1 the denoiser needs to run only once a step.
    mesh: the device mesh.
  """
  denoiser = make_denoiser(config, num_classes, shape[-1])
  solver = Solver(sampling.sampler, sampling.num_steps, config.prediction, x0_limit=1.0)
  schedule = NoiseSchedule(config.schedule)

  def draw(params, labels, memory, origin, seed, chunk, scale):
    key = stream(jax.random.key(seed), "sampling", chunk)

    def condition(label, memory):
      label, memory = mesh_lib.shard_batch((label, memory), mesh)
      return denoiser.apply({"params": params}, label, memory, method="condition")

    def unconditional():
      silent = memory.forget(jnp.ones(len(labels), bool)) if memory else memory
      return condition(jnp.full_like(labels, num_classes), silent)

    def call(x, t, context):
      x, context = mesh_lib.shard_batch((x, context), mesh)
      return denoiser.apply({"params": params}, x, t, context, method="denoise")[0]

    context = condition(labels, memory)
    predict = guided(call, context, unconditional, scale if guides else 1.0)
    begin = {}
    if sampling.from_images:
      begin = {"origin": to_model(origin), "start": sampling.start}
    return to_pixels(sample(predict, schedule, (len(labels), *shape), key, solver, **begin))

  return jax.jit(draw)
