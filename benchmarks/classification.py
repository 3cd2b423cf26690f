"""The field's tables, run row by row, beside the published figures.

  python -m benchmarks.classification --table=cifar_lt --data_dir=DIR [--workdir=runs/tables]

Every run is one `main.py` command in a workdir of its own, all seeds at once; the same command
again resumes where it stopped and skips what is finished. After each run
WORKDIR/<table>.md and .json are written anew with what there is. `--epochs` and `--backbone` cut a
run down to what a machine can do; the table then says so, and is no reproduction.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from memdiff.evaluation.tables import HEADLINE_COLUMNS
from memdiff.runtime.workdir import write_atomically, write_json

_BAG_OF_TRICKS = "Zhang et al. 2021, Bag of tricks for long-tailed recognition, 200 epochs"
_MENON = "Menon et al. 2021, official code, 1241 (CIFAR-10) and 1419 (CIFAR-100) epochs"


@dataclasses.dataclass(frozen=True)
class Published:
  """Top-1 accuracies in percent that others report, and who they are."""

  source: str
  top1: dict[str, float]  # by config file


@dataclasses.dataclass(frozen=True)
class Run:
  """One command; its report gives one or several rows.

  Attributes:
    name: of its folder.
    overrides: config field -> value.
    rows: method of the report -> what is published about it.
  """

  name: str
  overrides: dict[str, Any]
  rows: dict[str, Published | None]


def _bag_of_tricks(cifar10: float, cifar100: float) -> Published:
  return Published(_BAG_OF_TRICKS, {"cifar10_lt": cifar10, "cifar100_lt": cifar100})


def _menon(cifar10: float, cifar100: float) -> Published:
  return Published(_MENON, {"cifar10_lt": cifar10, "cifar100_lt": cifar100})


def _single(loss: str, published: Published | None) -> Run:
  return Run(loss, {"classifier.loss": loss}, {loss: published})


# Published as top-1 error; here 100 - error. ResNet-32, imbalance 100.
_IMBALANCE_100 = (
  Run(
    "cross_entropy",
    {
      "classifier.loss": "cross_entropy",
      "decoupled.methods": ("logit_adjustment", "tau_norm", "ncm", "crt", "lws"),
    },
    {
      "cross_entropy": _bag_of_tricks(70.36, 38.32),
      "cross_entropy+logit_adjustment": _menon(77.32, 44.07),
      "cross_entropy+tau_norm": _bag_of_tricks(72.70, 40.96),
      "cross_entropy+ncm": None,
      "cross_entropy+crt": _bag_of_tricks(74.99, 40.26),
      "cross_entropy+lws": _bag_of_tricks(72.63, 40.16),
    },
  ),
  _single("cs_power", _bag_of_tricks(68.30, 32.27)),
  _single("cs_power_drw", _bag_of_tricks(74.82, 41.62)),
  _single("class_balanced", _bag_of_tricks(70.48, 38.97)),
  _single("class_balanced_drw", _bag_of_tricks(74.64, 39.21)),
  _single("focal", _bag_of_tricks(71.56, 37.22)),
  _single("class_balanced_focal", _bag_of_tricks(75.20, 38.56)),
  _single("ldam_drw", _bag_of_tricks(77.73, 42.47)),
  _single("balanced_softmax", _bag_of_tricks(77.54, 42.99)),
  _single("logit_adjustment", _menon(77.89, 44.06)),
)

TABLES = {
  "cifar_lt": (("cifar100_lt", _IMBALANCE_100), ("cifar10_lt", _IMBALANCE_100)),
  "cifar100_lt": (("cifar100_lt", _IMBALANCE_100),),
  "cifar10_lt": (("cifar10_lt", _IMBALANCE_100),),
}


def planned(table: str, only: Sequence[str] | None) -> Iterator[tuple[str, Run]]:
  """(config, run) of a table, or those of it whose names are in `only`."""
  for config, runs in TABLES[table]:
    for run in runs:
      if only is None or run.name in only:
        yield config, run


def command(config: str, run: Run, arguments: argparse.Namespace) -> list[str]:
  """What is typed for a run."""
  overrides = dict(run.overrides)
  if arguments.data_dir:
    overrides["dataset.data_dir"] = arguments.data_dir
  overrides["seeds"] = tuple(range(arguments.seeds))
  if arguments.epochs is not None:
    overrides["classifier.num_epochs"] = float(arguments.epochs)
  if arguments.backbone is not None:
    overrides["encoder.backbone.name"] = arguments.backbone
  return [
    "main.py",
    f"--config=configs/{config}.py",
    f"--workdir={folder_of(arguments, config, run)}",
    *(f"--config.{name}={value}" for name, value in overrides.items()),
    *(() if arguments.tensorboard else ("--notensorboard",)),
  ]


def folder_of(arguments: argparse.Namespace, config: str, run: Run) -> pathlib.Path:
  return pathlib.Path(arguments.workdir) / config / run.name


def read_report(folder: pathlib.Path) -> dict | None:
  path = folder / "report.json"
  return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def collect(config: str, run: Run, report: dict) -> list[dict[str, Any]]:
  """The rows of a finished run, with the settings that matter."""
  settings = report["config"]
  scored = {row["method"]: row for row in report["classification"]}
  rows = []
  for method, published in run.rows.items():
    scores = {name: scored[method][name] for name, _ in HEADLINE_COLUMNS}
    rows.append(
      {
        "config": config,
        "method": method,
        "description": scored[method]["description"],
        "seeds": scored[method]["seeds"],
        "scores": scores,
        "published": published and {"top1": published.top1.get(config), "source": published.source},
        "command": report["command"],
        "settings": {
          "backbone": settings["encoder"]["backbone"]["name"],
          "parameters": report["parameters"],
          "imbalance": report["dataset"]["imbalance"],
          "training images": sum(report["dataset"]["train_counts"]),
          "split SHA-256": report["dataset"]["split_sha256"],
          "epochs": settings["classifier"]["num_epochs"],
          "steps": report["num_steps"],
          "batch size": settings["classifier"]["batch_size"],
          "optimizer": settings["classifier"]["optimizer"],
          "augmentation": settings["classifier"]["augment"],
          "loss parameters": settings["classifier"]["loss_parameters"],
          "heads": settings["decoupled"],
        },
        "hardware": report["hardware"],
        "versions": report["versions"],
        "seconds": report["timing"]["total_seconds"],
      }
    )
  return rows


def markdown(rows: Sequence[dict], missing: Sequence[str]) -> str:
  """The tables, one per config, and under each the settings that matter."""
  parts = []
  for config in dict.fromkeys(row["config"] for row in rows):
    own = [row for row in rows if row["config"] == config]
    titles = [title for _, title in HEADLINE_COLUMNS]
    lines = [
      f"## {config}",
      "",
      "| " + " | ".join(["top-1 %, mean ± std over seeds", *titles, "published"]) + " |",
      "|---" * (len(titles) + 2) + "|",
    ]
    sources: dict[str, int] = {}
    for row in own:
      cells = [_score(row["scores"][name], len(row["seeds"])) for name, _ in HEADLINE_COLUMNS]
      published = row["published"]
      figure = "–"
      if published and published["top1"] is not None:
        number = sources.setdefault(published["source"], len(sources) + 1)
        figure = f"{published['top1']:.2f} [{number}]"
      lines.append("| " + " | ".join([f"`{row['method']}`", *cells, figure]) + " |")
    lines += ["", *(f"[{number}] {source}." for source, number in sources.items()), ""]
    lines += _settings_lines(own)
    parts.append("\n".join(lines))
  if missing:
    parts.append("Not run yet: " + ", ".join(missing) + ".")
  return "\n\n".join(parts) + "\n"


def _score(score: dict, seeds: int) -> str:
  if score["mean"] is None:
    return "–"
  spread = f" ± {100 * score['std']:.2f}" if seeds > 1 else ""
  return f"{100 * score['mean']:.2f}{spread}"


def _settings_lines(rows: Sequence[dict]) -> list[str]:
  """Settings that all rows share, once; those that differ, by row."""
  lines = []
  for name in rows[0]["settings"]:
    values = {json.dumps(row["settings"][name], sort_keys=True): row["method"] for row in rows}
    if len(values) == 1:
      lines.append(f"- {name}: {_plain(rows[0]['settings'][name])}")
    else:
      by_value = "; ".join(f"{_plain(json.loads(v))} (`{m}`)" for v, m in values.items())
      lines.append(f"- {name}: {by_value}")
  hardware, versions = rows[-1]["hardware"], rows[-1]["versions"]
  lines.append(f"- seeds: {_plain(rows[0]['seeds'])}; the last checkpoint, nothing chosen on test")
  lines.append(f"- hardware: {_plain(hardware)}; versions: {_plain(versions)}")
  return lines


def _plain(value: Any) -> str:
  if isinstance(value, dict):
    return ", ".join(f"{name} {_plain(item)}" for name, item in value.items())
  if isinstance(value, list):
    return "(" + ", ".join(map(_plain, value)) + ")"
  return f"{value:g}" if isinstance(value, float) else str(value)


def write(arguments: argparse.Namespace) -> tuple[list[dict], list[str]]:
  """Writes the table as far as it has come; returns its rows and the runs that are missing."""
  rows, missing = [], []
  for config, run in planned(arguments.table, arguments.rows):
    report = read_report(folder_of(arguments, config, run))
    if report is None:
      missing.append(f"{config}/{run.name}")
    else:
      rows += collect(config, run, report)
  folder = pathlib.Path(arguments.workdir)
  folder.mkdir(parents=True, exist_ok=True)
  text = markdown(rows, missing)
  write_atomically(folder / f"{arguments.table}.md", text.encode())
  write_json(
    folder / f"{arguments.table}.json", {"table": arguments.table, "rows": rows, "missing": missing}
  )
  return rows, missing


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--table", required=True, choices=TABLES)
  parser.add_argument("--data_dir", default="", help="where TFDS keeps its sets")
  parser.add_argument(
    "--workdir",
    default="runs/tables",
    type=os.path.expanduser,
    help="folder of all runs and the table",
  )
  parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... of every run")
  parser.add_argument("--rows", nargs="+", help="only these runs, by name")
  parser.add_argument("--epochs", type=float, help="fewer epochs than the recipe has")
  parser.add_argument("--backbone", help="another backbone than the recipe's")
  parser.add_argument("--tensorboard", action="store_true", help="write TensorBoard events too")
  arguments = parser.parse_args(argv)
  names = {run.name for _, run in planned(arguments.table, None)}
  unknown = sorted(set(arguments.rows or ()) - names)
  if unknown:
    parser.error(f"{unknown[0]} is no run of {arguments.table}; they are {', '.join(names)}")
  return arguments


def main() -> int:
  arguments = parse()
  failed = []
  for config, run in planned(arguments.table, arguments.rows):
    if read_report(folder_of(arguments, config, run)) is not None:
      continue
    typed = command(config, run, arguments)
    print(f"\n{shlex.join(['python', *typed])}", flush=True)
    if subprocess.run([sys.executable, *typed], check=False).returncode:
      failed.append(f"{config}/{run.name}")  # the others are still worth running
    write(arguments)
  rows, missing = write(arguments)
  print("\n" + markdown(rows, missing))
  if failed:
    print(f"failed: {', '.join(failed)}", file=sys.stderr)
  return 1 if failed else 0


if __name__ == "__main__":
  sys.exit(main())
