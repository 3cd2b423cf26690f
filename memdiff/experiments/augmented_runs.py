"""The runs of an experiment with generated images, seeds and folds, and where their files are."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

from input_pipeline.dataset import LongTailDataset
from memdiff.evaluation import cross_validation
from memdiff.experiments.augmented_settings import CRITIC_LOSS, REAL, Row, Training, lacking
from memdiff.experiments.base import Experiment
from memdiff.runtime import distributed, loop
from memdiff.runtime.workdir import write_arrays, writing
from memdiff.runtime.writers import TensorBoard

PREDICTIONS = "predictions.npz"


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
  """Runs that are trained together.

  Attributes:
    name: "final" or "folds"; names their folders.
    run: their seeds and streams.
    rows: [R, N] the training images of each, -1 if a run has fewer.
    held_out: [R, B] those that a fold is judged on, -1 if it has fewer; None: the test set judges.
  """

  name: str
  run: loop.Run
  rows: np.ndarray
  held_out: np.ndarray | None

  def counts(self, data: LongTailDataset) -> np.ndarray:
    """Training images of each class, [R, C]."""
    labels = [data.train_labels[rows[rows >= 0]] for rows in self.rows]
    return np.stack([np.bincount(of_run, minlength=data.num_classes) for of_run in labels])


@dataclasses.dataclass(frozen=True, eq=False)
class FoldOrSeed:
  """One run of a part.

  Attributes:
    experiment: its experiment.
    part: the folds or the seeds.
    number: which of them, from 0.
  """

  experiment: Experiment
  part: Part
  number: int

  @property
  def rows(self) -> np.ndarray:
    """[n] its training images, by number."""
    rows = self.part.rows[self.number]
    return rows[rows >= 0]

  @property
  def images(self) -> np.ndarray:
    """[n, H, W, ch] uint8."""
    return self.experiment.dataset.train_images[self.rows]

  @property
  def labels(self) -> np.ndarray:
    """[n]."""
    return self.experiment.dataset.train_labels[self.rows]

  @property
  def wanted(self) -> np.ndarray:
    """[C] how many images each class lacks."""
    return wanted(self.experiment, self.part)[self.number]

  @property
  def seed(self) -> int:
    return self.part.run.seeds[self.number]

  @property
  def noise_seed(self) -> int:
    """Of the noise that images are drawn from; a fold's is not that of the seed with its number."""
    return self.seed if self.part.held_out is None else int(jax.random.bits(self.key("sampling")))

  def key(self, name: str) -> jax.Array:
    """Of the random stream `name`."""
    return self.part.run.keys(name)[self.number]

  def of(self, tree: Any) -> Any:
    """Its entry of arrays that lead with the runs of the part."""
    return jax.tree.map(lambda x: x[self.number], tree)

  def drawn_folder(self, method: str) -> pathlib.Path:
    """Of the images that a method has drawn for it."""
    folder = self.experiment.workdir.folder("sampling") / self.part.name / method
    return folder / f"run_{self.number}"

  def pool_path(self, source: str) -> pathlib.Path:
    folder = self.experiment.workdir.folder("pool") / self.part.name / source
    return folder / f"run_{self.number}.npz"


def members(experiment: Experiment, part: Part) -> list[FoldOrSeed]:
  """All runs of a part."""
  return [FoldOrSeed(experiment, part, number) for number in range(len(part.run.seeds))]


def parts(experiment: Experiment) -> tuple[Part, ...]:
  """The folds, if there are any, and the seeds."""
  data, config = experiment.dataset, experiment.config.selection
  everything = np.tile(np.arange(len(data.train_labels)), (len(experiment.seeds), 1))
  final = Part("final", experiment.run, everything, None)
  if not config.folds:
    return (final,)
  train, held_out = cross_validation.fold_rows(data.train_labels, config)
  quiet = TensorBoard(experiment.workdir.path / "tensorboard", enabled=False)
  shown = experiment.config.execution.show_folds
  run = dataclasses.replace(
    experiment.run,
    seeds=tuple(range(config.num_runs)),
    streams="folds/",
    tensorboard=experiment.run.tensorboard if shown else quiet,
  )
  return Part("folds", run, train, held_out), final


def part_of(experiment: Experiment, name: str) -> Part:
  return next(part for part in parts(experiment) if part.name == name)


def wanted(experiment: Experiment, part: Part) -> np.ndarray:
  """How many images each class of each run lacks. [R, C].

  In a fold, classes are filled up to the same share of the training images.
  """
  largest = int(experiment.dataset.train_counts.max())
  return lacking_to(experiment, part, experiment.config.pool.fill_to or largest)


def lacking_to(experiment: Experiment, part: Part, fill: int) -> np.ndarray:
  """How many images each class of each run lacks to reach `fill`, scaled down in a fold. [R, C]."""
  data = experiment.dataset
  return lacking(part.counts(data), fill, len(data.train_labels))


def classifier_folder(
  experiment: Experiment, part: Part, row: Row, training: Training
) -> pathlib.Path:
  """Of a row; its file PREDICTIONS is what its classifiers say of the images that judge them."""
  return experiment.workdir.folder("classifiers") / part.name / row.name / training.name


def critic_folder(experiment: Experiment, part: Part) -> pathlib.Path:
  """Of the classifier that filters ask: real images, with the class prior taken off."""
  return experiment.workdir.folder("critics") / part.name / REAL / CRITIC_LOSS


def second_folder(experiment: Experiment, part: Part) -> pathlib.Path:
  """Of the other classifier that some filters ask."""
  return experiment.workdir.folder("pool") / part.name / "second_critic"


def save(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
  """Writes arrays into a folder that is made if it is not there; all processes then see them."""
  with writing(path.parent):
    path.parent.mkdir(parents=True, exist_ok=True)
  write_arrays(path, arrays)
  distributed.barrier(str(path))
