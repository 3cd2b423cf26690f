"""Does the evaluator of images see what it should? Real digits, and what is done to them.

  python -m benchmarks.image_metrics [--json FILE] [--weights FILE]

Half of scikit-learn's digits, 8 x 8 pixels resized to 64, is the reference. The other half is held
against it as it is, and after damage of known kinds: classes left out, images blurred, noisy, or a
few repeated. A metric is of use if it tells the damage that it is meant for.
"""

import argparse
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import ndimage
from sklearn.datasets import load_digits

from benchmarks import timing
from memdiff.evaluation import image_quality, images, networks
from memdiff.evaluation.image_sets import ImageSet

_SIDE, _KID_SIZE, _K = 64, 200, 3
_SHOWN = ("fd", "kid", "precision", "recall", "density", "coverage", "f8", "f1_8")


def damaged(digits: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
  """Name -> images [N, 8, 8, 1] uint8, all of about one number."""
  generator = np.random.default_rng(0)
  half = digits[labels < 5]
  noise = generator.normal(scale=40, size=digits.shape)
  return {
    "other digits, as they are": digits,
    "without the digits 5 to 9, the others twice": np.concatenate([half, half])[: len(digits)],
    "only the digit 0, repeated": np.resize(digits[labels == 0], digits.shape),
    "blurred (Gaussian, 0.7 pixels)": ndimage.gaussian_filter(digits, (0, 0.7, 0.7, 0)),
    "noisy (deviation 40 of 255)": np.clip(digits + noise, 0, 255).astype(np.uint8),
    "every tenth, ten times": np.resize(digits[::10].repeat(10, axis=0), digits.shape),
  }


def measure(weights: str) -> dict[str, Any]:
  """The metrics of every set."""
  network, _ = networks.make_network("efficientnet_lite0", weights)
  data = load_digits()
  digits = np.round(data.images * 255 / 16).astype(np.uint8)[..., None]
  order = np.random.default_rng(1).permutation(len(digits))
  first, second = np.array_split(order, 2)

  def encode(pixels: np.ndarray, name: str) -> np.ndarray:
    return images.encode(ImageSet(name, pixels), network, _SIDE)

  real, found = encode(digits[first], "reference"), {}
  for name, pixels in damaged(digits[second], data.target[second]).items():
    generated = encode(pixels, name)
    found[name] = image_quality.compare_sets(real, generated, kid_size=_KID_SIZE, k=_K, seed=0)
    print(f"{name}: {found[name]}", flush=True)
  return {
    "network": "efficientnet_lite0", "side": _SIDE, "kid_size": _KID_SIZE, "k": _K,
    "reference": len(first), "sets": found, **timing.environment(),
  }  # fmt: skip


def table(result: Mapping[str, Any]) -> str:
  """The metrics in Markdown, a row per set."""
  lines = ["| set | " + " | ".join(_SHOWN) + " |", "|---" * (len(_SHOWN) + 1) + "|"]
  for name, metrics in result["sets"].items():
    shown = [f"{metrics[m]:.1f}" if m == "fd" else f"{metrics[m]:.2f}" for m in _SHOWN]
    lines.append(f"| {name} | " + " | ".join(shown) + " |")
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--json", type=pathlib.Path, help="write versions and all figures")
  parser.add_argument("--weights", default="", help="the network's file; none: from its package")
  arguments = parser.parse_args()
  result = measure(arguments.weights)
  print(table(result))
  if arguments.json:
    arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
