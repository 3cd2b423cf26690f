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
from memdiff.experiments.augmented_runs import FoldOrSeed, critic_folder, second_folder
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


def _state(fold_or_seed: FoldOrSeed, folder: pathlib.Path) -> Any:
  """Its classifier, with a leading axis of one."""
  state = results.load(folder, fold_or_seed.experiment.mesh)
  return jax.tree.map(lambda x: x[None], fold_or_seed.of(state))


def _critic_state(fold_or_seed: FoldOrSeed) -> Any:
  return _state(fold_or_seed, critic_folder(fold_or_seed.experiment, fold_or_seed.part))


def _statistics(fold_or_seed: FoldOrSeed) -> Mapping[str, np.ndarray]:
  experiment, rows = fold_or_seed.experiment, fold_or_seed.rows[None]
  return image_batches.fold_data(experiment.config.encoder, experiment.dataset, rows)["statistics"]


def real_features(fold_or_seed: FoldOrSeed) -> np.ndarray:
  """Of its training images, by its critic. [n, D]."""
  state, statistics = _critic_state(fold_or_seed), _statistics(fold_or_seed)
  seen = fold_or_seed.experiment, CRITIC_LOSS, state, fold_or_seed.images, statistics
  return forward_images(*seen)[1][0]


def make_critic(fold_or_seed: FoldOrSeed) -> Critic:
  experiment, states = fold_or_seed.experiment, [_critic_state(fold_or_seed)]
  if experiment.config.pool.needs_second:
    states.append(_state(fold_or_seed, second_folder(experiment, fold_or_seed.part)))
  features, num_classes = real_features(fold_or_seed), experiment.dataset.num_classes
  means = class_directions(features, fold_or_seed.labels, num_classes)
  return Critic(experiment, tuple(states), _statistics(fold_or_seed), means)


def make_judge(fold_or_seed: FoldOrSeed) -> Judge:
  """The critic, as far as noise is chosen by it."""
  data, config = fold_or_seed.experiment.dataset, fold_or_seed.experiment.config
  labels, images = fold_or_seed.labels, fold_or_seed.images
  sums = np.zeros((data.num_classes, *images.shape[1:]))
  np.add.at(sums, labels, images / 127.5 - 1)
  counts = np.bincount(labels, minlength=data.num_classes)
  features = real_features(fold_or_seed)
  state, statistics = _critic_state(fold_or_seed), _statistics(fold_or_seed)
  params = jax.tree.map(lambda x: x[0], (state, statistics))
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
