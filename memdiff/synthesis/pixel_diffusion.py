"""Pixel diffusion: the diffusion engine's stage on images of classes."""

import functools
from collections.abc import Callable

import numpy as np
from jax.sharding import Mesh

from input_pipeline.batches import draw_probabilities
from memdiff.diffusion import denoiser_training
from memdiff.diffusion.denoiser_training import LateBatches
from memdiff.diffusion.unet import UNet
from memdiff.runtime.loop import Stage
from memdiff.synthesis.pixel_batches import draw_batch
from memdiff.synthesis.pixel_data import ImageData, Part
from memdiff.synthesis.pixel_settings import PixelDiffusionConfig


def make_denoiser(config: PixelDiffusionConfig, num_classes: int, channels: int) -> UNet:
  return UNet(
    num_classes, channels, config.unet, config.memory.num_exemplars > 0, config.text.is_read
  )


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
