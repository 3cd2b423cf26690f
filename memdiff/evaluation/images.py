"""Compares generated images with real ones, from the command line.

  python -m memdiff.evaluation.images --generated=DIR_OR_NPZ --reference=DIR_OR_NPZ \\
    --network=efficientnet_lite0 --json=FILE

A set is a folder of images at any depth, or a .npz file with `images` [N, H, W, 1 or 3] or, if the
features are there already, `features` [N, D], or a folder of such files, as a run leaves them.
Images are resized to --side pixels by Pillow's bicubic filter and go through one of these networks:

  efficientnet_lite0  trained on ImageNet; its weights are a package (requirements-images.txt)
  inception_fid       FID's own; images go in as they are, and it enlarges them itself
  dinov2              vits14, vitb14 or vitl14, trained without labels; it knows no classes

--by_class adds the kernel distance and the diversity of every class; classes are `labels` [N] in
.npz files, and the first folders of a folder. --train=DIR_OR_NPZ adds the share of generated images
that nearly copy an image of that training set and, with --by_class, distances of classes with many,
medium and few training images.

--cache=FOLDER keeps the features of the reference, by a hash of images, network and side, for the
next call. The last two need their file, --weights. The Frechet distance is called `fid` for
inception_fid and after its network otherwise (FD): that is no FID. It is comparable only with the
same network, side, reference and number of images.
"""

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from input_pipeline import identity
from memdiff.errors import ConfigError, exit_code
from memdiff.evaluation import class_metrics, image_quality, image_sets, networks, set_metrics
from memdiff.evaluation.networks import NETWORKS
from memdiff.runtime.workdir import read_arrays, write_arrays, writing

_SAY_EVERY = 10.0  # seconds
_WORST = 5  # classes that the terminal shows; the file has all


def encode(images: image_sets.ImageSet, network: Callable, side: int) -> np.ndarray:
  """Features [N, D] float32, with a line of progress now and then; `side` as of `blocks`."""
  began = said = time.monotonic()
  parts, done = [], 0
  for block in images.blocks(side):
    padded = np.pad(block, [(0, image_sets.BLOCK - len(block)), (0, 0), (0, 0), (0, 0)])
    parts.append(np.asarray(network(padded))[: len(block)])  # one program for all blocks
    done, now = done + len(block), time.monotonic()
    if now - said > _SAY_EVERY:
      left = (now - began) / done * (len(images) - done)
      print(f"{images.path}: {done:,} of {len(images):,} images, {left:.0f} s left", flush=True)
      said = now
  return np.concatenate(parts)


def _real_features(
  arguments: argparse.Namespace, images: image_sets.ImageSet, network: Callable, side: int
) -> np.ndarray:
  if arguments.cache is None:
    return encode(images, network, side)
  weights = pathlib.Path(NETWORKS[arguments.network].weights_path(arguments.weights))
  key = f"{arguments.network} {identity.of_bytes(weights.read_bytes())}"
  return reference_features(images, network, side, key, arguments.cache)


def reference_features(
  images: image_sets.ImageSet, network: Callable, side: int, key: str, cache: pathlib.Path
) -> np.ndarray:
  """`encode`, or what an earlier call has left in the folder `cache`.

  Args:
    images, network, side: of `encode`.
    key: the network and its weights, as text.
    cache: a folder, made if need be.
  """
  name = identity.of_bytes(images.sha256().encode(), key.encode(), str(side).encode())
  path = cache / f"{name}.npz"
  if path.exists():
    print(f"features of {images.path} taken from {path}", flush=True)
    return read_arrays(path, ("features",))["features"]
  features = encode(images, network, side)
  with writing(cache):
    cache.mkdir(parents=True, exist_ok=True)
  write_arrays(path, {"features": features})
  return features


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
  """The metrics, and what they depend on."""
  sets = {name: image_sets.read(getattr(arguments, name)) for name in ("reference", "generated")}
  given = [isinstance(images, np.ndarray) for images in sets.values()]
  if any(given) and not all(given):
    raise ConfigError("One set holds features and the other images; give two of one kind.")
  found: dict[str, Any] = {}
  if all(given):
    name, resize, (real, generated) = "given_features", None, sets.values()
  else:
    name = arguments.network
    side = networks.checked_side(name, arguments.side, "--side")
    resize = networks.describe_resize(name, side)
    network, classify = networks.make_network(name, arguments.weights)
    real = _real_features(arguments, sets["reference"], network, side)
    generated = encode(sets["generated"], network, side)
    if classify is not None:
      order = np.random.default_rng(arguments.seed).permutation(len(generated))
      score = set_metrics.inception_score(classify(generated[order]))
      key = networks.score_name(name)
      found = {key: score[0], f"{key}_std": score[1]}
  classes: dict[str, Any] = {}
  if arguments.by_class:
    paths = {name: getattr(arguments, name) for name in sets}
    more, classes = class_metrics.by_class(real, generated, paths, arguments.train)
    for group in ("many", "medium", "few"):
      if f"fd_{group}" in more:
        more[f"{networks.distance_name(name)}_{group}"] = more.pop(f"fd_{group}")
    found |= more
  if arguments.train:
    found |= class_metrics.memorisation(sets["generated"], _training_images(arguments, sets))
  options = {"kid_size": arguments.kid_size, "k": arguments.k, "seed": arguments.seed}
  metrics = image_quality.compare_sets(real, generated, **options)
  return {
    "network": name,
    "resize": resize,
    "reference": {"path": arguments.reference, "number": len(real)},
    "generated": {"path": arguments.generated, "number": len(generated)},
    **options,
    "metrics": {networks.distance_name(name): metrics.pop("fd"), **metrics, **found},
    "classes": classes,
  }


def _training_images(arguments: argparse.Namespace, sets: dict) -> image_sets.ImageSet:
  train = image_sets.read(arguments.train)
  if isinstance(train, np.ndarray) or isinstance(sets["generated"], np.ndarray):
    raise ConfigError("--train needs images, in it and in --generated, not features.")
  return train


def table(result: dict[str, Any]) -> str:
  """The result for the terminal."""
  real, generated = result["reference"], result["generated"]
  lines = [
    f"{generated['number']:,} generated ({generated['path']})",
    f"{real['number']:,} real ({real['path']})",
    f"network {result['network']}" + (f", {result['resize']}" if result["resize"] else ""),
    "",
  ]
  metrics = result["metrics"]
  for name, value in metrics.items():
    if not name.endswith("_std"):
      spread = f" ± {metrics[f'{name}_std']:.4g}" if f"{name}_std" in metrics else ""
      lines.append(f"{name:24s} {value:.4g}{spread}")
  if result["classes"]:
    known = {n: row for n, row in result["classes"].items() if row["kid"] is not None}
    worst = sorted(known, key=lambda n: -known[n]["kid"])[:_WORST]
    lines += ["", "classes farthest from real ones (kid, diversity, generated, real):"]
    lines += [
      f"  {name:22s} {known[name]['kid']:.4g}  {known[name]['diversity']:.3g} "
      f" {known[name]['generated']:,}  {known[name]['real']:,}"
      for name in worst
    ]
  return "\n".join(lines)


def _compare(arguments: argparse.Namespace) -> None:
  result = evaluate(arguments)
  print(table(result))
  if arguments.json:
    arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m memdiff.evaluation.images",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--generated", required=True, help="folder or .npz of generated images")
  parser.add_argument("--reference", required=True, help="folder or .npz of real images")
  parser.add_argument("--network", default=next(iter(NETWORKS)), help=", ".join(NETWORKS))
  parser.add_argument("--weights", default="", help="the network's file; none: from its package")
  parser.add_argument(
    "--side", type=int, default=0, help="of resized images; 0: that of the network"
  )
  parser.add_argument("--kid_size", type=int, default=1000, help="rows of a subset of KID")
  parser.add_argument("--k", type=int, default=3, help="neighbours of precision and recall")
  parser.add_argument("--seed", type=int, default=0, help="seed of subsets and clusterings")
  parser.add_argument("--by_class", action="store_true", help="metrics of every class as well")
  parser.add_argument("--train", default="", help="training images; adds the share of copies")
  parser.add_argument(
    "--cache", type=pathlib.Path, help="folder that keeps features of the reference"
  )
  parser.add_argument("--json", type=pathlib.Path, help="write the result to this file too")
  arguments = parser.parse_args(argv)
  return exit_code(lambda: _compare(arguments))


if __name__ == "__main__":
  sys.exit(main())
