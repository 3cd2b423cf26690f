"""Do two versions of the code give the same results? Every number of small runs of every kind.

  python -m benchmarks.smoke record before.json      in one checkout
  python -m benchmarks.smoke record after.json       in the other
  python -m benchmarks.smoke compare before.json after.json

Runs of every kind of experiment, with every generator but LDMLR, take about eight CPU-minutes if
all programs have to be compiled. All numbers of their reports and training curves are kept, times
aside.
"""

import json
import math
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import app, flags, logging
from sklearn.datasets import load_digits

from configs import digits_lt, features
from memdiff import pipeline
from memdiff.synthesis import generators

_TOLERANCE = flags.DEFINE_float("tolerance", 0.0, "Relative difference that is taken as the same.")
_TIMES = ("seconds", "timing", "versions", "command", "platform", "started", "finished", "memory")


def images() -> Any:
  """Every generator but LDMLR, which is slow, and joint training; with frozen folds.

  Without embeddings of the classes, and the generator that is told them.
  """
  config = digits_lt.get_config("smoke")
  left_out = {"ldmlr", "ldmlr_published", "memdiff_described"}
  config.generators.names = tuple(n for n in generators.GENERATORS if n not in left_out)
  config.joint.generators = ("real", "kernel_jitter", "memdiff")
  return config


def retrained() -> Any:
  """Encoders trained anew in every fold, with two losses and several candidates."""
  config = digits_lt.get_config("smoke")
  config.classifier.references = ("balanced_softmax",)
  config.selection.encoder = "retrained"
  config.head.l2, config.head.exponents = (0.0, 5e-4), (0.5, 1.0)
  config.hallucination.start = (0.25, 1.0)
  return config


def classification() -> Any:
  """Losses and heads on images alone."""
  config = digits_lt.get_config("classification")
  config.seeds, config.classifier.num_epochs = (0, 1), 5.7
  config.decoupled.num_epochs = 2.0
  return config


def embeddings(folder: pathlib.Path) -> Any:
  """Pixels of digits as embeddings, cut to a long tail."""
  digits = load_digits()
  order = np.random.default_rng(0).permutation(len(digits.target))
  x, y = digits.data[order].astype(np.float32), digits.target[order]
  place = np.array([np.sum(y[:i] == label) for i, label in enumerate(y)])
  train = place < 100 * 0.6**y
  np.savez(folder / "digits.npz", features=x[train], labels=y[train])
  np.savez(folder / "test.npz", features=x[place >= 100], labels=y[place >= 100])
  config, small = features.get_config(), digits_lt.get_config("smoke")
  config.dataset.train_path = str(folder / "digits.npz")
  config.dataset.test_path = str(folder / "test.npz")
  config.seeds, config.loop = small.seeds, small.loop
  config.diffusion, config.hallucination = small.diffusion, small.hallucination
  config.generators.names = ("kernel_jitter", "class_only", "memdiff")
  config.head.training.num_steps, config.selection.folds = 30, 2
  return config


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
  """(path, number) of everything in nested dictionaries and lists, times aside."""
  if isinstance(value, dict):
    for key, inside in value.items():
      if not any(word in key for word in _TIMES):
        yield from numbers(inside, f"{name}/{key}")
  elif isinstance(value, list):
    for index, inside in enumerate(value):
      yield from numbers(inside, f"{name}/{index}")
  elif isinstance(value, (int, float)):
    yield name, float(value)


def record(path: pathlib.Path) -> None:
  found = {}
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    runs = {
      "images": images(), "retrained": retrained(), "classification": classification(),
      "embeddings": embeddings(folder),
    }  # fmt: skip
    for name, config in runs.items():
      report = pipeline.run(
        config.to_dict(), str(folder / name), tensorboard=False, command="smoke"
      )
      report.pop("config")
      found |= dict(numbers(report, name))
      for curve in sorted((folder / name).rglob("metrics.jsonl")):
        lines = [json.loads(line) for line in curve.read_text(encoding="utf-8").splitlines()]
        found |= dict(numbers(lines, str(curve.relative_to(folder))))
  path.write_text(json.dumps(found, indent=1), encoding="utf-8")
  print(f"{len(found):,} numbers in {path}")


def compare(first: pathlib.Path, second: pathlib.Path, tolerance: float) -> int:
  """Prints what differs; the number of differences."""
  ours, theirs = (json.loads(path.read_text(encoding="utf-8")) for path in (first, second))
  different = [f"only in one: {name}" for name in sorted(ours.keys() ^ theirs.keys())]
  for name in sorted(ours.keys() & theirs.keys()):
    a, b = ours[name], theirs[name]
    if not math.isclose(a, b, rel_tol=tolerance) and not (math.isnan(a) and math.isnan(b)):
      different.append(f"{name}: {a} and {b}")
  print("\n".join(different[:50]))
  print(f"{len(different):,} of {len(ours.keys() | theirs.keys()):,} numbers differ")
  return len(different)


def main(arguments: list[str]) -> None:
  logging.set_verbosity(logging.ERROR)
  match arguments[1:]:
    case ["record", path]:
      record(pathlib.Path(path))
    case ["compare", first, second]:
      different = compare(pathlib.Path(first), pathlib.Path(second), _TOLERANCE.value)
      raise SystemExit(different > 0)
    case _:
      raise app.UsageError("record FILE, or compare FILE FILE")


if __name__ == "__main__":
  app.run(main)
