"""What methods of image generation are worth, from finished runs: a page of results.

  python -m benchmarks.generation --digits=runs/digits_full/report.json

keeps of every report what the page shows, in docs/results/image_generation.json, and
`python -m benchmarks.pages` writes the page. A set that is not given stays as it is.
"""

import argparse
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from benchmarks.isolating import table_of
from memdiff.evaluation import image_report, numerals
from memdiff.evaluation.lookup import mean_of
from memdiff.runtime.workdir import write_json

RESULT = pathlib.Path(__file__).parent.parent / "docs" / "results" / "image_generation.json"
SETS = {"digits": "Digits, 8 x 8 pixels"}
_SHOWN = ("fd_few", "fd", "kid", "recall", "right_few", "right", "copied_few", "copied")


def reduced(report: Mapping[str, Any]) -> dict[str, Any]:
  """The parts of a report that the page shows."""
  found = report["images"]
  rows = [
    {
      name: {key: stat[key] for key in ("mean", "std", "values")}
      if isinstance(stat, dict)
      else stat
      for name, stat in row.items()
      if not name.startswith("per_class_")
    }
    for row in found["sweep"] or found["rows"]
  ]
  first = {key: found[key] for key in found if key not in ("rows", "sweep")}
  return {
    "command": re.sub(r"--workdir=\S+", f"--workdir=runs/{report['name']}", report["command"]),
    "config": {key: report["config"][key] for key in ("seeds", "sampling", "diffusion")},
    "dataset": {key: report["dataset"][key] for key in ("train_counts", "split_sha256")},
    "versions": report["versions"],
    "hardware": report["hardware"],
    "images": first | {"rows": rows, "sweep": []},
  }


def _cells(row: Mapping[str, Any], keys: tuple[str, ...], columns: Mapping[str, Any]) -> list[str]:
  return [image_report.cell(row, key, columns[key]) for key in keys]


def _name(row: Mapping[str, Any], scales: set[float]) -> str:
  return f"`{row['method']}`" + (f", scale {row['scale']:g}" if len(scales) > 1 else "")


def _table(kept: Mapping[str, Any]) -> str:
  found = kept["images"]
  columns, scales = image_report.columns(found["network"]), {r["scale"] for r in found["rows"]}
  titles = ["method", *(columns[key].title for key in _SHOWN)]
  lines = [[_name(row, scales), *_cells(row, _SHOWN, columns)] for row in found["rows"]]
  return table_of(titles, lines)


def differences(kept: Mapping[str, Any]) -> list[list[str]]:
  """Every method over plain diffusion, at its scale: FD of rare and of all classes, paired."""
  rows = kept["images"]["rows"]
  lines = []
  for row in rows:
    plain = next((r for r in rows if r["method"] == "ddpm" and r["scale"] == row["scale"]), None)
    if plain is None or row is plain:
      continue
    cells = []
    for key in ("fd_few", "fd"):
      estimate = image_report.paired_difference(row[key]["values"], plain[key]["values"])
      low, high = estimate.interval()
      ends = f"{numerals.number(low)} to {numerals.number(high)}"
      cells.append(f"{numerals.number(estimate.mean)} ({ends})")
    lines.append([_name(row, {r["scale"] for r in rows}), *cells])
  return lines


def _set(title: str, kept: Mapping[str, Any]) -> str:
  counts, found = kept["dataset"]["train_counts"], kept["images"]
  columns = image_report.columns(found["network"])
  best = min(found["rows"], key=lambda row: mean_of(row, "fd_few"))
  parts = [
    f"## {title}, {max(counts)} to {min(counts)} training images per class",
    f"`{kept['command']}`",
    f"{image_report.protocol(kept)} {kept['hardware']['device_kind']}, Python"
    f" {kept['versions']['python']}, JAX {kept['versions']['jax']}.",
    f"The lowest {columns['fd_few'].title} is that of `{best['method']}`.",
    _table(kept),
    "Difference from `ddpm` seed by seed, with the 95 % interval over seeds; below zero is better.",
    table_of(["method", columns["fd_few"].title, columns["fd"].title], differences(kept)),
  ]
  return "\n\n".join(parts)


def page(kept: Mapping[str, Any]) -> str:
  """The whole page."""
  meanings = [
    f"- **{column.title}**: {column.meaning}."
    for key, column in image_report.columns("classifier").items()
    if key in _SHOWN
  ]
  intro = (
    "What methods of long-tailed image generation are worth under one short budget, the same for"
    " all. These are small U-Nets on two CPU cores, minutes per method: not to be set beside"
    " figures of papers, which train for days. All methods start from the same weights and see the"
    " same batches and noise. No setting was chosen by these figures."
  )
  sets = [_set(SETS[name], kept[name]) for name in SETS if name in kept]
  head = ["# Generated images of rare classes", intro, *sets, "## Columns", "\n".join(meanings)]
  return "\n\n".join(head) + "\n"


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  for name in SETS:
    parser.add_argument(f"--{name}", type=pathlib.Path, help="report.json of its run")
  arguments = vars(parser.parse_args())
  kept = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
  for name, path in arguments.items():
    if path:
      kept[name] = reduced(json.loads(path.read_text(encoding="utf-8")))
  write_json(RESULT, kept)


if __name__ == "__main__":
  main()
