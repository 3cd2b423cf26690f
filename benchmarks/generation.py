"""What methods of image generation are worth, from finished runs: a page of results.

  python -m benchmarks.generation --digits runs/digits_full/report.json

keeps of every report what the page shows, in docs/results/image_generation.json, and
`python -m benchmarks.pages` writes the page. A set that is not given stays as it is. Several
reports of one set, of methods that were run apart, are joined.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.isolating import table_of
from memdiff import config_flag
from memdiff.evaluation import image_report, numerals
from memdiff.evaluation.lookup import mean_of
from memdiff.runtime.workdir import write_json

RESULT = pathlib.Path(__file__).parent.parent / "docs" / "results" / "image_generation.json"
BALANCED = "digits_balanced"  # plain diffusion on the whole set
ORDER = ("coral", "cbdm", "t2h", "ddpm")  # from the best to the worst, as CORAL's paper has it
_PICTURE = "image_generation_{}.png"
_SWEPT = ("fd_few", "fd", "right_few", "copied_few")
_SHOWN = ("fd_few", "fd", "kid", "recall", "right_few", "right", "copied_few", "copied")
_OF_PROMPTS = ("fd_few", "fd", "kid", "right_few", "right", "caption_few", "caption", "diversity",
               "copied_few", "copied")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Set:
  """How the page shows one set.

  Attributes:
    title: of its section.
    shown: the columns of its table.
    compared: those whose differences from the baseline are shown.
    sheet: the method whose images are shown over their prompts, if any.
  """

  title: str
  shown: tuple[str, ...] = _SHOWN
  compared: tuple[str, ...] = ("fd_few", "fd")
  sheet: str = ""


SETS = {
  "digits": Set("Digits, 8 x 8 pixels"),
  "fashion_mnist": Set("Fashion-MNIST, 28 x 28 pixels"),
  "omniglot": Set("Omniglot, 28 x 28 pixels"),
  "emoji": Set(
    "Emoji from words, 16 x 16 pixels",
    _OF_PROMPTS,
    ("fd_few", "fd", "right_few"),
    "balanced+prompted",
  ),
}


def command_of(report: Mapping[str, Any]) -> str:
  """What was typed, with folders that others have too."""
  command = re.sub(r"--workdir=\S+", f"--workdir=runs/{report['name']}", report["command"])
  command = re.sub(r"(--config\.dataset\.data_dir=)\S+", r"\1DIR", command)
  return config_flag.command_line(shlex.split(command))


def reduced(report: Mapping[str, Any]) -> dict[str, Any]:
  """The parts of a report that the page shows."""
  found = report["images"]
  swept = found["sweep"] or found["rows"]
  rows = [_kept_row(row, all_metrics=row["scale"] == swept[0]["scale"]) for row in swept]
  first = {key: found[key] for key in found if key not in ("rows", "sweep")}
  return {
    "commands": [command_of(report)],
    "config": {key: report["config"][key] for key in ("seeds", "sampling", "diffusion")},
    "dataset": {key: report["dataset"][key] for key in ("train_counts", "split_sha256")},
    "versions": report["versions"],
    "hardware": report["hardware"],
    "images": first | {"rows": rows, "sweep": []},
  }


def _kept_row(row: Mapping[str, Any], *, all_metrics: bool) -> dict[str, Any]:
  """A row without its values by class; of further guidance scales, what the page shows."""
  names = [name for name in row if not name.startswith("per_class_")]
  if not all_metrics:
    names = ["method", "scale", "seeds", *(name for name in _SWEPT if name in row)]
  return {
    name: {key: row[name][key] for key in ("mean", "std", "values")}
    if isinstance(row[name], dict)
    else row[name]
    for name in names
  }


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Reduced reports of one set as one.

  Raises:
    SystemExit: if they are not of the same training, samples and split.
  """
  first = parts[0]
  for part in parts[1:]:
    for key in ("config", "dataset"):
      if part[key] != first[key]:
        raise SystemExit(f"The reports differ in their {key}, so that their rows do not compare.")
  rows = {(row["method"], row["scale"]): row for part in parts for row in part["images"]["rows"]}
  commands = [command for part in parts for command in part["commands"]]
  return first | {"commands": commands, "images": first["images"] | {"rows": list(rows.values())}}


def _cells(row: Mapping[str, Any], keys: tuple[str, ...], columns: Mapping[str, Any]) -> list[str]:
  return [image_report.cell(row, key, columns[key]) for key in keys]


def _scales(kept: Mapping[str, Any]) -> list[float]:
  return list(dict.fromkeys(row["scale"] for row in kept["images"]["rows"]))


def _rows(kept: Mapping[str, Any], scale: float) -> list[Mapping[str, Any]]:
  return [row for row in kept["images"]["rows"] if row["scale"] == scale]


def _table(kept: Mapping[str, Any], shown: tuple[str, ...]) -> str:
  columns = image_report.columns(kept["images"]["network"])
  titles = ["method", *(columns[key].title for key in shown)]
  rows = _rows(kept, _scales(kept)[0])
  lines = [[f"`{row['method']}`", *_cells(row, shown, columns)] for row in rows]
  return table_of(titles, lines)


def _sweep(kept: Mapping[str, Any]) -> list[str]:
  """What guidance does to rare classes, if there are several scales: a table per metric."""
  scales, columns = _scales(kept), image_report.columns(kept["images"]["network"])
  if len(scales) < 2:
    return []
  by_scale = [{row["method"]: row for row in _rows(kept, scale)} for scale in scales]
  parts = ["By guidance scale (1 is none; papers write ω = scale − 1):"]
  for key in _SWEPT:
    lines = [
      [f"`{method}`", *(image_report.cell(rows[method], key, columns[key]) for rows in by_scale)]
      for method in by_scale[0]
    ]
    parts.append(table_of([columns[key].title, *(f"{scale:g}" for scale in scales)], lines))
  return parts


def _differences(kept: Mapping[str, Any], compared: tuple[str, ...]) -> list[str]:
  """Every method over the baseline, seed by seed, at the first guidance scale."""
  rows, columns = _rows(kept, _scales(kept)[0]), image_report.columns(kept["images"]["network"])
  plain = image_report.baseline(rows)
  lines = [
    [f"`{row['method']}`", *(_difference(row, plain, key, columns[key])[0] for key in compared)]
    for row in rows
    if row is not plain
  ]
  better = "below zero is better"
  if any(columns[key].percent for key in compared):
    better += " for distances, above zero for shares (in points)"
  return [
    f"Difference from `{plain['method']}` seed by seed, with the 95 % interval over seeds;"
    f" {better}.",
    table_of(["method", *(columns[key].title for key in compared)], lines),
  ]


def _difference(row, other, key: str, column: image_report.Column) -> tuple[str, str]:
  """(seed by seed with its interval, the verdict: lower, higher or unclear)."""
  unit = 100 if column.percent else 1
  ours, theirs = ([unit * value for value in x[key]["values"]] for x in (row, other))
  estimate = image_report.paired_difference(ours, theirs)
  low, high = estimate.interval()
  verdict = "lower" if high < 0 else "higher" if low > 0 else "unclear"
  ends = f"{numerals.number(low)} to {numerals.number(high)}"
  return f"{numerals.number(estimate.mean)} ({ends})", verdict


def _order(kept: Mapping[str, Any]) -> list[str]:
  """Whether the order of CORAL's paper holds here, pair by pair, at every guidance scale."""
  scales, words = _scales(kept), {"lower": "yes", "higher": "no", "unclear": "unclear"}
  by_scale = [{row["method"]: row for row in _rows(kept, scale)} for scale in scales]
  if not all(name in by_scale[0] for name in ORDER):
    return []
  column, lines = image_report.columns(kept["images"]["network"])["fd"], []
  for better, worse in itertools.pairwise(ORDER):
    found = [_difference(rows[better], rows[worse], "fd", column) for rows in by_scale]
    cells = [f"{words[verdict]}, {value}" for value, verdict in found]
    lines.append([f"`{better}` below `{worse}`", *cells])
  return [
    "CORAL's paper finds, after 150,000 steps and with guidance, FID in the order "
    + " < ".join(f"`{name}`" for name in ORDER)
    + ". Here, by FD of all classes:",
    table_of(["by guidance scale", *(f"{scale:g}" for scale in scales)], lines),
  ]


def _bottlenecks(kept: Mapping[str, Any], balanced: Mapping[str, Any]) -> list[str]:
  """How far apart the U-Net keeps classes, beside one that was trained on a balanced set."""
  keys = ("intra_cosine", "inter_cosine")
  columns = image_report.columns(kept["images"]["network"])
  rows = [(f"`{row['method']}`", row) for row in _rows(kept, _scales(kept)[0])]
  rows += [("`ddpm`, balanced set", row) for row in balanced["images"]["rows"]]
  lines = [[name, *_cells(row, keys, columns)] for name, row in rows]
  counts = balanced["dataset"]["train_counts"]
  return [
    "CORAL's diagnosis: the mean cosine of the U-Net's bottlenecks of two test images of one class"
    " (within), and of two classes (between); noised to a quarter of the steps, under their own"
    f" label. The balanced set has {max(counts)} to {min(counts)} images per class"
    f" (`{balanced['commands'][0]}`).",
    table_of(["method", "within", "between"], lines),
  ]


def _set(name: str, kept: Mapping[str, Any]) -> str:
  shown, counts, found = SETS[name], kept["dataset"]["train_counts"], kept["images"]
  columns = image_report.columns(found["network"])
  best = min(_rows(kept, _scales(kept)[0]), key=lambda row: mean_of(row, "fd_few"))
  parts = [
    f"## {shown.title}, {max(counts)} to {min(counts)} training images per class",
    *(f"`{command}`" for command in kept["commands"]),
    f"{image_report.protocol(kept)} {kept['hardware']['device_kind']}, Python"
    f" {kept['versions']['python']}, JAX {kept['versions']['jax']}.",
    f"The lowest {columns['fd_few'].title} is that of `{best['method']}`. The classifier sees the"
    f" class asked for in {numerals.percent(mean_of(best, 'right_few'))} % of its images of the"
    f" rarest classes; by chance it would in {numerals.percent(1 / len(counts))} %.",
    _table(kept, shown.shown),
    *_sweep(kept),
  ]
  if len(kept["config"]["seeds"]) > 1:
    parts += [*_differences(kept, shown.compared), *_order(kept)]
  if shown.sheet:
    picture = f"![images and prompts]({_PICTURE.format(name)})"
    parts += [f"Images by `{shown.sheet}` over their prompts:", picture]
  return "\n\n".join(parts)


def page(kept: Mapping[str, Any]) -> str:
  """The whole page."""
  meanings = [
    f"- **{column.title}**: {column.meaning}."
    for key, column in image_report.columns("classifier").items()
    if any(key in SETS[name].shown for name in SETS if name in kept)
  ]
  intro = (
    "What methods of long-tailed image generation are worth under one short budget, the same for"
    " all. These are small U-Nets on two CPU cores, minutes per method, and not comparable with"
    " published figures of U-Nets that train for days. All methods start from the same weights"
    " and see the same batches and noise. No setting was chosen by these figures."
  )
  sets = [_set(name, kept[name]) for name in SETS if name in kept]
  if BALANCED in kept:
    sets.append(
      "\n\n".join(
        ["## Do U-Nets keep rare classes apart?", *_bottlenecks(kept["digits"], kept[BALANCED])]
      )
    )
  head = ["# Generated images of rare classes", intro, *sets, "## Columns", "\n".join(meanings)]
  return "\n\n".join(head) + "\n"


def _keep_sheet(name: str, workdirs: Sequence[pathlib.Path]) -> None:
  """Copies the sheet of a set that has one, from the run that drew it."""
  if name in SETS and SETS[name].sheet:
    pictures = [w / "evaluation" / f"prompts_{SETS[name].sheet}.png" for w in workdirs]
    drawn = next(picture for picture in pictures if picture.exists())
    shutil.copyfile(drawn, RESULT.parent / _PICTURE.format(name))


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  for name in (*SETS, BALANCED):
    parser.add_argument(f"--{name}", type=pathlib.Path, nargs="+", help="report.json of its runs")
  arguments = vars(parser.parse_args())
  kept = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
  for name, paths in arguments.items():
    if paths:
      kept[name] = joined([reduced(json.loads(p.read_text(encoding="utf-8"))) for p in paths])
      _keep_sheet(name, [path.parent for path in paths])
  write_json(RESULT, kept)


if __name__ == "__main__":
  main()
