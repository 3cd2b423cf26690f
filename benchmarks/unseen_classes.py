"""Can a U-Net draw characters of alphabets that its training never saw, from a few exemplars?

  python -m benchmarks.unseen_classes prepare --images=DIR --out=DIR2
  python main.py --config=configs/images/omniglot_lt.py --workdir=runs/omniglot \\
    --config.dataset.data_dir=DIR2
  python -m benchmarks.unseen_classes judge --workdir=runs/omniglot --data=DIR2

`prepare` splits Omniglot, whose images lie in DIR/ALPHABET/CHARACTER: of every character 14
drawings to DIR2/train and 6 to DIR2/test, and the alphabets that are left out to DIR2/unseen.
`judge` asks a run's U-Net for every unseen character, and a classifier that knows neither them nor
their alphabets, by the nearest class mean of its features, which character each drawing is. The
means are those of drawings that were not shown. It keeps what it finds in
docs/results/unseen_classes.json.
"""

import argparse
import itertools
import json
import pathlib
import shutil
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks import generation
from benchmarks.isolating import table_of
from memdiff import pipeline
from memdiff.evaluation import image_quality
from memdiff.experiments import draw, image_evaluation
from memdiff.runtime.workdir import write_json
from memdiff.synthesis import image_methods

RESULT = pathlib.Path(__file__).parent.parent / "docs" / "results" / "unseen_classes.json"
REAL = "real drawings"
TRAIN, TEST = 14, 6  # drawings of a character
SHOWN, MEANS = 4, 8  # of an unseen one: exemplars, and those of its mean; the others are compared


def prepare(images: pathlib.Path, out: pathlib.Path, left_out: Sequence[str]) -> None:
  """Copies the drawings, in the order of their names, to their parts."""
  for folder in sorted(path for path in images.glob("*/*") if path.is_dir()):
    files = sorted(folder.glob("*.png"))
    if len(files) != TRAIN + TEST:
      raise SystemExit(f"{folder} has {len(files)} drawings, but {TRAIN + TEST} are expected.")
    name = f"{folder.parent.name}.{folder.name}"
    unseen = folder.parent.name in left_out
    for number, file in enumerate(files):
      part = "unseen" if unseen else "train" if number < TRAIN else "test"
      place = out / part / name
      place.mkdir(parents=True, exist_ok=True)
      shutil.copy(file, place / file.name)


def read_unseen(data: pathlib.Path, shape: Sequence[int]) -> np.ndarray:
  """[characters, drawings, H, W, 1] uint8."""
  folders = sorted((data / "unseen").iterdir())
  return np.stack([draw.read_exemplars(folder, shape) for folder in folders])


def measured(images: np.ndarray, shown: np.ndarray, encode, means: np.ndarray) -> dict[str, float]:
  """How good drawings [C, n, ...] of unseen characters are, made from `shown` [C, K, ...].

  `right` is the share whose nearest of `means` [C, D] is their own, `copied` the share that are
  nearly copies of an exemplar, `spread` the mean distance in pixels of two drawings of a character.
  """
  number = images.shape[1]
  drawings = images.reshape(-1, *images.shape[2:])
  features = encode(drawings)[0]
  distances = np.linalg.norm(features[:, None] - means[None], axis=2)
  right = distances.argmin(axis=1) == np.repeat(np.arange(len(images)), number)
  near = image_quality.nearest(drawings, shown.reshape(-1, *shown.shape[2:]))
  flat = images.reshape(len(images), number, -1) / 255
  apart = np.linalg.norm(flat[:, :, None] - flat[:, None], axis=3)
  return {
    "right": float(right.mean()),
    "copied": float(near.copied.mean()),
    "spread": float(apart.sum() / (len(images) * number * (number - 1))),
  }


def judge(workdir: pathlib.Path, data: pathlib.Path, number: int, scales: Sequence[float]) -> dict:
  """Rows of the table, and how they came about."""
  report = draw.read_report(workdir)
  _, experiment = pipeline.open_experiment(
    report["config"], str(workdir), tensorboard=False, command=report["command"]
  )
  network = image_evaluation.network_of(experiment)
  unseen = read_unseen(data, report["images"]["image_shape"])
  shown, rest, compared = np.split(unseen, (SHOWN, SHOWN + MEANS), axis=1)
  encoded = network.encode(rest.reshape(-1, *rest.shape[2:]))[0]
  means = encoded.reshape(*rest.shape[:2], -1).mean(axis=1)
  rows = {REAL: measured(compared, shown, network.encode, means)}
  for method in experiment.config.methods:
    if not image_methods.apply(method, experiment.config.diffusion).memory.num_shown:
      continue
    for k, scale in itertools.product((1, SHOWN), scales):
      drawn = np.stack([
        draw.draw(
          workdir, number, exemplars=exemplars[:k], method=method, scale=scale, seed=seed
        )
        for seed, exemplars in enumerate(shown)
      ])  # fmt: skip
      name = f"{method}, {k} exemplar{'s' * (k > 1)}, guidance {scale:g}"
      rows[name] = measured(drawn, shown[:, :k], network.encode, means)
      print(f"{name}: {rows[name]}", flush=True)
  return {
    "rows": rows,
    "characters": len(unseen),
    "drawings": number,
    "network": network.description,
    "train_counts": report["dataset"]["train_counts"],
    "command": generation.command_of(report),
    "versions": report["versions"],
    "hardware": report["hardware"],
  }


def page(kept: Mapping) -> str:
  """The page of results."""
  names = {"right": "right character", "copied": "copies of an exemplar", "spread": "spread"}
  best = max(row["right"] for name, row in kept["rows"].items() if name != REAL)
  lines = [
    [name, f"{100 * row['right']:.1f} %", f"{100 * row['copied']:.1f} %", f"{row['spread']:.2f}"]
    for name, row in kept["rows"].items()
  ]
  return "\n\n".join([
    "# Characters of alphabets that training never saw",
    f"{kept['characters']} characters of left-out alphabets of Omniglot, {kept['drawings']}"
    " drawings of each, made from exemplars alone by the U-Net of"
    f" {sum(kept['train_counts']):,} drawings of {len(kept['train_counts'])} other characters"
    f" ({max(kept['train_counts'])} to {min(kept['train_counts'])} each).",
    f"At best {100 * best:.1f} % of them show the character that was asked for; guessing would be"
    f" right in {100 / kept['characters']:.1f} %, and {100 * kept['rows'][REAL]['right']:.1f} % of"
    " real drawings are recognised. Judged by the nearest class mean in the features of"
    f" {kept['network']}.",
    table_of(["drawings", *names.values()], lines),
    "Spread: mean distance in pixels, each from 0 to 1, of two drawings of a character.",
    "## Reproduce",
    f"`{kept['command']}`, then `python -m benchmarks.unseen_classes judge"
    f" --workdir=runs/omniglot_lt_images --data=DIR`. {kept['hardware']['device_kind']}, Python"
    f" {kept['versions']['python']}, JAX {kept['versions']['jax']}.",
  ]) + "\n"  # fmt: skip


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  commands = parser.add_subparsers(dest="command", required=True)
  first = commands.add_parser("prepare")
  first.add_argument("--images", type=pathlib.Path, required=True, help="ALPHABET/CHARACTER/*.png")
  first.add_argument("--out", type=pathlib.Path, required=True, help="train, test, unseen")
  first.add_argument("--left_out", nargs="+", default=["Greek", "Tagalog"], help="alphabets")
  second = commands.add_parser("judge")
  second.add_argument("--workdir", type=pathlib.Path, required=True, help="of the finished run")
  second.add_argument("--data", type=pathlib.Path, required=True, help="what prepare wrote")
  second.add_argument("--number", type=int, default=8, help="drawings per character")
  second.add_argument("--scales", type=float, nargs="+", default=[1.0, 2.0, 4.0], help="guidance")
  arguments = parser.parse_args()
  if arguments.command == "prepare":
    prepare(arguments.images, arguments.out, arguments.left_out)
  else:
    found = judge(arguments.workdir, arguments.data, arguments.number, arguments.scales)
    write_json(RESULT, found)
    print(json.dumps(found["rows"], indent=2))


if __name__ == "__main__":
  main()
