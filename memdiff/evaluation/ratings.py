"""People rate generated images: sheets to look at, a table to fill in, and what comes out of it.

  python -m memdiff.evaluation.ratings make --out=DIR --number=60 \\
    --images plain=FILE_OR_DIR prompted=FILE_OR_DIR
  python -m memdiff.evaluation.ratings read --out=DIR --json=FILE

`make` draws as many images of each source and mixes them, so that a rater does not know which is
which. It writes sheet_01.png, ... with numbered images over their prompts, ratings.csv to fill in,
and key.csv, which says where each image is from. A rating is a whole number from 1, worst, to 5,
best, in `quality` and in `matches`; images that are not rated stay empty. `read` gives means by
source with 95 % intervals. If DIR is the folder `ratings` of a run's workdir, the run's command,
called again, puts them into its report. FILE has `images` and `prompt`, as
`memdiff.evaluation.clip_score` reads them.
"""

import argparse
import csv
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from memdiff.errors import ConfigError, DataError, exit_code
from memdiff.evaluation import clip_score
from memdiff.runtime.workdir import write_atomically

_PAGE = 30  # images of a sheet
ASKED = ("quality", "matches")
FOLDER, _RATINGS, _KEY = "ratings", "ratings.csv", "key.csv"


def make(sources: Mapping[str, str], out: pathlib.Path, number: int, seed: int = 0) -> int:
  """Writes sheets and tables; how many images are on them.

  Raises:
    ConfigError: if a source has fewer images than are asked for.
    DataError: if a source cannot be read.
  """
  from memdiff.evaluation import plots  # matplotlib takes a second

  generator, drawn = np.random.default_rng(seed), []
  for name, path in sources.items():
    images, prompts = clip_score.read(path)
    if len(images) < number:
      raise ConfigError(f"{path} has {len(images)} images, fewer than --number={number}.")
    chosen = generator.permutation(len(images))[:number].tolist()
    drawn += [(name, path, row, images[row], prompts[row]) for row in chosen]
  mixed = [drawn[i] for i in generator.permutation(len(drawn))]
  out.mkdir(parents=True, exist_ok=True)
  width = plots.PROMPTED
  for page, start in enumerate(range(0, len(mixed), _PAGE), 1):
    rows = [mixed[i : i + width] for i in range(start, min(start + _PAGE, len(mixed)), width)]
    numbers = [start + width * i + 1 for i in range(len(rows))]
    figure = plots.prompt_sheet(
      f"Sheet {page}",
      [f"{first} to {first + len(row) - 1}" for first, row in zip(numbers, rows, strict=True)],
      [([image for *_, image, _ in row], [prompt for *_, prompt in row]) for row in rows],
    )
    write_atomically(out / f"sheet_{page:02d}.png", plots.to_png(figure))
  asked = [("number", "prompt", *ASKED)]
  asked += [(n, entry[4], "", "") for n, entry in enumerate(mixed, 1)]
  key = [("number", "source", "path", "row")]
  key += [(n, *entry[:3]) for n, entry in enumerate(mixed, 1)]
  for name, rows in ((_RATINGS, asked), (_KEY, key)):
    with open(out / name, "w", encoding="utf-8", newline="") as file:
      csv.writer(file).writerows(rows)
  return len(mixed)


def _table(path: pathlib.Path) -> list[dict[str, str]]:
  try:
    with open(path, encoding="utf-8-sig", newline="") as file:
      return list(csv.DictReader(file))
  except (OSError, ValueError, csv.Error) as error:
    raise DataError(f"Cannot read {path} ({error}).") from error


def _rating(path: pathlib.Path, row: Mapping[str, str], name: str) -> int | None:
  text = (row.get(name) or "").strip()
  if not text:
    return None
  if text not in ("1", "2", "3", "4", "5"):
    raise DataError(
      f"{path}, image {row.get('number')}: {name} is {text!r}, but must be a whole number from 1 to"
      " 5, or empty."
    )
  return int(text)


def read(out: pathlib.Path) -> dict[str, Any]:
  """{source: {"quality" and "matches": {"mean", "interval", "number"}}} of a filled table.

  Raises:
    DataError: if a table is missing, a rating is none, or nothing is rated.
  """
  source = {row["number"]: row["source"] for row in _table(out / _KEY)}
  given: dict[str, dict[str, list[int]]] = {}
  for row in _table(out / _RATINGS):
    for name in ASKED:
      rating = _rating(out / _RATINGS, row, name)
      if rating is not None:
        of_source = given.setdefault(source[row["number"]], {})
        of_source.setdefault(name, []).append(rating)
  if not given:
    raise DataError(f"{out / _RATINGS} holds no rating; fill in {' and '.join(ASKED)}.")
  return {
    name: {what: _mean(ratings) for what, ratings in found.items()}
    for name, found in sorted(given.items())
  }


def _mean(ratings: Sequence[int]) -> dict[str, Any]:
  """With a 95 % interval by Student's t, None for a single rating."""
  from scipy import stats

  number, mean = len(ratings), float(np.mean(ratings))
  if number < 2:
    return {"mean": mean, "interval": None, "number": number}
  half = stats.t.ppf(0.975, number - 1) * np.std(ratings, ddof=1) / np.sqrt(number)
  return {"mean": mean, "interval": [mean - float(half), mean + float(half)], "number": number}


def of_run(workdir: pathlib.Path) -> dict[str, Any] | None:
  """What people say of the images of a run, from its folder `ratings`; None if there is none.

  A table that cannot be read is said on stderr, since it is no reason to lose a report.
  """
  folder = workdir / FOLDER
  if not (folder / _RATINGS).exists():
    return None
  try:
    return read(folder)
  except DataError as error:
    print(f"memdiff: the report has no ratings. {error}", file=sys.stderr)
    return None


def cells(found: Mapping[str, Any]) -> list[str]:
  """Of a source: one text for each of ASKED."""
  return [_in_words(found[what]) if what in found else "" for what in ASKED]


def _in_words(row: Mapping[str, Any]) -> str:
  limits = " ({:.2f} to {:.2f})".format(*row["interval"]) if row["interval"] else ""
  return f"{row['mean']:.2f}{limits}, {row['number']}"


def _sources(arguments: Sequence[str]) -> dict[str, str]:
  pairs = [text.partition("=") for text in arguments]
  if not pairs or any(not name or not path for name, _, path in pairs):
    raise ConfigError("--images needs a name and a path for each source, such as plain=DIR.")
  if len({name for name, *_ in pairs}) < len(pairs):
    raise ConfigError("--images names a source twice.")
  return {name: path for name, _, path in pairs}


def _rate(arguments: argparse.Namespace) -> None:
  if arguments.step == "make":
    if arguments.number < 1:
      raise ConfigError("--number must be at least 1.")
    made = make(_sources(arguments.images), arguments.out, arguments.number, arguments.seed)
    print(f"{made} images to rate: fill in {arguments.out / _RATINGS}")
    return
  result = read(arguments.out)
  for name, found in result.items():
    for what, text in zip(ASKED, cells(found), strict=True):
      print(f"{name:24s} {what:8s} {text or 'not rated'}")
  if arguments.json:
    arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m memdiff.evaluation.ratings",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("step", choices=("make", "read"))
  parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of sheets and tables")
  parser.add_argument("--images", nargs="*", default=[], help="make: NAME=FILE_OR_DIR, several")
  parser.add_argument("--number", type=int, default=60, help="make: images of each source")
  parser.add_argument("--seed", type=int, default=0, help="make: which images, in which order")
  parser.add_argument("--json", type=pathlib.Path, help="read: write the result to this file too")
  arguments = parser.parse_args(argv)
  return exit_code(lambda: _rate(arguments))


if __name__ == "__main__":
  sys.exit(main())
