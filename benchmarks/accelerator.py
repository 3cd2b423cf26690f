"""Speed of every trained part on one accelerator, and whether it gives the same twice.

  python -m benchmarks.accelerator [--json FILE] [--rounds N] [--parts NAME ...] [--quick]
                                   [--images DIR --workdir DIR --seconds N]

Sizes are those of configs/cifar100_lt.py:memdiff and configs/imagenet_lt.py; images and features
are random, nothing is read from disk. Every part runs as the training loop runs it: several steps
per dispatch, data and augmentation on the device. The parts:

classifier     the ResNet-32 at batch 128, one seed: in float32 and in bfloat16, and with a memory
               bank that every step updates
seeds_in_turn  the same of three seeds, one after the other
seeds_*        three seeds as one batch, convolved in one of three ways (see `_CONVOLUTIONS`)
denoiser       the MLP on 64 features at batch 128: one seed, five as one batch, five in turn
sampler        50 DDIM steps, 1,024 features at a time and 16,384
repeatable     whether classifier and denoiser come to the same bits when they are trained twice
resnet50       the ResNet-50 at batch 256 and 224 px, in bfloat16: one seed
unet           the U-Net of 35.7 million parameters at batch 128 and 32 px, in bfloat16: training by
               every method of `_UNET_METHODS`, sampling with guidance and without
--images=DIR   a long-tailed folder (see benchmarks.short_budget): a DDPM trained
               for --seconds, its samples judged; goes last

Within a part the variants are timed round by round; classifier and resnet50 have the rate of an
8192^3 matrix product in bfloat16 beside them. Run the parts in one process: many processes that
compile on one GPU hold each other up. --quick takes small networks and few steps: it shows that
everything runs.
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
from ml_collections import ConfigDict

from benchmarks import classifier as classifier_benchmark
from benchmarks import pixel_diffusion, short_budget, timing
from benchmarks.training import Training
from configs import cifar100_lt, imagenet_lt
from input_pipeline.dataset import LongTailDataset
from memdiff import config as config_lib
from memdiff import convolution
from memdiff.classifier import encoder, encoder_training
from memdiff.diffusion.schedules import NoiseSchedule
from memdiff.experiments.classification import ClassificationConfig
from memdiff.experiments.feature_settings import MemdiffConfig
from memdiff.memory import feature_space
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.loop import Stage
from memdiff.runtime.random import base_keys
from memdiff.synthesis import feature_diffusion, hallucination
from memdiff.synthesis.hallucination import TrainedDenoiser

_PRODUCT = "matrix product"
_UNET_METHODS = ("ddpm", "coral", "cbdm", "t2h", "cm")
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
  images: int  # of the large network
  pixels: int  # their side
  networks: tuple[str, str]  # small and large
  batches: tuple[int, int]  # their batch sizes


_FULL = Size(50, 8192, (1024, 16384), 500, 1000, 224, ("resnet32", "resnet50"), (128, 256))
_QUICK = Size(2, 256, (128,), 100, 1000, 32, ("resnet8", "resnet10"), (8, 8))


@contextlib.contextmanager
def convolved_by(name: str) -> Iterator[None]:
  """Networks traced inside convolve in that way."""
  conv2d = convolution.conv2d
  convolution.conv2d = lambda x, kernel, stride=1: _CONVOLUTIONS[name](x, kernel, stride)
  encoder_training._program.cache_clear()  # what was traced before convolves in another way
  try:
    yield
  finally:
    convolution.conv2d = conv2d
    encoder_training._program.cache_clear()


def classifier_stage(
  config: ClassificationConfig, data: LongTailDataset, dtype: str, *, bank: bool = False
) -> Stage:
  backbone = dataclasses.replace(config.encoder.backbone, dtype=dtype)
  encoder_config = dataclasses.replace(config.encoder, backbone=backbone)
  mesh = mesh_lib.make_mesh()
  shared = encoder.device_data(encoder_config.input, data, mesh)
  recipe = encoder_training.Recipe(
    config.classifier, encoder_config, config.classifier.loss, config.memory_bank if bank else None
  )
  return encoder_training.make_stage(recipe, data, shared, mesh)


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
    self.variants[_PRODUCT] = (lambda: product(matrix, matrix)), 2.0 * size**3

  def timed(self, rounds: int, unit: str, per_step: int = 1) -> dict[str, Any]:
    """name -> {units of work per second, compile_seconds, rounds in seconds per step}."""
    found = {}
    for name, clock in timing.interleave(self.variants, rounds).items():
      what, number = ("operations", 1) if name == _PRODUCT else (unit, per_step)
      found[name] = {
        f"{what}_per_second": number / clock.median,
        "compile_seconds": self.compile_seconds.get(name),
        "seconds": clock.as_dict(),
      }
    return found


def classification(config: ConfigDict, network: str, batch_size: int) -> ClassificationConfig:
  config.encoder.backbone.name = network
  config.classifier.batch_size = batch_size
  return config_lib.build(ClassificationConfig, config.to_dict())


def small_classifier(size: Size) -> ClassificationConfig:
  return classification(cifar100_lt.get_config(), size.networks[0], size.batches[0])


def measure_classifier(size: Size, rounds: int) -> dict[str, Any]:
  config, found = small_classifier(size), Measurements()
  data = classifier_benchmark.random_data(size.examples_of_largest)
  found.add_product(size.matmul)
  for dtype in ("float32", "bfloat16"):
    stage = classifier_stage(config, data, dtype)
    found.add(f"{dtype}, 1 seed", lambda s=stage: trained(s, 1, size.steps))
  stage = classifier_stage(config, data, "float32", bank=True)
  found.add("float32, 1 seed, memory bank updated", lambda: trained(stage, 1, size.steps))
  return found.timed(rounds, "images", config.classifier.batch_size)


def measure_seeds(size: Size, rounds: int, way: str) -> dict[str, Any]:
  config, found = small_classifier(size), Measurements()
  data = classifier_benchmark.random_data(size.examples_of_largest)
  with convolved_by(way):
    stage = classifier_stage(config, data, "float32")
    found.add("3 seeds as one batch", lambda: trained(stage, 3, size.steps))
  return found.timed(rounds, "images", config.classifier.batch_size)


def measure_seeds_in_turn(size: Size, rounds: int) -> dict[str, Any]:
  config, found = small_classifier(size), Measurements()
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
  per_seed = feature_data(config, 100, size, seeds)
  return feature_diffusion.make_stage(config.diffusion, per_seed, 100, mesh_lib.make_mesh())


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
  params, bank = jax.tree.map(lambda x: x[0], (state.params, stage.per_seed.bank))
  module = feature_diffusion.make_denoiser(config.diffusion, 100, _DIM)
  schedule = NoiseSchedule(config.diffusion.schedule)
  denoiser = TrainedDenoiser(module, params, schedule, config.diffusion.prediction)
  found = Measurements()
  for number in size.samples:
    settings = dataclasses.replace(config.hallucination, chunk_size=number)
    labels = np.arange(number) % 100

    @jax.jit
    def sample(key, settings=settings, labels=labels):
      return hallucination.sample_features(denoiser, bank, labels, key, settings, mesh)

    found.variants[f"{number} at a time"] = (
      (lambda sample=sample: sample(jax.random.key(0))),
      float(number),
    )
  return found.timed(rounds, "features")


def measure_resnet50(size: Size, rounds: int) -> dict[str, Any]:
  config = classification(imagenet_lt.get_config(), size.networks[1], size.batches[1])
  labels = (np.arange(size.images) % 1000).astype(np.int32)
  data = classifier_benchmark.random_images(labels, 1000, size.pixels)
  found = Measurements()
  found.add_product(size.matmul)
  stage = classifier_stage(config, data, "bfloat16")
  found.add("one seed", lambda: trained(stage, 1, max(size.steps // 10, 1)))
  return found.timed(rounds, "images", config.classifier.batch_size)


def measure_repeatable(size: Size, _: int) -> dict[str, Any]:
  """Whether two trainings from one seed end in the same bits, and the largest difference if not."""
  memdiff = config_lib.build(MemdiffConfig, cifar100_lt.get_config("memdiff").to_dict())
  data = classifier_benchmark.random_data(size.examples_of_largest)
  stages = {
    "classifier": classifier_stage(small_classifier(size), data, "float32"),
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


def measure_unet(size: Size, rounds: int) -> dict[str, Any]:
  work = pixel_diffusion.smallest()
  if size is _FULL:
    work = dataclasses.replace(pixel_diffusion.workload("cifar"), methods=_UNET_METHODS)
  rows, found = pixel_diffusion.measure(work, rounds, compiles=False)
  return {"table": [dataclasses.asdict(row) for row in rows]} | found


PARTS = {
  "classifier": measure_classifier,
  "seeds_in_turn": measure_seeds_in_turn,
  **{f"seeds_{name}": functools.partial(measure_seeds, way=name) for name in _CONVOLUTIONS},
  "denoiser": measure_denoiser,
  "sampler": measure_sampler,
  "repeatable": measure_repeatable,
  "resnet50": measure_resnet50,
  "unet": measure_unet,
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--json", type=pathlib.Path, help="write versions, hardware and all rounds")
  parser.add_argument("--rounds", type=int, default=5, help="repeats of every measurement")
  parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
  parser.add_argument("--images", type=pathlib.Path, help="folder of images that a DDPM learns")
  parser.add_argument("--workdir", type=pathlib.Path, help="of that DDPM's run")
  parser.add_argument("--seconds", type=float, default=240, help="of its training")
  parser.add_argument("--quick", action="store_true", help="show that everything runs")
  arguments = parser.parse_args()
  if bool(arguments.images) != bool(arguments.workdir):
    parser.error("--images and --workdir go together")
  size, rounds = (_QUICK, 1) if arguments.quick else (_FULL, arguments.rounds)
  result = timing.environment()

  def save(result):
    if arguments.json:
      arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

  for part in arguments.parts:
    start = time.perf_counter()
    result[part] = PARTS[part](size, rounds)
    print(f"{part}, {time.perf_counter() - start:.0f} s in all:", flush=True)
    for name, value in result[part].items():
      shown = value
      if isinstance(value, dict):
        shown = {k: v for k, v in value.items() if k != "seconds"}
      print(f"  {name}: {shown}", flush=True)
    save(result)
  if arguments.images:
    result["ddpm"] = short_budget.train(
      arguments.images, arguments.workdir, arguments.seconds, quick=arguments.quick
    )
    save(result)


if __name__ == "__main__":
  main()
