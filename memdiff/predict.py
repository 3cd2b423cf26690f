"""Predicts classes of new images or embeddings with what a finished run has trained.

  python -m memdiff.predict --workdir=runs/mine --input=new_images/ --output=predictions.csv

A run on images takes a folder of images at any depth, one image, or an array of them; a run on
embeddings takes .npz, .npy, .parquet or a folder of .parquet files. The output, .csv or .parquet,
has a line for every input: its path or row, the most probable classes with their probabilities, and
an error if it could not be read. The data that the run was trained on are not needed.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from input_pipeline import new_inputs
from memdiff.errors import ConfigError, exit_code
from memdiff.evaluation import wording
from memdiff.prediction import methods
from memdiff.prediction import predict as prediction
from memdiff.prediction.classifier import Classifier
from memdiff.prediction.finished import FinishedRun, open_run
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.progress import Progress


def add_choice(parser: argparse.ArgumentParser) -> None:
  """The options that say which classifier of which run."""
  parser.add_argument("--workdir", required=True, help="folder of the finished run")
  parser.add_argument("--method", default="", help="of the run; default: the recommended one")
  parser.add_argument("--seed", type=int, help="seed of the model; default: the first of the run")
  parser.add_argument(
    "--average", action="store_true", help="average the probabilities of the models of all seeds"
  )


def choose(arguments: argparse.Namespace) -> tuple[FinishedRun, Classifier]:
  """The run and the classifier that the options mean; says which on stderr.

  Raises:
    MemdiffError: if there is no such run, method or seed.
  """
  run = open_run(arguments.workdir)
  seeds = run.settings.seeds
  if arguments.average and arguments.seed is not None:
    raise ConfigError("--average and --seed exclude each other; give one of them.")
  if arguments.seed is not None and arguments.seed not in seeds:
    known = ", ".join(map(str, seeds))
    raise ConfigError(f"--seed is {arguments.seed}, but the run has the seeds {known}.")
  first = 0 if arguments.seed is None else seeds.index(arguments.seed)
  numbers = range(len(seeds)) if arguments.average else [first]
  method = run.method(arguments.method)
  classifier = methods.load(run, method, numbers, mesh_lib.make_mesh())
  models = f"{len(seeds)} models averaged" if arguments.average else f"seed {seeds[first]}"
  said = wording.calibration(classifier.calibration)
  print(f"memdiff: {method} of {run.path}, {models}. {said}", file=sys.stderr)
  return run, classifier


def _predict(arguments: argparse.Namespace) -> None:
  if arguments.top < 1:
    raise ConfigError("--top must be at least 1.")
  output = pathlib.Path(arguments.output).expanduser()
  prediction.check_output(output)
  run, classifier = choose(arguments)
  if classifier.takes_images:
    inputs = new_inputs.read_images(arguments.input, classifier.input_shape, classifier.margin)
  else:
    names = run.settings.dataset
    inputs = new_inputs.read_features(
      arguments.input, *classifier.input_shape, names.arrays.features, names.columns.features
    )
  progress = Progress(num_phases=1)
  progress.start_stage(0)
  found = prediction.predict(
    classifier,
    inputs,
    mesh_lib.make_mesh(),
    arguments.top,
    lambda number: progress.step("predicting", number, len(inputs), {}),
  )
  prediction.write(output, prediction.table(classifier, inputs, found))
  failed = f"; {len(found.errors):,} could not be used, and say why" if found.errors else ""
  print(f"predictions of {len(inputs):,} inputs: {output}{failed}")


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m memdiff.predict",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add_choice(parser)
  parser.add_argument("--input", required=True, help="images or embeddings")
  parser.add_argument("--output", required=True, help="file to write, .csv or .parquet")
  parser.add_argument("--top", type=int, default=3, help="number of classes for each input")
  arguments = parser.parse_args(argv)
  return exit_code(lambda: _predict(arguments))


if __name__ == "__main__":
  sys.exit(main())
