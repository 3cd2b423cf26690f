"""Images of classes on the devices, and which of them a run learns from."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from input_pipeline.batches import ByClass, draw_probabilities, group_by_class
from memdiff.runtime import mesh as mesh_lib


@flax.struct.dataclass
class ImageData:
  """What all seeds learn from, on the devices."""

  images: Any  # [N, H, W, ch] uint8
  by_class: ByClass
  places: Any  # [N] int32, where each image is in `by_class.order`
  captions: Any = None  # [N, D] embeddings of length one, 0 for images without; None: not read
  probe: Any = None  # real images to look at while training, a `pixel_bottlenecks.Probe`


def make_data(
  images: np.ndarray,
  labels: np.ndarray,
  num_classes: int,
  mesh: Mesh,
  captions: np.ndarray | None = None,
) -> ImageData:
  """Images [N, H, W, ch] uint8, labels [N] and embedded captions [N, D] on every device."""
  by_class = group_by_class(labels, num_classes)
  places = np.argsort(by_class.order).astype(np.int32)
  return mesh_lib.replicate(mesh, ImageData(images, by_class, places, captions))


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
  class_exponent: float, labels: np.ndarray, rows: np.ndarray, num_classes: int, mesh: Mesh
) -> Part:
  """Of runs that learn from `rows` [R, A] of the images with `labels` [N]; -1 is no image."""
  parts = []
  for chosen in rows:
    of_run = np.full(len(labels), num_classes)  # an image that does not train is of no class
    of_run[chosen[chosen >= 0]] = labels[chosen[chosen >= 0]]
    by_class = group_by_class(of_run, num_classes)
    exponents = (class_exponent, 0.0)
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
