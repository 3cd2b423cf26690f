"""The folds of an experiment on features: what each trains on, and what it is judged on."""

import dataclasses

import jax
import numpy as np

from memdiff.evaluation import cross_validation
from memdiff.experiments.base import Experiment, classifier_stage, forward_images
from memdiff.experiments.feature_settings import has_own_head
from memdiff.experiments.feature_store import load_features, with_class_embeddings
from memdiff.memory import feature_space
from memdiff.memory.feature_space import FeatureRuns
from memdiff.runtime import loop, programs
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.writers import TensorBoard


@dataclasses.dataclass(frozen=True)
class Folds:
  """The runs of cross-validation and what is held out in each."""

  runs: FeatureRuns
  run: loop.Run
  counts: np.ndarray  # [R, C] training examples
  held_out: np.ndarray  # [R, B] rows of the training set, -1 if there is none
  features: jax.Array  # [R, B, D] of them, standardised
  judged: cross_validation.Judged
  own_logits: np.ndarray | None  # [R, B, C] of the folds' own heads, where they were trained so

  def judged_rows(self, predictions: np.ndarray) -> np.ndarray:
    """Predictions [..., R, B] of held-out rows -> [..., E] in the order of `judged`."""
    return predictions[..., self.held_out >= 0]

  def at(self, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(run, column of `held_out`) of judged examples [n]."""
    run, column = np.nonzero(self.held_out >= 0)
    return run[examples], column[examples]


def make_folds(experiment: Experiment) -> Folds:
  """Deals the training set, trains encoders if asked, and builds the runs."""
  config, labels, num_classes = (
    experiment.config.selection,
    experiment.dataset.train_labels,
    experiment.dataset.num_classes,
  )
  train, held_out = cross_validation.fold_rows(labels, config)
  run = dataclasses.replace(
    experiment.run,
    seeds=tuple(range(config.num_runs)),
    streams="folds/",
    tensorboard=_fold_writer(experiment),
  )
  if config.encoder == "retrained":
    features, head = _encode_folds(experiment, run, train)
  else:
    arrays, head = load_features(experiment), None
    features = arrays["train"][:1]
    if "kernel" in arrays:
      head = {n: np.repeat(arrays[n][:1], config.num_runs, axis=0) for n in ("kernel", "bias")}
  run_labels = np.where(train >= 0, labels[np.maximum(train, 0)], num_classes)
  bank = feature_space.fill_bank(
    features,
    run_labels,
    num_classes,
    run.keys("memory_bank"),
    experiment.config.memory_bank,
    experiment.mesh,
    train,
  )
  runs = feature_space.make_runs(
    features, run_labels, bank, head, num_classes, experiment.mesh, train
  )
  own_logits = None
  if config.encoder == "retrained" and head is not None:
    held_features = np.stack(
      [feature_space.take(features, held_out, run) for run in range(config.num_runs)]
    )
    own_logits = held_features @ head["kernel"] + head["bias"][:, None]
  return Folds(
    runs=with_class_embeddings(experiment, runs),
    run=run,
    counts=mesh_lib.fetch(runs.exemplars.by_class.counts),
    held_out=held_out,
    features=feature_space.standardize(runs.standardizer, features, experiment.mesh, held_out),
    judged=cross_validation.judged_examples(held_out, labels, config.criterion, num_classes),
    own_logits=own_logits,
  )


def _fold_writer(experiment: Experiment) -> TensorBoard:
  """Curves of folds are no results; TensorBoard gets them only if it is asked to show them."""
  if experiment.config.execution.show_folds:
    return experiment.run.tensorboard
  return TensorBoard(experiment.workdir.path / "tensorboard", enabled=False)


def _fold_encoders(experiment: Experiment, train: np.ndarray) -> loop.Stage:
  """Trains an encoder for every fold, on its part of the training images."""
  rows = train[:, : (train >= 0).sum(axis=1).max()]
  return dataclasses.replace(
    classifier_stage(experiment, experiment.config.classifier.loss, rows),
    name="selection/encoder",
    result=(),
  )


def compile_folds(experiment: Experiment) -> None:
  """Compiles the training of encoders of folds."""
  config = experiment.config.selection
  if config.folds and config.encoder == "retrained":
    train, _ = cross_validation.fold_rows(experiment.dataset.train_labels, config)
    run = dataclasses.replace(experiment.run, seeds=tuple(range(config.num_runs)))
    programs.compile_ahead(_fold_encoders(experiment, train), run)


def _encode_folds(experiment: Experiment, run: loop.Run, train: np.ndarray):
  """Features [R, N, D] of all training images by encoders that saw their fold's part, and heads."""
  loss, stage = experiment.config.classifier.loss, _fold_encoders(experiment, train)
  folder = experiment.workdir.folder("selection") / "encoder"
  state = loop.train(stage, run, folder)
  _, features = forward_images(
    experiment, loss, state, experiment.dataset.train_images, stage.per_seed["statistics"]
  )
  head = mesh_lib.fetch(state.params["head"]) if has_own_head(experiment.config) else None
  return features, head
