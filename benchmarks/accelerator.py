"""Speed of every trained part on one accelerator, and whether it gives the same twice.

  python -m benchmarks.accelerator [--json FILE] [--rounds N] [--parts NAME ...] [--quick]

Sizes are those of configs/cifar100_lt.py:memdiff and configs/imagenet_lt.py; images and features
are random, nothing is read from disk. Every part runs as the training loop runs it: several steps
per dispatch, data and augmentation on the device. Measured, round by round against one another:

classifier   the ResNet-32 at batch 128, one seed: in float32 and in bfloat16, and with a memory
             bank that every step updates
seeds        the same of three seeds, in turn or as one batch, which is convolved in three ways
             (see `_CONVOLUTIONS`)
denoiser     the MLP on 64 features at batch 128: one seed, five as one batch, five in turn
sampler      50 DDIM steps, 1,024 features at a time and 16,384
resnet50     the ResNet-50 at batch 256 and 224 px, in bfloat16: one seed
repeatable   whether classifier and denoiser come to the same bits when they are trained twice

A step's share of the peak is against the rate of an 8192^3 matrix product in bfloat16 in the same
rounds. --rounds 0 only compiles, into JAX's cache if there is one; several parts can do so side by
side. --quick takes few steps and one round on small data: it shows that everything runs.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import classifier as classifier_benchmark
from benchmarks import timing
from benchmarks.training import Training
from configs import cifar100_lt, imagenet_lt
from input_pipeline.dataset import LongTailDataset
from memdiff import config as config_lib
from memdiff import feature_diffusion, feature_space, hallucination
from memdiff.classification import ClassificationConfig
from memdiff.classifier import convolution, encoder, training
from memdiff.diffusion.schedules import NoiseSchedule
from memdiff.feature_experiment import MemdiffConfig
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.loop import Stage
from memdiff.runtime.random import base_keys

_DIM = 64  # of the features that the denoiser sees
_CONVOLUTIONS = {
  "grouped": convolution._conv,  # under vmap one grouped convolution
  "single": convolution._conv_on_cpu,  # under vmap one convolution per seed
  "patches": convolution._patches_times_kernel,  # under vmap a batched matrix product
}


@dataclasses.dataclass(frozen=True)
class Size:
  """How much is done per measurement."""

  steps: int  # per dispatch
  matmul: int
  samples: tuple[int, ...]
  examples_of_largest: int
  images: int  # of 224 px
  pixels: int


_FULL = Size(50, 8192, (1024, 16384), 500, 1024, 224)
_QUICK = Size(2, 256, (128,), 100, 8, 64)


@contextlib.contextmanager
def convolved_by(name: str) -> Iterator[None]:
  """Networks traced inside convolve in that way."""
  conv2d = convolution.conv2d
  convolution.conv2d = lambda x, kernel, stride=1: _CONVOLUTIONS[name](x, kernel, stride)
  try:
    yield
  finally:
    convolution.conv2d = conv2d
    training._program.cache_clear()
    training._make_init.cache_clear()


def random_images(number: int, side: int, num_classes: int) -> LongTailDataset:
  """Random pixels; every class has about as many."""
  random = np.random.default_rng(0)
  images = random.integers(0, 256, (number, side, side, 3), np.uint8)
  labels = (np.arange(number) % num_classes).astype(np.int32)
  nothing = {"images": images[:0], "labels": labels[:0]}
  return LongTailDataset(
    name="random", class_names=tuple(map(str, range(num_classes))), profile="natural",
    imbalance=1.0, train_images=images, train_labels=labels, test_images=images[:8],
    test_labels=labels[:8], split_sha256="",
    **{f"{part}_{k}": v for part in ("holdout", "left_out") for k, v in nothing.items()},
  )  # fmt: skip


def classifier_stage(
  config: ClassificationConfig, data: LongTailDataset, dtype: str, *, bank: bool = False
) -> Stage:
  backbone = dataclasses.replace(config.encoder.backbone, dtype=dtype)
  encoder_config = dataclasses.replace(config.encoder, backbone=backbone)
  mesh = mesh_lib.make_mesh()
  shared = encoder.device_data(encoder_config.input, data, mesh)
  return training.make_stage(
    config.classifier, encoder_config, config.memory_bank if bank else None,
    config.classifier.loss, data, shared, mesh,
  )  # fmt: skip


def trained(
  stage: Stage, seeds: int, steps: int, *, in_turn: bool = False
) -> tuple[Training, float]:
  """The training of that many seeds, compiled, and the seconds that this took."""
  stage = dataclasses.replace(stage, one_by_one=in_turn)
  start = time.perf_counter()
  run = Training(stage, tuple(range(seeds)), mesh_lib.make_mesh(), steps)
  return run, time.perf_counter() - start


class Measurements:
  """Variants that are timed together, with what compiling them took."""

  def __init__(self):
    self.variants: dict[str, tuple[Callable, float]] = {}
    self.compile_seconds: dict[str, float] = {}

  def add(self, name: str, make: Callable[[], tuple[Training, float]]) -> None:
    print(f"compiling {name}", flush=True)
    run, self.compile_seconds[name] = make()
    self.variants[name] = run, float(run.work)

  def add_product(self, size: int) -> None:
    matrix = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    self.variants["matrix product"] = (lambda: product(matrix, matrix)), 2.0 * size**3

  def timed(self, rounds: int, unit: str, per_step: int = 1) -> dict[str, Any]:
    """name -> {units of work per second, compile_seconds, rounds in seconds per step}."""
    if not rounds:
      return {name: {"compile_seconds": x} for name, x in self.compile_seconds.items()}
    times = timing.interleave(self.variants, rounds)
    return {
      name: {
        f"{'operations' if name == 'matrix product' else unit}_per_second": (
          1.0 if name == "matrix product" else per_step
        )
        / clock.median,
        "compile_seconds": self.compile_seconds.get(name),
        "seconds": clock.as_dict(),
      }
      for name, clock in times.items()
    }


def _classifier() -> ClassificationConfig:
  return config_lib.build(ClassificationConfig, cifar100_lt.get_config().to_dict())


def measure_classifier(size: Size, rounds: int) -> dict[str, Any]:
  config, found = _classifier(), Measurements()
  data = classifier_benchmark.random_data(size.examples_of_largest)
  found.add_product(size.matmul)
  for dtype in ("float32", "bfloat16"):
    stage = classifier_stage(config, data, dtype)
    found.add(f"{dtype}, 1 seed", lambda s=stage: trained(s, 1, size.steps))
  stage = classifier_stage(config, data, "float32", bank=True)
  found.add("float32, 1 seed, memory bank updated", lambda: trained(stage, 1, size.steps))
  return found.timed(rounds, "images", config.classifier.batch_size)


def measure_seeds(size: Size, rounds: int, convolution: str) -> dict[str, Any]:
  config, found = _classifier(), Measurements()
  data = classifier_benchmark.random_data(size.examples_of_largest)
  with convolved_by(convolution):
    stage = classifier_stage(config, data, "float32")
    found.add("3 seeds as one batch", lambda: trained(stage, 3, size.steps))
  return found.timed(rounds, "images", config.classifier.batch_size)


def measure_seeds_in_turn(size: Size, rounds: int) -> dict[str, Any]:
  config, found = _classifier(), Measurements()
  data = classifier_benchmark.random_data(size.examples_of_largest)
  stage = classifier_stage(config, data, "float32")
  found.add("3 seeds in turn", lambda: trained(stage, 3, size.steps, in_turn=True))
  return found.timed(rounds, "images", config.classifier.batch_size)


def random_features(num_classes: int, largest: int) -> tuple[np.ndarray, np.ndarray]:
  """Features [1, N, D] around a mean per class, with labels [N], in CIFAR-100-LT's counts."""
  labels = classifier_benchmark.random_data(largest).train_labels
  random = np.random.default_rng(0)
  means = random.standard_normal((num_classes, _DIM))
  features = means[labels] + 0.5 * random.standard_normal((len(labels), _DIM))
  return features[None].astype(np.float32), labels


def feature_data(config: MemdiffConfig, num_classes: int, size: Size, seeds: int):
  mesh = mesh_lib.make_mesh()
  features, labels = random_features(num_classes, size.examples_of_largest)
  keys = base_keys(tuple(range(seeds)), "memory_bank")
  labels = np.broadcast_to(labels, (seeds, labels.size))
  bank = feature_space.fill_bank(features, labels, num_classes, keys, config.memory_bank, mesh)
  features = mesh_lib.replicate(mesh, np.repeat(features, seeds, axis=0))
  return feature_diffusion.make_data(
    features, labels, bank, num_classes, config.diffusion.class_exponent, mesh
  )


def denoiser_stage(config: MemdiffConfig, size: Size, seeds: int) -> Stage:
  own = feature_data(config, 100, size, seeds)
  return feature_diffusion.make_stage(config.diffusion, own, 100, mesh_lib.make_mesh())


def measure_denoiser(size: Size, rounds: int) -> dict[str, Any]:
  config = config_lib.build(MemdiffConfig, cifar100_lt.get_config("memdiff").to_dict())
  found = Measurements()
  for seeds, in_turn in ((1, False), (5, False), (5, True)):
    name = f"{seeds} seed{'s' * (seeds > 1)}{', in turn' * in_turn}"
    stage = denoiser_stage(config, size, seeds)
    found.add(name, lambda s=stage, n=seeds, t=in_turn: trained(s, n, size.steps, in_turn=t))
  return found.timed(rounds, "steps")


def measure_sampler(size: Size, rounds: int) -> dict[str, Any]:
  config = config_lib.build(MemdiffConfig, cifar100_lt.get_config("memdiff").to_dict())
  mesh, stage = mesh_lib.make_mesh(), denoiser_stage(config, size, 1)
  state = Training(stage, (0,), mesh, 1).state
  params, bank = jax.tree.map(lambda x: x[0], (state.params, stage.own.bank))
  denoiser = feature_diffusion.make_denoiser(config.diffusion, 100, _DIM)
  schedule = NoiseSchedule(config.diffusion.schedule)
  found = Measurements()
  for number in size.samples:
    settings = dataclasses.replace(config.hallucination, chunk_size=number)
    labels = np.arange(number) % 100

    @jax.jit
    def sample(key, settings=settings, labels=labels):
      return hallucination.sample_features(
        denoiser, params, schedule, bank, labels, key, settings, config.diffusion.prediction, mesh,
        1.0,
      )  # fmt: skip

    jax.block_until_ready(sample(jax.random.key(0)))
    found.variants[f"{number} at a time"] = (
      (lambda sample=sample: sample(jax.random.key(0))),
      float(number),
    )
  return found.timed(rounds, "features")


def measure_resnet50(size: Size, rounds: int) -> dict[str, Any]:
  config = config_lib.build(ClassificationConfig, imagenet_lt.get_config().to_dict())
  batch = min(config.classifier.batch_size, size.images)
  config = dataclasses.replace(
    config, classifier=dataclasses.replace(config.classifier, batch_size=batch)
  )
  data = random_images(size.images, size.pixels, 1000)
  found = Measurements()
  found.add_product(size.matmul)
  stage = classifier_stage(config, data, "bfloat16")
  found.add("one seed", lambda: trained(stage, 1, max(size.steps // 10, 1)))
  return found.timed(rounds, "images", batch)


def measure_repeatable(size: Size, _: int) -> dict[str, Any]:
  """Whether two trainings from one seed end in the same bits, and the largest difference if not."""
  classification = config_lib.build(ClassificationConfig, cifar100_lt.get_config().to_dict())
  memdiff = config_lib.build(MemdiffConfig, cifar100_lt.get_config("memdiff").to_dict())
  data = classifier_benchmark.random_data(size.examples_of_largest)
  stages = {
    "classifier": classifier_stage(classification, data, "float32"),
    "denoiser": denoiser_stage(memdiff, size, 1),
  }
  found = {}
  for name, stage in stages.items():
    ends = []
    for _ in range(2):
      run = Training(stage, (0,), mesh_lib.make_mesh(), size.steps)
      ends.append(jax.device_get(run()[0].params))
    differences = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), *ends)
    largest = max(jax.tree.leaves(differences))
    found[name] = {"steps": size.steps, "same": largest == 0, "largest_difference": largest}
  return found


PARTS = {
  "classifier": measure_classifier,
  "seeds_in_turn": measure_seeds_in_turn,
  **{f"seeds_{name}": functools.partial(measure_seeds, convolution=name) for name in _CONVOLUTIONS},
  "denoiser": measure_denoiser,
  "sampler": measure_sampler,
  "repeatable": measure_repeatable,
  "resnet50": measure_resnet50,
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--json", type=pathlib.Path, help="write versions, hardware and all rounds")
  parser.add_argument("--rounds", type=int, default=5, help="repeats of every measurement")
  parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
  parser.add_argument("--quick", action="store_true", help="show that everything runs")
  arguments = parser.parse_args()
  size, rounds = (
    (_QUICK, min(arguments.rounds, 1)) if arguments.quick else (_FULL, arguments.rounds)
  )
  result = timing.environment()
  for part in arguments.parts:
    start = time.perf_counter()
    result[part] = PARTS[part](size, rounds)
    print(f"{part}, {time.perf_counter() - start:.0f} s in all:", flush=True)
    for name, value in result[part].items():
      shown = value
      if isinstance(value, dict):
        shown = {k: v for k, v in value.items() if k != "seconds"}
      print(f"  {name}: {shown}", flush=True)
    if arguments.json:
      arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
