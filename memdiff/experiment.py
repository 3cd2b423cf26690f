"""The memdiff experiment: settings, stages, and what finished phases left in the workdir."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from input_pipeline import dataset as dataset_lib
from memdiff import feature_diffusion, feature_space, hallucination, memory_bank
from memdiff.classifier import encoder, head, training
from memdiff.config import at_least, each, one_of
from memdiff.diffusion.training import DiffusionConfig
from memdiff.errors import WorkdirError
from memdiff.runtime import loop
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.checkpoint import Checkpointer, abstract
from memdiff.runtime.workdir import Workdir, read_arrays
from memdiff.runtime.writers import read_history


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  map_per_class: int = at_least(2)


def seeds_field() -> Any:
  return each(lambda s: 0 <= s < 2**32, "whole numbers from 0 to 2^32 - 1")


def check_seeds(seeds: tuple[int, ...]) -> None:
  """Raises ValueError where a seed stands twice."""
  if len(set(seeds)) != len(seeds):
    raise ValueError(f"seeds are {seeds}, but each may stand only once.")


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
  """Everything that decides a run's results."""

  experiment: str = one_of(("memdiff",))
  name: str
  seeds: tuple[int, ...] = seeds_field()
  dataset: dataset_lib.DatasetConfig
  encoder: encoder.EncoderConfig
  classifier: training.ClassifierConfig
  memory_bank: memory_bank.BankConfig
  diffusion: DiffusionConfig
  hallucination: hallucination.HallucinationConfig
  head: head.HeadConfig
  evaluation: EvaluationConfig
  loop: loop.LoopConfig

  def __post_init__(self):
    check_seeds(self.seeds)
    if self.hallucination.num_steps > self.diffusion.schedule.num_steps:
      raise ValueError(
        f"hallucination.num_steps is {self.hallucination.num_steps}, but the diffusion has only"
        f" {self.diffusion.schedule.num_steps} steps."
      )


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A checked config with its data, devices and folder."""

  config: Any  # ExperimentConfig, or the settings of another kind of experiment
  dataset: dataset_lib.LongTailDataset
  workdir: Workdir
  run: loop.Run
  command: str

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
  reads: tuple[str, ...]  # parts of the config that decide its result, beyond earlier phases'


def classifier_stage(e: Experiment, loss: str, with_bank: bool = True) -> loop.Stage:
  config = e.config
  shared = encoder.device_data(config.encoder.input, e.dataset, e.mesh)
  bank = config.memory_bank if with_bank else None
  return training.make_stage(
    config.classifier, config.encoder, bank, loss, e.dataset, shared, e.mesh
  )


def frozen_encoder(e: Experiment, loss: str, with_bank: bool = True):
  """The finished classifier of `loss`: its state, and uint8 [chunk, ...] -> features [S, chunk, D].

  The images of a chunk are split over the devices.
  """
  stage = classifier_stage(e, loss, with_bank)
  state = loop.load_final(stage, e.run, e.workdir.folder("classifier") / loss)
  model = encoder.make_model(e.config.encoder, loss, e.dataset.num_classes)

  @jax.jit
  def encode_chunk(images, state=state, shared=stage.shared):
    images = encoder.normalize(e.config.encoder.input, mesh_lib.shard_batch(images, e.mesh), shared)
    return jax.vmap(lambda s: encoder.apply_eval(model, s, images)[1])(state)

  return state, encode_chunk


def last_metrics(folder: pathlib.Path) -> dict[str, float]:
  """The mean over seeds of every metric's last value, of a finished stage."""
  last = {}
  for record in read_history(folder / "metrics.jsonl"):
    for name, values in record["metrics"].items():
      last[f"{record['kind']}_{name}"] = float(np.mean(values))
  return last


def load_bank(e: Experiment) -> memory_bank.MemoryBank:
  """The refilled bank, in the encoder's units, with a leading axis of seeds."""
  config = e.config.memory_bank
  dim = e.config.encoder.feature_dim
  shapes = jax.eval_shape(
    jax.vmap(lambda _: memory_bank.create(e.dataset.num_classes, config.num_slots, dim)),
    jax.ShapeDtypeStruct((len(e.seeds),), np.int32),
  )
  sharding = feature_space.bank_sharding(e.dataset.num_classes, e.mesh)
  checkpointer = Checkpointer(e.workdir.folder("memory_bank") / "bank", keep=1)
  try:
    restored = checkpointer.restore(abstract(shapes, jax.tree.map(lambda _: sharding, shapes)))
  finally:
    checkpointer.close()
  if restored is None:
    raise WorkdirError(
      f"{e.workdir.folder('memory_bank')} holds no bank; remove that folder and run the same"
      " command again."
    )
  return restored[1]


@dataclasses.dataclass(frozen=True)
class Space:
  """The feature space as later phases need it: standardised, on the devices, seeds leading."""

  standardizer: feature_space.Standardizer
  train: jax.Array  # [S, N, D]
  left_out: jax.Array
  test: jax.Array
  head: dict[str, jax.Array]  # the encoder's own head on standardised features
  bank: memory_bank.MemoryBank
  test_predictions: dict[str, np.ndarray]  # loss -> [S, T], of the encoders' own heads


def load_space(e: Experiment) -> Space:
  arrays = read_arrays(e.workdir.folder("memory_bank") / "features.npz")
  raw = mesh_lib.replicate(e.mesh, {n: arrays[n] for n in ("train", "left_out", "test")})
  own_head = mesh_lib.replicate(e.mesh, {n: arrays[n] for n in ("kernel", "bias")})
  standardizer = jax.jit(jax.vmap(feature_space.fit_standardizer))(raw["train"])
  forward = jax.jit(jax.vmap(lambda s, x: s.forward(x)))
  bank = jax.jit(jax.vmap(lambda b, s: memory_bank.standardize(b, s.mean, s.scale)))
  return Space(
    standardizer=standardizer,
    train=forward(standardizer, raw["train"]),
    left_out=forward(standardizer, raw["left_out"]),
    test=forward(standardizer, raw["test"]),
    head=jax.jit(jax.vmap(head.standardized_head))(own_head, standardizer),
    bank=bank(load_bank(e), standardizer),
    test_predictions={
      name.removeprefix("predictions_"): value
      for name, value in arrays.items()
      if name.startswith("predictions_")
    },
  )


def diffusion_stage(e: Experiment, space: Space) -> loop.Stage:
  own = feature_diffusion.FeatureData(features=space.train, bank=space.bank)
  return feature_diffusion.make_stage(
    e.config.diffusion, own, e.dataset.train_labels, e.dataset.num_classes, e.mesh
  )


def load_synthetic(e: Experiment) -> dict[str, np.ndarray]:
  """What `hallucinate` wrote; features [S, M, D] in the encoder's units, labels [M], ..."""
  return read_arrays(e.workdir.folder("hallucination") / "synthetic_features.npz")


@dataclasses.dataclass(frozen=True)
class Pool:
  """Features added to the real ones when a head is trained."""

  description: str
  features: jax.Array  # [S, M, D] standardised
  labels: np.ndarray  # [M] int32
  confidence: np.ndarray  # [S, M]


def oracle_rows(left_out_labels: np.ndarray, numbers: np.ndarray) -> np.ndarray:
  """Rows of the left-out set: as many per class as were hallucinated, or all there are."""
  rows = [np.flatnonzero(left_out_labels == c)[:n] for c, n in enumerate(numbers)]
  return np.concatenate(rows)


def make_pools(e: Experiment, space: Space) -> dict[str, Pool]:
  """The methods that train a head: name -> what is added to the real features.

  There is an oracle only where the long tail left out real images of the classes that are filled.
  """
  synthetic = load_synthetic(e)
  features = jax.jit(jax.vmap(lambda s, x: s.forward(x)))(
    space.standardizer, mesh_lib.replicate(e.mesh, synthetic["features"])
  )
  numbers = hallucination.plan(e.dataset.train_counts, e.config.hallucination)
  rows = oracle_rows(e.dataset.left_out_labels, numbers)
  num_seeds = len(e.seeds)
  pools = {
    "csl_retrain": Pool(
      "the encoder's head trained again with CSL on real features only",
      features[:, :0],
      synthetic["labels"][:0],
      np.ones((num_seeds, 0), np.float32),
    ),
    "memdiff": Pool(
      "the same head training with hallucinated tail features, trusted by their confidence",
      features,
      synthetic["labels"],
      synthetic["confidence"],
    ),
  }
  if len(rows):
    pools["oracle"] = Pool(
      "the same with real, left-out features instead: the most that hallucination can reach",
      space.left_out[:, rows],
      e.dataset.left_out_labels[rows],
      np.ones((num_seeds, len(rows)), np.float32),
    )
  return pools


def head_stage(e: Experiment, space: Space, name: str, pool: Pool) -> loop.Stage:
  own = head.HeadData(
    features=space.train,
    added=pool.features,
    confidence=mesh_lib.replicate(e.mesh, pool.confidence),
    test_features=space.test,
    start=space.head,
  )
  return head.make_stage(
    name,
    e.config.head,
    own,
    e.dataset.train_labels,
    pool.labels,
    e.dataset.test_labels,
    e.dataset.num_classes,
    e.mesh,
  )
