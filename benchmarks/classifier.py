"""Speed of training a classifier: the ResNet-32 of configs/cifar100_lt.py on one machine.

  python -m benchmarks.classifier [--json FILE] [--rounds N] [--seeds N]

Images and labels are random, their number and shape those of CIFAR-100-LT at imbalance 100; nothing
is read from disk. Measured, round by round against one another:

1. images per second of our train step under the training loop's own dispatch, data and augmentation
   included: one seed, several at once (each counted), without augmentation, with AutoAugment;
2. the same network, batch and augmentation in eager PyTorch (benchmarks/torch_classifier.py), where
   it is installed, with one thread and with one per core; ours is held against the faster. Outputs
   of the two networks on the same weights are compared first;
3. the share of the machine's rate on a 2048^3 matrix product that the step reaches; a step counts
   as three forward passes, whose operations XLA counts.

Compilation is told apart. A ratio is of medians, followed by the range of the ratios within single
rounds and the ratio of the fastest rounds.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.timing import Row, Timing, interleave, speedup
from benchmarks.training import Training
from configs.cifar100_lt import get_config
from input_pipeline import long_tail
from input_pipeline.dataset import LongTailDataset
from memdiff import config as config_lib
from memdiff.classifier import backbones, encoder, encoder_training, pretrained
from memdiff.experiments.classification import ClassificationConfig
from memdiff.runtime import mesh as mesh_lib

_MATMUL = 2048
_STEPS = 2  # per call


def random_images(labels: np.ndarray, num_classes: int, side: int) -> LongTailDataset:
  """Random pixels with these labels [N]; the test set is the first few of them."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (len(labels), side, side, 3), np.uint8)
  counts = np.bincount(labels, minlength=num_classes)
  nothing = {"images": images[:0], "labels": labels[:0]}
  return LongTailDataset(
    name="random", class_names=tuple(map(str, range(num_classes))), profile="exponential",
    imbalance=float(counts.max() / counts.min()), train_images=images, train_labels=labels,
    test_images=images[:100], test_labels=labels[:100], split_sha256="",
    **{f"{part}_{k}": v for part in ("holdout", "left_out") for k, v in nothing.items()},
  )  # fmt: skip


def random_data(largest: int = 500) -> LongTailDataset:
  """Random pixels in the shape of CIFAR-100-LT, with `largest` in its largest class."""
  counts = long_tail.class_counts(largest, 100, 100, "exponential")
  return random_images(np.repeat(np.arange(100), counts).astype(np.int32), 100, 32)


def make_training(config: ClassificationConfig, data, mesh, seeds: int, **augment) -> Training:
  classifier = dataclasses.replace(
    config.classifier, augment=dataclasses.replace(config.classifier.augment, **augment)
  )
  shared = encoder.device_data(config.encoder.input, data, mesh)
  recipe = encoder_training.Recipe(classifier, config.encoder, config.classifier.loss)
  stage = encoder_training.make_stage(recipe, data, shared, mesh)
  return Training(stage, tuple(range(seeds)), mesh, _STEPS)


def forward_flops(config: ClassificationConfig) -> float:
  """Operations of a forward pass per image, as XLA counts them."""
  model = encoder.make_model(config.encoder, config.classifier.loss, 100)
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  variables = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)
  forward = jax.jit(functools.partial(model.apply, train=False))
  return float(forward.lower(variables, images).cost_analysis()["flops"])


def torch_threads() -> tuple[int, ...]:
  """Numbers of threads that PyTorch is timed with; none where it is not installed."""
  installed = importlib.util.find_spec("torch") is not None
  return tuple(sorted({1, os.cpu_count() or 1})) if installed else ()


def torch_variants(config: ClassificationConfig, data, threads: tuple[int, ...]):
  """Variants for `interleave`, and the largest difference of logits between the two networks."""
  import torch

  from benchmarks import torch_classifier

  architecture = backbones.BACKBONES[config.encoder.backbone.name]
  network = torch_classifier.ResNet(architecture, 3, 100)
  trainer = torch_classifier.Trainer(
    network, data.train_images, data.train_labels, config.classifier.batch_size,
    config.classifier.augment.padding,
  )  # fmt: skip
  trainer.run(2)  # away from where batch norm begins

  model = encoder.make_model(config.encoder, "cross_entropy", 100)
  images = np.random.default_rng(1).normal(size=(8, 32, 32, 3)).astype(np.float32)
  drawn = model.init(jax.random.key(0), images, train=False)
  with tempfile.TemporaryDirectory() as folder:
    np.savez(f"{folder}/weights.npz", **torch_classifier.state_dict(network))
    variables = pretrained.load(f"{folder}/weights.npz", drawn, head=True)
  with torch.no_grad():
    theirs = network.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
  network.train()
  difference = float(np.abs(model.apply(variables, images, train=False)[0] - theirs).max())

  def run(number):
    torch.set_num_threads(number)
    return trainer.run(_STEPS)

  names = {n: f"PyTorch, {n} thread" + ("s" if n > 1 else "") for n in threads}
  return {names[n]: (functools.partial(run, n), float(_STEPS)) for n in threads}, difference


def measure(rounds: int, seeds: int) -> tuple[list[Row], dict[str, Any]]:
  config = config_lib.build(ClassificationConfig, get_config().to_dict())
  data, mesh = random_data(), mesh_lib.make_mesh()
  batch, result = config.classifier.batch_size, timing.environment()
  matrix = jnp.ones((_MATMUL, _MATMUL))
  product = jax.jit(jnp.matmul)
  variants: dict[str, Any] = {"matmul": (lambda: product(matrix, matrix), 2.0 * _MATMUL**3)}
  result["compile_seconds"] = {}
  for name, number, augment in (
    ("one seed", 1, {}),
    (f"{seeds} seeds", seeds, {}),
    ("one seed, no augmentation", 1, {"padding": 0, "flip": False}),
    ("one seed, AutoAugment and Cutout", 1, {"policy": "autoaugment", "cutout": 16}),
  ):
    print(f"compiling {name}", flush=True)
    start = time.perf_counter()
    run = make_training(config, data, mesh, number, **augment)
    result["compile_seconds"][name] = time.perf_counter() - start
    variants[name] = (run, float(run.work))
  threads = torch_threads()
  if threads:
    more, difference = torch_variants(config, data, threads)
    variants |= more
    result["torch_disagreement"] = difference
    print(f"largest difference of logits between the two networks: {difference:.1e}", flush=True)
  else:
    print("PyTorch is not installed; its rows are left out", flush=True)
  print(f"timing {len(variants)} variants, {rounds} rounds", flush=True)
  times = interleave(variants, rounds)
  result["forward_flops_per_image"] = forward_flops(config)
  result["times"] = {name: clock.as_dict() for name, clock in times.items()}
  return rows(times, batch, 3 * batch * result["forward_flops_per_image"]), result


def rows(times: dict[str, Timing], batch: int, step_flops: float) -> list[Row]:
  """The table, from seconds per step of one seed."""
  rate = 1 / times["matmul"].median
  of_torch = [name for name in times if name.startswith("PyTorch")]
  rival = min(of_torch, key=lambda name: times[name].median) if of_torch else None
  table = [Row(f"matrix product {_MATMUL}^3", f"{rate / 1e9:.0f} GFLOP/s")]
  for name, clock in times.items():
    if name == "matmul":
      continue
    value = f"{batch / clock.median:.0f} images/s, {step_flops / clock.median / rate:.0%} of it"
    if rival is None or name in of_torch:
      table.append(Row(name, value))
      continue
    ratio = speedup(times[rival], clock)
    judged = "augmentation" not in name and "Cutout" not in name
    target, met = (f">= 1x {rival}", ratio.of_medians >= 1.0) if judged else ("", None)
    table.append(Row(name, value, str(ratio), target, met))
  return table


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--json", type=pathlib.Path, help="write versions, hardware and all rounds")
  parser.add_argument("--rounds", type=int, default=10, help="repeats of every measurement")
  parser.add_argument("--seeds", type=int, default=3, help="how many are trained at once")
  arguments = parser.parse_args()
  table, result = measure(arguments.rounds, arguments.seeds)
  result["table"] = [dataclasses.asdict(row) for row in table]
  result["load_average_after"] = list(os.getloadavg())
  print("\n" + timing.table(table))
  if arguments.json:
    arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
