"""Compares generated images with real ones, from the command line.

  python -m memdiff.evaluation.images --generated=DIR_OR_NPZ --reference=DIR_OR_NPZ \\
    --network=efficientnet_lite0 --json=FILE

A set is a folder of images at any depth, or a .npz file with `images` [N, H, W, 1 or 3] or, if the
features are there already, `features` [N, D]. Images are resized to --side pixels by Pillow's
bicubic filter and go through the network. The Frechet distance is called after its network (FD): it
is no FID, and comparable only with the same network, side, reference and number of images.
"""

import argparse
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from memdiff.errors import ConfigError, MemdiffError
from memdiff.evaluation import efficientnet, image_quality, image_sets, set_metrics

NETWORKS = ("efficientnet_lite0",)
_SAY_EVERY = 10.0  # seconds


def make_network(name: str, weights: str) -> tuple[Callable, Callable]:
  """(uint8 images [n, S, S, 3] -> features [n, D], features -> class probabilities)."""
  if name not in NETWORKS:
    raise ConfigError(f"--network is {name!r}, but must be one of {', '.join(NETWORKS)}.")
  loaded = efficientnet.load(efficientnet.weights_path(weights))
  return (
    jax.jit(functools.partial(efficientnet.features, loaded)),
    jax.jit(functools.partial(efficientnet.probabilities, loaded)),
  )


def encode(images: image_sets.ImageSet, network: Callable, side: int) -> np.ndarray:
  """Features [N, D] float32, with a line of progress now and then."""
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


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
  """The metrics, and what they depend on."""
  sets = {name: image_sets.read(getattr(arguments, name)) for name in ("reference", "generated")}
  given = [isinstance(images, np.ndarray) for images in sets.values()]
  if any(given) and not all(given):
    raise ConfigError("One set holds features and the other images; give two of one kind.")
  found: dict[str, Any] = {}
  if all(given):
    name, (real, generated) = "given_features", sets.values()
  else:
    name = arguments.network
    network, classify = make_network(name, arguments.weights)
    real, generated = (encode(images, network, arguments.side) for images in sets.values())
    order = np.random.default_rng(arguments.seed).permutation(len(generated))
    score = set_metrics.inception_score(np.asarray(classify(generated[order])))
    found = {f"is_{name}": score[0], f"is_{name}_std": score[1]}
  options = {"kid_size": arguments.kid_size, "k": arguments.k, "seed": arguments.seed}
  metrics = image_quality.compare_sets(real, generated, **options)
  return {
    "network": name,
    "resize": None if all(given) else f"Pillow, bicubic, {arguments.side} px",
    "reference": {"path": arguments.reference, "number": len(real)},
    "generated": {"path": arguments.generated, "number": len(generated)},
    **options,
    "metrics": {f"fd_{name}": metrics.pop("fd"), **metrics, **found},
  }


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
  return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m memdiff.evaluation.images",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--generated", required=True, help="folder or .npz")
  parser.add_argument("--reference", required=True, help="folder or .npz of real images")
  parser.add_argument("--network", default=NETWORKS[0], help=", ".join(NETWORKS))
  parser.add_argument("--weights", default="", help="the network's file; none: from its package")
  parser.add_argument("--side", type=int, default=64, help="pixels that images are resized to")
  parser.add_argument("--kid_size", type=int, default=1000, help="rows of a subset of KID")
  parser.add_argument("--k", type=int, default=3, help="neighbours of precision and recall")
  parser.add_argument("--seed", type=int, default=0, help="of subsets and clusterings")
  parser.add_argument("--json", type=pathlib.Path, help="write the result to this file too")
  arguments = parser.parse_args(argv)
  try:
    if arguments.side < 32:
      raise ConfigError(f"--side is {arguments.side}, but the networks need 32 pixels at least.")
    result = evaluate(arguments)
    print(table(result))
    if arguments.json:
      arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
  except MemdiffError as error:
    print(f"memdiff: {error}", file=sys.stderr)
    return error.exit_code
  return 0


if __name__ == "__main__":
  sys.exit(main())
