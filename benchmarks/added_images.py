"""What generated images cost beside real ones, in training and on the way there.

  python -m benchmarks.added_images [--json FILE] [--rounds N] [--pool 50000]

- Training: a ResNet-32 on 32 x 32 colour images; a batch of 128 real and 128 generated images over
  a batch of 128 real ones. Its rows are twice as many, so 2.05x is the target.
- Looking at a pool: confidence, distance to the class mean and nearest training image of every
  image of a pool, in a process of its own: seconds, and its largest memory. The target is 2 GB.
"""

import argparse
import dataclasses
import json
import multiprocessing
import pathlib
import resource
import time
from typing import Any

import jax
import numpy as np

from benchmarks import timing
from benchmarks.training import Training
from configs import cifar100_lt
from input_pipeline.dataset import LongTailDataset
from memdiff import config as config_lib
from memdiff.classifier import added_images, encoder, encoder_training, image_batches
from memdiff.classifier.added_images import AddedImagesConfig
from memdiff.classifier.encoder_training import Recipe
from memdiff.evaluation import image_quality
from memdiff.experiments.augmented_critic import Critic
from memdiff.experiments.base import Experiment
from memdiff.experiments.classification import ClassificationConfig
from memdiff.runtime import loop
from memdiff.runtime import mesh as mesh_lib

_SEEDS, _STEPS = (0,), 2
_TARGET, _MEMORY = 2.05, 2e9
_TRAIN, _CLASSES = 10_847, 100  # as CIFAR-100-LT at imbalance 100


@dataclasses.dataclass(frozen=True)
class Size:
  """How much is measured."""

  train: int = _TRAIN
  pool: int = 50_000
  side: int = 32
  backbone: str = "resnet32"
  batch_size: int = 128


def settings(size: Size) -> ClassificationConfig:
  config = cifar100_lt.get_config()
  config.encoder.backbone.name = size.backbone
  config.classifier.batch_size = size.batch_size
  config.seeds = _SEEDS
  return config_lib.build(ClassificationConfig, config.to_dict())


def data_of(size: Size) -> LongTailDataset:
  """Images of noise; what they show does not matter to the time."""
  draw, shape = np.random.default_rng(0), (size.side, size.side, 3)
  nothing = np.zeros((0, *shape), np.uint8), np.zeros(0, np.int32)
  labels = np.arange(size.train).astype(np.int32) % _CLASSES
  return LongTailDataset(
    name="noise",
    class_names=tuple(map(str, range(_CLASSES))),
    train_images=draw.integers(0, 256, (size.train, *shape), np.uint8),
    train_labels=labels,
    holdout_images=nothing[0],
    holdout_labels=nothing[1],
    left_out_images=nothing[0],
    left_out_labels=nothing[1],
    test_images=nothing[0],
    test_labels=nothing[1],
    split_sha256="",
    profile="natural",
    imbalance=1.0,
  )


def training_stage(size: Size, *, generated: bool) -> loop.Stage:
  config, data, mesh = settings(size), data_of(size), mesh_lib.make_mesh()
  added = AddedImagesConfig() if generated else None
  recipe = Recipe(config.classifier, config.encoder, "cross_entropy", images=added)
  rows = np.arange(size.train)[None]
  shared = encoder.device_data(config.encoder.input, data, mesh)
  stage = encoder_training.make_stage(recipe, data, shared, mesh, rows)
  if not generated:
    return stage
  used = min(size.pool, size.train, 1000)
  pool = added_images.make_pool(
    data.train_images[:used], data.train_labels[:used], np.ones(used), used, rows[0],
    num_train=size.train,
  )  # fmt: skip
  pools = mesh_lib.replicate(mesh, added_images.stack_pools([pool]))
  return dataclasses.replace(stage, per_seed=stage.per_seed | {"images": pools})


def time_training(size: Size, rounds: int) -> dict[str, timing.Timing]:
  mesh = mesh_lib.make_mesh()
  stages = {
    "real": training_stage(size, generated=False),
    "real and generated": training_stage(size, generated=True),
  }
  variants = {name: Training(stage, _SEEDS, mesh, _STEPS) for name, stage in stages.items()}
  return timing.interleave({name: (v, v.work) for name, v in variants.items()}, rounds)


def _look(size: Size, connection: Any) -> None:
  """Sends {"seconds", "largest_bytes"} of looking at a pool, compilation included."""
  config, data, mesh = settings(size), data_of(size), mesh_lib.make_mesh()
  draw = np.random.default_rng(1)
  images = draw.integers(0, 256, (size.pool, size.side, size.side, 3), np.uint8)
  labels = draw.integers(0, _CLASSES, size.pool).astype(np.int32)
  recipe = Recipe(config.classifier, config.encoder, "balanced_softmax")
  shared = encoder.device_data(config.encoder.input, data, mesh)
  stage = encoder_training.make_stage(recipe, data, shared, mesh, np.arange(size.train)[None])
  state = jax.tree.map(lambda x: x[None], stage.init(jax.random.key(0), ()))
  run = loop.Run(_SEEDS, mesh, config.loop, None, None, None)
  experiment = Experiment(config, data, None, run, "")
  known = image_batches.fold_data(config.encoder, data, np.arange(size.train)[None])
  means = np.ones((_CLASSES, config.encoder.feature_dim)) / config.encoder.feature_dim**0.5
  start = time.perf_counter()
  near = image_quality.nearest(images, data.train_images)
  critic = Critic(experiment, (state,), known["statistics"], means)
  signs = critic.look(images, labels, near.copied)
  assert len(signs.confidence) == size.pool
  largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  connection.send({"seconds": time.perf_counter() - start, "largest_bytes": largest})


def look(size: Size) -> dict[str, float]:
  """`_look` in a process of its own, so that its memory is known."""
  context = multiprocessing.get_context("spawn")
  ours, theirs = context.Pipe()
  process = context.Process(target=_look, args=(size, theirs))
  process.start()
  theirs.close()
  found = ours.recv()
  process.join()
  return found


def measure(size: Size, rounds: int) -> tuple[list[timing.Row], dict[str, Any]]:
  """(rows of the printed table, what the JSON file holds)."""
  looked = look(size)  # first: a process begins with the largest memory of the one that starts it
  timings = time_training(size, rounds)
  ratio = timing.speedup(timings["real and generated"], timings["real"])
  rows = [
    timing.Row(
      f"a step of {size.batch_size} real images", f"{1e3 * timings['real'].median:.0f} ms"
    ),
    timing.Row(
      f"and of {size.batch_size} generated ones beside them",
      f"{1e3 * timings['real and generated'].median:.0f} ms",
      str(ratio),
      f"at most {_TARGET}x",
      ratio.of_medians <= _TARGET,
    ),
    timing.Row(f"looking at {size.pool:,} images", f"{looked['seconds']:.0f} s"),
    timing.Row(
      "its largest memory",
      f"{looked['largest_bytes'] / 1e9:.2f} GB",
      target=f"below {_MEMORY / 1e9:.0f} GB",
      met=looked["largest_bytes"] < _MEMORY,
    ),
  ]
  return rows, {
    "table": [dataclasses.asdict(row) for row in rows],
    "environment": timing.environment(),
    "size": dataclasses.asdict(size),
    "training": {name: found.as_dict() for name, found in timings.items()},
    "ratio": dataclasses.asdict(ratio),
    "looking": looked,
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--json", type=pathlib.Path, help="file for all numbers")
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--pool", type=int, default=50_000, help="images to look at")
  arguments = parser.parse_args()
  rows, result = measure(Size(pool=arguments.pool), arguments.rounds)
  print(timing.table(rows))
  if arguments.json:
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
