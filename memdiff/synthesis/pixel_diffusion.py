"""Pixel diffusion: the diffusion engine's stage on images of classes."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from input_pipeline.batches import draw_probabilities
from memdiff.diffusion import denoiser_training
from memdiff.diffusion.denoiser_training import LateBatches, Tuned
from memdiff.diffusion.unet import UNet
from memdiff.runtime.loop import Stage
from memdiff.synthesis import pixel_tuning
from memdiff.synthesis.pixel_batches import draw_batch
from memdiff.synthesis.pixel_data import ImageData, Part
from memdiff.synthesis.pixel_settings import PixelDiffusionConfig


def make_denoiser(config: PixelDiffusionConfig, num_classes: int, channels: int) -> UNet:
  return UNet(num_classes, channels, config.unet, config.memory.is_shown, config.text.is_read)


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
  draw, balanced = _draws(config, counts, parts)
  late = None
  if config.balanced_last:
    late = LateBatches(round((1 - config.balanced_last) * config.num_steps), balanced)
  per_seed = () if parts is None else parts
  return denoiser_training.make_stage(config, denoiser, draw, data, per_seed, mesh, late)


def make_tuning_stage(
  config: PixelDiffusionConfig,
  kind: str,
  params: Any,
  data: ImageData,
  counts: np.ndarray,
  mesh: Mesh,
  parts: Part | None = None,
) -> Stage:
  """The stage that tunes trained U-Nets, on batches that draw every class equally often.

  Args:
    config: of their training.
    kind: one of `pixel_tuning.KINDS`.
    params: theirs, runs first, and what the kind needs beside them.
    data: as of `make_stage`; so are `counts`, `mesh` and `parts`.
    counts: [C].
    mesh: the device mesh.
    parts: what each run learns from.
  """
  config = pixel_tuning.training(kind, config)
  denoiser = make_denoiser(config, len(counts), data.images.shape[-1])
  _, draw = _draws(config, counts, parts)
  tuned = Tuned(params, () if parts is None else parts)
  tuning = pixel_tuning.KINDS[kind](config.tuning)
  stage = denoiser_training.make_stage(config, denoiser, draw, data, tuned, mesh, tuning=tuning)
  return dataclasses.replace(stage, name="tuning")


def _draws(
  config: PixelDiffusionConfig, counts: np.ndarray, parts: Part | None
) -> tuple[Callable, Callable]:
  """How batches are drawn as configured, and with every class equally often."""
  if parts is not None:
    return _draw_of_part(config, late=False), _draw_of_part(config, late=True)
  numbers = tuple(int(count) for count in counts)
  return _draw(config, numbers, config.class_exponent), _draw(config, numbers, 0.0)


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
