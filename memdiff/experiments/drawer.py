"""Draws images of known classes by a trained U-Net, chunk by chunk."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.random import stream
from memdiff.synthesis import pixel_sampling
from memdiff.synthesis.pixel_data import ImageData
from memdiff.synthesis.pixel_settings import PixelDiffusionConfig, SolverConfig
from memdiff.synthesis.text_to_image.prompts import Prompts


@dataclasses.dataclass(frozen=True, eq=False)
class Chunk:
  """Images that are drawn together, out of a series.

  Attributes:
    start: the number of the first.
    labels: [n] their classes.
    turns: [n] how many images of its class come before each in the series.
  """

  start: int
  labels: np.ndarray
  turns: np.ndarray


def chunks(labels: np.ndarray, size: int) -> Iterator[Chunk]:
  """A series of images of `labels` [N], `size` at a time."""
  turns = np.zeros(len(labels), int)
  for c in np.unique(labels):
    turns[labels == c] = np.arange((labels == c).sum())
  for start in range(0, len(labels), size):
    rows = slice(start, start + size)
    yield Chunk(start, labels[rows], turns[rows])


def class_directions(features: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
  """The means of features [n, D] of each class, of length one. [C, D]."""
  sums = np.zeros((num_classes, features.shape[1]))
  np.add.at(sums, labels, features)
  return sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)


def most_alike(directions: np.ndarray) -> np.ndarray:
  """The other class whose direction [C, D] is the nearest, of each. [C]."""
  cosines = directions @ directions.T
  np.fill_diagonal(cosines, -np.inf)
  return cosines.argmax(axis=1)


@dataclasses.dataclass(frozen=True, eq=False)
class Judge:
  """A classifier of real images, by which noise is chosen.

  Attributes:
    features: (params, images [B, H, W, ch] from -1 to 1) -> [B, D]; one function for all runs.
    params: of one run.
    targets: float32 [C, D] means of the features of each class, of length one.
    references: float32 [C, H, W, ch] its mean image, from -1 to 1.
  """

  features: Callable[[Any, jax.Array], jax.Array]
  params: Any
  targets: np.ndarray
  references: np.ndarray


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
    prompts: of the classes, if the U-Net reads them.
    alike: [C] the class that is most like each, if guidance leads away from it.
    judge: what chooses the noise, if it is chosen.
  """

  config: PixelDiffusionConfig
  sampling: SolverConfig
  data: ImageData
  mesh: Mesh
  params: Any
  seed: int
  key: jax.Array
  prompts: Prompts | None = None
  alike: np.ndarray | None = None
  judge: Judge | None = None

  def draw(self, chunk: Chunk, scale: float) -> dict[str, np.ndarray]:
    """A chunk of images, of which none depends on how many there are.

    Args:
      chunk: at most `sampling.chunk_size` images.
      scale: of the guidance, 1 for none.

    Returns:
      {"images": [n, H, W, ch] uint8, "labels": [n] int32}, and {"prompt": [n] texts} if the U-Net
      reads them.
    """
    program = pixel_sampling.sampling_program(
      self.config,
      self.sampling,
      self.data.images.shape[1:],
      self.data.by_class.counts.shape[0],
      scale != 1,
      self.mesh,
      self.judge and self.judge.features,
    )
    key = stream(self.key, "of_chunk", chunk.start)
    labels, memory, texts = self._told(chunk.labels, chunk.turns, key)
    wanted = pixel_sampling.Wanted(labels, memory)
    if self.sampling.from_images:
      origin = pixel_sampling.origins_of(self.data, labels, stream(key, "origins"))
      wanted = wanted.replace(origin=origin)
    if self.alike is not None:
      others = self.alike[chunk.labels]
      labels, memory, _ = self._told(others, np.zeros_like(chunk.turns), stream(key, "others"))
      wanted = wanted.replace(other_labels=labels, other_memory=memory)
    if self.judge:
      of_class = np.resize(chunk.labels, self.sampling.chunk_size)
      targets, references = self.judge.targets[of_class], self.judge.references[of_class]
      told = mesh_lib.replicate(self.mesh, (self.judge.params, targets, references))
      wanted = wanted.replace(**dict(zip(("judge", "targets", "references"), told, strict=True)))
    numbers = np.uint32(self.seed), np.int32(chunk.start), np.float32(scale)
    images = mesh_lib.fetch(program(self.params, wanted, *mesh_lib.replicate(self.mesh, numbers)))
    drawn = {"images": np.asarray(images)[: len(chunk.labels)]}
    drawn["labels"] = chunk.labels.astype(np.int32)
    return drawn | ({"prompt": np.array(texts)} if texts else {})

  def _told(
    self, labels: np.ndarray, turns: np.ndarray, key: jax.Array
  ) -> tuple[jax.Array, Any, list[str]]:
    """(labels, memory, prompts): what the U-Net is told of a chunk, filled up to its size."""
    texts, vectors, size = [], None, self.sampling.chunk_size
    if self.prompts:
      texts, vectors = self.prompts.of(labels, turns)
      vectors = mesh_lib.replicate(self.mesh, np.resize(vectors, (size, vectors.shape[1])))
    placed = mesh_lib.replicate(self.mesh, np.resize(labels, size).astype(np.int32))
    return placed, pixel_sampling.memory_of(self.config, self.data, placed, key, vectors), texts
