"""Classifiers of real images that look at generated ones, so that filters can choose."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from memdiff.classifier import encoder, image_batches
from memdiff.experiments.augmented_runs import Part, critic_folder, second_folder
from memdiff.experiments.augmented_settings import CRITIC_LOSS
from memdiff.experiments.base import Experiment, forward_images
from memdiff.experiments.drawer import Judge, class_directions
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


def _state(experiment: Experiment, folder: pathlib.Path, run: int) -> Any:
  """A classifier of one run, which leads."""
  return jax.tree.map(lambda x: x[run : run + 1], results.load(folder, experiment.mesh))


def _statistics(experiment: Experiment, part: Part, run: int) -> Mapping[str, np.ndarray]:
  config, rows = experiment.config.encoder, part.rows[run : run + 1]
  return image_batches.fold_data(config, experiment.dataset, rows)["statistics"]


def real_features(experiment: Experiment, part: Part, run: int) -> np.ndarray:
  """Of the training images of one run, by its critic. [n, D]."""
  state = _state(experiment, critic_folder(experiment, part), run)
  images = experiment.dataset.train_images[part.rows_of(run)]
  statistics = _statistics(experiment, part, run)
  return forward_images(experiment, CRITIC_LOSS, state, images, statistics)[1][0]


def make_critic(experiment: Experiment, part: Part, run: int) -> Critic:
  data, folders = experiment.dataset, [critic_folder(experiment, part)]
  if experiment.config.pool.needs_second:
    folders.append(second_folder(experiment, part))
  features = real_features(experiment, part, run)
  means = class_directions(features, data.train_labels[part.rows_of(run)], data.num_classes)
  states = tuple(_state(experiment, folder, run) for folder in folders)
  return Critic(experiment, states, _statistics(experiment, part, run), means)


def make_judge(experiment: Experiment, part: Part, run: int) -> Judge:
  """The run's critic, as far as noise is chosen by it."""
  data, config = experiment.dataset, experiment.config
  rows = part.rows_of(run)
  labels, images = data.train_labels[rows], data.train_images[rows]
  sums = np.zeros((data.num_classes, *images.shape[1:]))
  np.add.at(sums, labels, images / 127.5 - 1)
  counts = np.bincount(labels, minlength=data.num_classes)
  features = real_features(experiment, part, run)
  state = _state(experiment, critic_folder(experiment, part), run)
  params = jax.tree.map(lambda x: x[0], (state, _statistics(experiment, part, run)))
  model = encoder.make_model(config.encoder, CRITIC_LOSS, data.num_classes)
  return Judge(
    features=_features(model, config.encoder.input),
    params=params,
    targets=class_directions(features, labels, data.num_classes).astype(np.float32),
    references=(sums / np.maximum(counts, 1)[:, None, None, None]).astype(np.float32),
  )


@functools.lru_cache(maxsize=4)
def _features(model: nn.Module, input_config: encoder.InputConfig) -> Callable:
  """As `Judge.features`; the same function for all runs, so that their program is one."""

  def features(params, images):
    state, statistics = params
    rows = encoder.normalize(input_config, (images + 1) * 127.5, statistics)
    return encoder.apply_eval(model, state, rows)[1]

  return features
