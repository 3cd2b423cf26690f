"""Bottlenecks of trained U-Nets: do they keep rare classes apart? CORAL's own diagnosis.

Real images, training's and others, are noised to one level and go through the U-Net under their
own label. What the U-Net makes of them in its middle is compared by cosine and drawn by t-SNE.
"""

from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from memdiff.contrastive import class_cosines
from memdiff.experiments.base import Experiment
from memdiff.experiments.image_store import device_data, read_samples, sample_folder, trained
from memdiff.runtime import mesh as mesh_lib
from memdiff.synthesis import image_methods, pixel_bottlenecks, pixel_sampling

if TYPE_CHECKING:
  from matplotlib.figure import Figure

_PER_CLASS, _CHUNK = 40, 256  # images that are looked at, and at a time


def _some_of_each(labels: np.ndarray, num_classes: int) -> np.ndarray:
  """Indices of the first images of every class."""
  return np.concatenate([np.flatnonzero(labels == c)[:_PER_CLASS] for c in range(num_classes)])


def _bottlenecks(
  experiment: Experiment, method: str, seed: int, images: np.ndarray, labels: np.ndarray
) -> np.ndarray:
  """[N, W] of images [N, ...] under their labels [N]."""
  config, mesh = image_methods.apply(method, experiment.config.diffusion), experiment.mesh
  program = pixel_bottlenecks.bottleneck_program(config, experiment.dataset.num_classes, mesh)
  params = trained(experiment, method, seed)
  shared = device_data(experiment)
  found = []
  for start in range(0, len(labels), _CHUNK):
    rows = [np.resize(x[start : start + _CHUNK], (_CHUNK, *x.shape[1:])) for x in (images, labels)]
    rows, told = mesh_lib.replicate(mesh, tuple(rows))
    key = experiment.run.keys("bottlenecks")[seed]
    memory = pixel_sampling.memory_of(config, shared, told, key)
    probe = pixel_bottlenecks.Probe(rows, told)
    found.append(np.asarray(mesh_lib.fetch(program(params, probe, memory, key))))
  return np.concatenate(found)[: len(labels)]


def _unseen(experiment: Experiment) -> tuple[np.ndarray, np.ndarray]:
  """(images, labels) of some images of every class that training has not seen."""
  data = experiment.dataset
  rows = _some_of_each(data.test_labels, data.num_classes)
  return data.test_images[rows], data.test_labels[rows]


def cosines(experiment: Experiment, method: str, seed: int) -> dict[str, float]:
  """{"intra_cosine", "inter_cosine"} of test images, each class weighing the same."""
  images, labels = _unseen(experiment)
  rows = jnp.asarray(_bottlenecks(experiment, method, seed, images, labels))
  found = class_cosines(rows, jnp.asarray(labels), experiment.dataset.num_classes)
  return {name: float(value) for name, value in found.items()}


def draw(experiment: Experiment, method: str, scale: float) -> "Figure":
  """The first seed's bottlenecks of training, test and generated images on one plane."""
  from memdiff.evaluation import plots  # matplotlib takes a second

  data = experiment.dataset
  train = _some_of_each(data.train_labels, data.num_classes)
  samples, sample_labels = read_samples(sample_folder(experiment, method, scale, 0))
  drawn = _some_of_each(sample_labels, data.num_classes)
  kinds = (
    (data.train_images[train], data.train_labels[train]),
    _unseen(experiment),
    (samples[drawn], sample_labels[drawn]),
  )
  embedded = [(_bottlenecks(experiment, method, 0, *kind), kind[1]) for kind in kinds]
  plane = plots.embed(*embedded, data.num_classes, max_per_class=_PER_CLASS)
  return plots.feature_map(
    plane,
    data.class_names,
    title=f"{method}: t-SNE map of the U-Net’s bottleneck",
    kinds=("training image", "test image, unseen", "generated"),
  )
