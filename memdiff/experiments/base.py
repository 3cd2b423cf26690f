"""What every kind of experiment is made of: settings, data, phases, and its image classifiers."""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from input_pipeline import identity
from input_pipeline.long_tail import LongTailLabels
from memdiff.classifier import encoder, encoder_training, losses
from memdiff.classifier.encoder_training import Recipe
from memdiff.config import each, setting
from memdiff.errors import ConfigError
from memdiff.evaluation import report, scores
from memdiff.memory import feature_space
from memdiff.runtime import loop, programs, results
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.workdir import Workdir
from memdiff.runtime.writers import read_history


def seeds_field() -> Any:
  return setting(
    (0, 1, 2),
    "of initialisation and training; all run at once",
    each(lambda s: 0 <= s < 2**32, "whole numbers from 0 to 2^32 - 1"),
  )


def check_seeds(seeds: tuple[int, ...]) -> None:
  """Raises ValueError if a seed stands twice."""
  if len(set(seeds)) != len(seeds):
    raise ValueError(f"seeds are {seeds}, but each may stand only once.")


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A checked config with its data, devices and folder."""

  config: Any  # the settings of the experiment's kind
  dataset: LongTailLabels  # LongTailDataset of images, or LongTailEmbeddings
  workdir: Workdir
  run: loop.Run
  command: str

  @functools.cached_property
  def data_digests(self) -> dict[str, str | None]:
    """SHA-256 of everything that enters the run beside its config, by name; read once per run."""
    digests = self.dataset.fingerprints | {"split": self.dataset.split_sha256}
    if hasattr(self.config, "encoder"):
      digests["initial_weights"] = encoder.weights_sha256(self.config.encoder)
    for name, path in getattr(self.config, "input_files", {}).items():
      digests[name] = identity.of_path(path)
    return digests

  @property
  def mesh(self):
    return self.run.mesh

  @property
  def seeds(self) -> tuple[int, ...]:
    return self.config.seeds


@dataclasses.dataclass(frozen=True)
class Phase:
  """A part of an experiment that is done once, and whose result stays in the workdir."""

  name: str
  title: str  # for the user, when it starts
  work: Callable[[Experiment], dict]  # returns metrics for the manifest
  reads: tuple[str, ...]  # fields or groups, such as generators.names, beyond earlier phases'
  wanted: Callable[[Any], bool] = lambda settings: True  # whether there is anything to do
  compile_ahead: Callable[[Experiment], None] | None = None  # its largest programs
  reads_if: Callable[[Any], tuple[str, ...]] = lambda settings: ()  # what only some settings read

  def fields_read(self, settings: Any) -> tuple[str, ...]:
    """The part of the config that decides its result."""
    return (*self.reads, *self.reads_if(settings))


@dataclasses.dataclass(frozen=True)
class Kind:
  """A kind of experiment.

  Attributes:
    settings: its dataclass.
    load: its data, of `settings.dataset`.
    checks: each raises ConfigError if settings do not fit each other or the data.
    phases: in order; a run has those that its settings want.
    render: (report, pictures by name) -> its page.
    summarise: report -> its first words and its table, for the terminal.
    predicts: whether its runs have classifiers that `memdiff.predict` can use.
  """

  settings: type
  load: Callable[[Any], LongTailLabels]
  checks: tuple[Callable[[Any, Any], None], ...]
  phases: tuple[Phase, ...]
  render: Callable[[Mapping[str, Any], Mapping[str, bytes]], str] = report.render_html
  summarise: Callable[[Mapping[str, Any]], str] = report.text_table
  predicts: bool = True

  def check(self, settings: Any, data: LongTailLabels) -> None:
    for check in self.checks:
      check(settings, data)

  def phases_of(self, settings: Any) -> tuple[Phase, ...]:
    return tuple(phase for phase in self.phases if phase.wanted(settings))


def bank_of_losses(settings: Any) -> tuple[str, ...]:
  """The bank's settings if a classifier is trained with a loss that reads the bank."""
  trained = encoder_training.trained_losses(settings.classifier)
  return ("memory_bank",) if any(losses.LOSSES[loss].needs_bank for loss in trained) else ()


def check_nothing_held_out(settings: Any, data: LongTailLabels) -> None:
  """Of an experiment that chooses by cross-validation.

  Raises:
    ConfigError: if training examples are held out, which it would not use.
  """
  if settings.dataset.holdout:
    raise ConfigError(
      f"config.dataset.holdout is {settings.dataset.holdout:g}, but this experiment chooses by"
      " cross-validation on the training set and would not use what is held out; set it to 0."
    )
  if number := len(data.holdout_labels):
    print(
      f"memdiff: the {number} held-out images are not used, since this experiment chooses by"
      " cross-validation on the training set; move them to train/ to train on them.",
      file=sys.stderr,
    )


def check_classifier(settings: Any, data: LongTailLabels) -> None:
  """Raises ConfigError if encoder and classifier do not fit each other or the images."""
  encoder.check(settings.encoder, data)
  encoder_training.check(settings.classifier, settings.encoder, data)


def classifier_stage(
  experiment: Experiment, loss: str, rows: np.ndarray | None = None
) -> loop.Stage:
  """Trains the classifier of `loss` on all images, or on `rows` [R, A] of each of R runs.

  A memory bank moves along only for losses that read it.
  """
  config = experiment.config
  shared = encoder.device_data(config.encoder.input, experiment.dataset, experiment.mesh)
  bank = config.memory_bank if losses.LOSSES[loss].needs_bank else None
  recipe = Recipe(config.classifier, config.encoder, loss, bank)
  return encoder_training.make_stage(recipe, experiment.dataset, shared, experiment.mesh, rows)


def load_classifier(experiment: Experiment, loss: str) -> Any:
  """Parameters and batch statistics of a trained classifier, seeds leading."""
  return results.load(experiment.workdir.folder("classifier") / loss, experiment.mesh)


def forward_images(
  experiment: Experiment, loss: str, state: Any, images, statistics: Any = None
) -> tuple[np.ndarray, np.ndarray]:
  """Runs images through trained classifiers in evaluation mode.

  Args:
    experiment: the experiment.
    loss: that trained the classifiers.
    state: of R of them.
    images: uint8 [N, H, W, ch], in memory or read when sliced; a chunk is split over the devices.
    statistics: {"pixel_mean", "pixel_std"} [R, ch], each run's own; None: of all training images.

  Returns:
    (logits [R, N, C], features [R, N, D]).
  """
  input_config = experiment.config.encoder.input
  model = encoder.make_model(experiment.config.encoder, loss, experiment.dataset.num_classes)
  forward = _forward_program(model, input_config, statistics is not None, experiment.mesh)
  if statistics is None:
    statistics = encoder.pixel_statistics(input_config, experiment.dataset.train_images)
  statistics = mesh_lib.replicate(experiment.mesh, statistics)
  return feature_space.encode(
    lambda chunk: forward(chunk, state, statistics), images, experiment.mesh
  )


@functools.lru_cache(maxsize=8)
def _forward_program(
  model: nn.Module, input_config: encoder.InputConfig, statistics_of_runs: bool, mesh: Mesh
) -> Callable:
  """The jitted (images, state, statistics) -> (logits, features) of every run."""

  def forward(images, state, statistics):
    images = mesh_lib.shard_batch(images, mesh)

    def of_run(per_run, shared):
      state, statistics = per_run if statistics_of_runs else (per_run, shared)
      return encoder.apply_eval(model, state, encoder.normalize(input_config, images, statistics))

    per_run = (state, statistics) if statistics_of_runs else state
    return programs.over_seeds(of_run, mesh_lib.one_by_one(mesh))(per_run, statistics)

  return jax.jit(forward)


def last_metrics(folder: pathlib.Path) -> dict[str, float | None]:
  """The mean over seeds of every metric's last value, of a finished stage; None if it is NaN."""
  last = {}
  for record in read_history(folder / "metrics.jsonl"):
    for name, values in record["metrics"].items():
      last[f"{record['kind']}_{name}"] = scores.plain(np.mean(values))
  return last


def train_classifiers(experiment: Experiment) -> dict:
  """Trains a classifier with each loss of the config."""
  summary = {}
  for loss in encoder_training.trained_losses(experiment.config.classifier):
    folder = experiment.workdir.folder("classifier") / loss
    loop.train(classifier_stage(experiment, loss), experiment.run, folder)
    summary[loss] = last_metrics(folder)
  return summary


TRAIN_CLASSIFIERS = Phase(
  "classifier",
  "training the image classifiers",
  train_classifiers,
  ("seeds", "dataset", "encoder", "classifier", "loop"),
  reads_if=bank_of_losses,
)
