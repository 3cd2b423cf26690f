"""Draws images of known classes by a trained U-Net, chunk by chunk."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.random import stream
from memdiff.synthesis import pixel_diffusion
from memdiff.synthesis.pixel_diffusion import ImageData, PixelDiffusionConfig, SolverConfig


@dataclasses.dataclass(frozen=True)
class Drawer:
  """A trained U-Net, and what decides its samples.

  Attributes:
    config: of its training.
    sampling: how images are drawn, and the size of a chunk.
    data: the images it was trained on, whose exemplars it may look at or begin from.
    mesh: the device mesh.
    params: its averaged weights.
    seed: of the noise.
    key: of the choice of exemplars, and of images to begin from.
  """

  config: PixelDiffusionConfig
  sampling: SolverConfig
  data: ImageData
  mesh: Mesh
  params: Any
  seed: int
  key: jax.Array

  def draw(self, labels: np.ndarray, start: int, scale: float) -> np.ndarray:
    """A chunk of images, of which none depends on how many there are.

    Args:
      labels: [n], at most `sampling.chunk_size`.
      start: the number of the first image.
      scale: of the guidance, 1 for none.

    Returns:
      [n, H, W, ch] uint8.
    """
    program = pixel_diffusion.sampling_program(
      self.config,
      self.sampling,
      self.data.images.shape[1:],
      self.data.by_class.counts.shape[0],
      scale != 1,
      self.mesh,
    )
    padded = np.resize(labels, self.sampling.chunk_size).astype(np.int32)
    numbers = np.uint32(self.seed), np.int32(start), np.float32(scale)
    placed, *numbers = mesh_lib.replicate(self.mesh, (padded, *numbers))
    key = stream(self.key, "of_chunk", start)
    memory, number = (), self.config.memory.num_exemplars
    if number:
      memory = pixel_diffusion.exemplars_of(self.data, placed, key, number)
    origin = ()
    if self.sampling.from_images:
      origin = pixel_diffusion.origins_of(self.data, placed, stream(key, "origins"))
    images = mesh_lib.fetch(program(self.params, placed, memory, origin, *numbers))
    return np.asarray(images)[: len(labels)]
