"""Classifiers of real images that look at generated ones, so that filters can choose."""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from memdiff.classifier import image_batches
from memdiff.experiments.augmented_runs import Part, critic_folder, second_folder
from memdiff.experiments.augmented_settings import CRITIC_LOSS
from memdiff.experiments.base import Experiment, forward_images
from memdiff.runtime import results
from memdiff.synthesis.image_filters import Signs


@dataclasses.dataclass(frozen=True)
class Critic:
  """What looks at images for one run: a classifier of its real ones, perhaps a second.

  Attributes:
    experiment: the experiment.
    states: of one or two classifiers.
    statistics: of the run's pixels.
    means: [C, D] of the features of each class, of length one.
  """

  experiment: Experiment
  states: tuple
  statistics: Mapping[str, np.ndarray]
  means: np.ndarray

  def look(self, images: np.ndarray, labels: np.ndarray, copied: np.ndarray) -> Signs:
    """The signs of images [M, H, W, ch], labels [M], of which some are copies [M]."""
    views = [
      forward_images(self.experiment, CRITIC_LOSS, state, images, self.statistics)
      for state in self.states
    ]
    logits, features = (x[0].astype(np.float64) for x in views[0])
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    near = _unit(features) * self.means[labels]
    return Signs(
      labels=labels,
      confidence=odds[np.arange(len(labels)), labels] / odds.sum(axis=1),
      predicted=logits.argmax(axis=1),
      second=views[1][0][0].argmax(axis=1) if len(views) > 1 else None,
      distance=1 - near.sum(axis=1),
      copied=copied,
    )


def _unit(features: np.ndarray) -> np.ndarray:
  return features / np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-12)


def make_critic(experiment: Experiment, part: Part, run: int) -> Critic:
  data, config = experiment.dataset, experiment.config
  folders = [critic_folder(experiment, part)]
  if config.pool.needs_second:
    folders.append(second_folder(experiment, part))
  loaded = [results.load(folder, experiment.mesh) for folder in folders]
  states = tuple(jax.tree.map(lambda x: x[run : run + 1], state) for state in loaded)
  known = image_batches.fold_data(config.encoder, data, part.rows[run : run + 1])
  rows = part.rows_of(run)
  _, features = forward_images(
    experiment, CRITIC_LOSS, states[0], data.train_images[rows], known["statistics"]
  )
  sums = np.zeros((data.num_classes, features.shape[-1]))
  np.add.at(sums, data.train_labels[rows], features[0])
  return Critic(experiment, states, known["statistics"], _unit(sums))
