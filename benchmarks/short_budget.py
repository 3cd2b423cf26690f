"""Images of a folder generated within a given time: how good a DDPM gets in minutes.

Used by `python -m benchmarks.accelerator --images=DIR --workdir=DIR2`. The folder is
DIR/train/CLASS/*.png and DIR/test/CLASS/*.png, for example CIFAR-10-LT, long-tailed as it is.
"""

import dataclasses
import pathlib
import time
from typing import Any

from benchmarks import generation
from benchmarks.training import Training
from configs.images import cifar10_lt
from input_pipeline import dataset
from memdiff import config as config_lib
from memdiff import pipeline
from memdiff.experiments.image_settings import ImagesConfig
from memdiff.runtime import mesh as mesh_lib
from memdiff.synthesis import image_methods, pixel_data, pixel_diffusion

_TIMED = 50  # steps from whose time the number of steps follows


def settings(images: pathlib.Path, methods: tuple[str, ...], *, quick: bool) -> dict[str, Any]:
  """CIFAR-10-LT's, but for the source of the images and what a short run needs."""
  config = cifar10_lt.get_config()
  config.dataset.name, config.dataset.profile = "folder", "natural"
  config.dataset.data_dir, config.dataset.image_size = str(images), 32
  config.methods = methods
  config.diffusion.ema_decay = 0.999
  config.diffusion.optimizer.warmup = 0.05
  config.sampling.per_class = 500
  config.classifier.num_epochs = 30.0
  if quick:
    config.diffusion.unet.update(channels=4, multipliers=(1,), attention=(), dtype="float32")
    config.diffusion.batch_size = 8
    config.sampling.update(per_class=4, num_steps=3)
    config.evaluation.kid_size = 10
    config.encoder.backbone.name = "resnet8"
    config.classifier.update(num_epochs=1.0, batch_size=8)
  return config.to_dict()


def seconds_per_step(config: dict[str, Any], method: str) -> float:
  """Of a method's training on this machine."""
  built = config_lib.build(ImagesConfig, config)
  data, mesh = dataset.load(built.dataset), mesh_lib.make_mesh()
  shared = pixel_data.make_data(data.train_images, data.train_labels, data.num_classes, mesh)
  diffusion = dataclasses.replace(image_methods.apply(method, built.diffusion), num_steps=10_000)
  stage = pixel_diffusion.make_stage(diffusion, shared, data.train_counts, mesh)
  run = Training(stage, (0,), mesh, _TIMED)
  start = time.perf_counter()
  run()[0].step.block_until_ready()
  return (time.perf_counter() - start) / _TIMED


def train(
  images: pathlib.Path,
  workdir: pathlib.Path,
  seconds: float,
  methods: tuple[str, ...] = ("ddpm",),
  *,
  quick: bool = False,
) -> dict[str, Any]:
  """Trains every method for its share of `seconds`, the first one's steps for all, and judges.

  Returns:
    The parts of the report that pages show.
  """
  config = settings(images, methods, quick=quick)
  number = seconds / len(methods) / seconds_per_step(config, methods[0])
  steps = max(int(number) // _TIMED, 1) * _TIMED
  config["diffusion"]["num_steps"] = steps
  config["loop"]["eval_every"] = config["loop"]["checkpoint_every"] = steps
  report = pipeline.run(config, str(workdir), tensorboard=False, command="accelerator")
  return generation.reduced(report)
