"""Samples of pixel diffusion: a trained U-Net run backwards."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from input_pipeline.batches import draw_members
from memdiff.diffusion import guidance, seed_select
from memdiff.diffusion.exemplar_images import ExemplarImages
from memdiff.diffusion.sampler import Solver, sample
from memdiff.diffusion.schedules import NoiseSchedule
from memdiff.diffusion.text_condition import Captioned
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.random import normal, stream
from memdiff.synthesis import pixel_memory
from memdiff.synthesis.pixel_data import ImageData, to_model, to_pixels
from memdiff.synthesis.pixel_diffusion import make_denoiser
from memdiff.synthesis.pixel_settings import PixelDiffusionConfig, SolverConfig


@functools.partial(jax.jit, static_argnums=3)
def exemplars_of(data: ImageData, labels: jax.Array, key: jax.Array, number: int) -> ExemplarImages:
  """Exemplars of `labels` [B], `number` of each at most, drawn anew for every row."""
  index, mask = pixel_memory.draw_exemplars(key, data.by_class, labels, number)
  return ExemplarImages(to_model(data.images[index]), mask)


def memory_of(
  config: PixelDiffusionConfig,
  data: ImageData,
  labels: jax.Array,
  key: jax.Array,
  prompts: jax.Array | None = None,
) -> Any:
  """The memory that the U-Net of a config takes for rows of `labels` [B].

  Args:
    config: of the training.
    data: whose exemplars are shown.
    labels: [B] classes.
    key: of the choice of exemplars.
    prompts: [B, D] embeddings of what is said; None: nothing is.
  """
  memory, number = (), config.memory.num_shown
  if number:
    memory = exemplars_of(data, labels, key, number)
  if not config.text.is_read:
    return memory
  if prompts is None:
    prompts = jnp.zeros((len(labels), data.captions.shape[1]))
  return Captioned(memory, prompts)


@jax.jit
def origins_of(data: ImageData, labels: jax.Array, key: jax.Array) -> jax.Array:
  """Images of `labels` [B] to begin from, drawn at random. uint8 [B, H, W, ch]."""
  return data.images[draw_members(key, data.by_class, labels)]


@flax.struct.dataclass
class Wanted:
  """What B images are to show.

  Attributes:
    labels: [B] classes; C with exemplars or a prompt is one that training need not have seen.
    memory: of `memory_of`.
    origin: uint8 [B, H, W, ch] to begin from, or () if the solver does not.
    other_labels: [B] what they are not to show, or () if guidance needs nothing of the kind.
    other_memory: the memory of that.
    judge: what `features` needs, if noise is chosen; then also
    targets: [B, D] means of the features of each image's class, of length one, and
    references: [B, H, W, ch] its mean image, from -1 to 1.
  """

  labels: Any
  memory: Any = ()
  origin: Any = ()
  other_labels: Any = ()
  other_memory: Any = ()
  judge: Any = ()
  targets: Any = ()
  references: Any = ()


@functools.lru_cache(maxsize=16)
def sampling_program(
  config: PixelDiffusionConfig,
  sampling: SolverConfig,
  shape: tuple[int, ...],
  num_classes: int,
  guides: bool,
  mesh: Mesh,
  features: Callable[[Any, jax.Array], jax.Array] | None = None,
) -> Callable:
  """The jitted (params, Wanted, seed, chunk, scale) -> uint8 [B, H, W, ch].

  Seed and chunk, whole numbers, decide the noise; it is the same for all methods and scales.

  Args:
    config: of the training.
    sampling: its solver.
    shape: [H, W, ch] of an image.
    num_classes: C, the label that means "no class".
    guides: whether the scale is not 1; at 1, all but contrastive guidance leaves the condition as
      it is, and the denoiser needs to run only once a step.
    mesh: the device mesh.
    features: (Wanted.judge, images [B, H, W, ch] from -1 to 1) -> [B, D], by which the noise is
      chosen (SeedSelect); None: it is not.
  """
  denoiser = make_denoiser(config, num_classes, shape[-1])
  solver = Solver(sampling.sampler, sampling.num_steps, config.prediction, x0_limit=1.0)
  schedule = NoiseSchedule(config.schedule)

  def draw(params, wanted, seed, chunk, scale):
    key = stream(jax.random.key(seed), "sampling", chunk)
    labels, memory = wanted.labels, wanted.memory

    def condition(label, memory):
      label, memory = mesh_lib.shard_batch((label, memory), mesh)
      return denoiser.apply({"params": params}, label, memory, method="condition")

    def unconditional():
      silent = memory.forget(jnp.ones(len(labels), bool)) if memory else memory
      return condition(jnp.full_like(labels, num_classes), silent)

    def negative():
      return condition(wanted.other_labels, wanted.other_memory)

    def call(x, t, context):
      x, context = mesh_lib.shard_batch((x, context), mesh)
      return denoiser.apply({"params": params}, x, t, context, method="denoise")[0]

    context, how = condition(labels, memory), sampling.guide
    if how.annealing.noise:
      context = guidance.annealed(how.annealing, context, stream(key, "annealing"))
    if how.kind == guidance.CONTRASTIVE:
      factor = guidance.eps_factor(config.prediction, schedule)
      contexts = context, unconditional(), negative()
      predict = guidance.contrasted(call, contexts, scale, how.temperature, factor)
    else:
      other = negative if how.kind == guidance.NEGATIVE else unconditional
      predict = guidance.guided(call, context, other, scale if guides else 1.0)
    begin = {}
    if sampling.from_images:
      begin = {"origin": to_model(wanted.origin), "start": sampling.start}
    run = functools.partial(sample, predict, schedule, (len(labels), *shape), key, **begin)
    if features is None:
      return to_pixels(run(solver))
    judged = functools.partial(features, wanted.judge)
    loss = seed_select.loss_of(sampling.seeds, judged, wanted.targets, wanted.references)
    traced = dataclasses.replace(solver, last=len(seed_select.LAST))
    drawn = normal(stream(key, "seeds"), (len(labels), *shape))
    noise, _ = seed_select.select(
      sampling.seeds, lambda noise: run(traced, noise=noise), loss, drawn
    )
    return to_pixels(run(solver, noise=noise))

  return jax.jit(draw)
