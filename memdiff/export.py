"""Writes a classifier of a finished run as files that work without memdiff.

  python -m memdiff.export --workdir=runs/mine --output=model/

The folder gets weights.safetensors, classifier.stablehlo (a program of jax.export), model.json and
README.md, which says how to use them and how good the classifier is.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from memdiff.errors import exit_code
from memdiff.predict import add_choice, choose
from memdiff.prediction import export


def _export(arguments: argparse.Namespace) -> None:
  folder = pathlib.Path(arguments.output).expanduser()
  names = export.write(folder, *choose(arguments))
  print(f"{folder} holds {', '.join(names)}")


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m memdiff.export",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add_choice(parser)
  parser.add_argument("--output", required=True, help="folder for the files")
  arguments = parser.parse_args(argv)
  return exit_code(lambda: _export(arguments))


if __name__ == "__main__":
  sys.exit(main())
