"""What generated images are worth to a classifier, from finished runs: a page of results.

  python -m benchmarks.augmented --digits runs/augmented_digits

keeps of every run's report what the page shows, in docs/results/augmented.json, with pictures of
its images beside it, and `python -m benchmarks.pages` writes the page. A set that is not given
stays as it is.
"""

import argparse
import json
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import speed_tables
from benchmarks.generation import command_of
from benchmarks.isolating import LOSSES, percent, table_of
from memdiff.evaluation import answer, numerals, pool_tables
from memdiff.evaluation.lookup import row_of
from memdiff.evaluation.method import Method
from memdiff.runtime.workdir import write_json

RESULT = pathlib.Path(__file__).parent.parent / "docs" / "results" / "augmented.json"
SETS = {
  "digits": "Digits, 8 x 8 pixels",
  "fashion_mnist": "Fashion-MNIST, 28 x 28 pixels",
  "omniglot": "Omniglot, 14 x 14 pixels",
}
_KEPT = (
  "name", "experiment", "synthetic_kind", "criterion", "headline", "comparison", "recommendation",
  "pool_signs", "groups", "hardware", "versions",
)  # fmt: skip
_CONFIG = (
  "seeds", "losses", "methods", "diffusion", "sampling", "pool", "added", "encoder", "classifier",
  "selection",
)  # fmt: skip
_COLUMNS = {
  "balanced_accuracy": "balanced",
  "top1": "top-1",
  "many": "many",
  "medium": "medium",
  "few": "few",
  "macro_f1": "macro-F1",
}
_PICTURE = "augmented_{}.png"


def reduced(report: Mapping[str, Any]) -> dict[str, Any]:
  """The parts of a report that the page shows."""
  timing, data = report["timing"], report["dataset"]
  return {key: report[key] for key in _KEPT} | {
    "command": command_of(report),
    "config": {key: report["config"][key] for key in _CONFIG},
    "dataset": {key: data[key] for key in ("name", "train_counts", "test_count", "split_sha256")},
    "timing": {key: value for key, value in timing.items() if key.startswith("total")},
    "classification": [
      {key: row[key] for key in ("method", "description", "seeds", "reference", "shown")}
      | {key: {part: row[key][part] for part in ("mean", "std")} for key in _COLUMNS}
      for row in report["classification"]
    ],
    "same_loss": report["same_loss"],
    "pools": [
      row | {"drawn": [sum(row["drawn"])], "used": [sum(row["used"])]} for row in report["pools"]
    ],
  }


def _sources(kept: Mapping[str, Any]) -> list[str]:
  """What classifiers are trained on, in the order of the table."""
  return list(dict.fromkeys(Method(row["method"]).generator for row in kept["classification"]))


def accuracy_table(kept: Mapping[str, Any]) -> str:
  """Balanced accuracy of every row under every loss."""
  losses, key = kept["config"]["losses"], "balanced_accuracy"
  lines = [
    [f"`{name}`", *(percent(row_of(kept, Method.of(name, loss)).get(key)) for loss in losses)]
    for name in _sources(kept)
  ]
  return table_of([f"{_COLUMNS[key]} %", *(LOSSES[loss] for loss in losses)], lines)


def group_table(kept: Mapping[str, Any], loss: str) -> str:
  """All scores of every row under one loss."""
  keys = [key for key in _COLUMNS if key != "balanced_accuracy"]
  lines = [
    [f"`{name}`", *(percent(row_of(kept, Method.of(name, loss)).get(key)) for key in keys)]
    for name in _sources(kept)
  ]
  return table_of([f"{LOSSES[loss]}, %", *(_COLUMNS[key] for key in keys)], lines)


def gain_table(kept: Mapping[str, Any]) -> str:
  """What each row adds to the best control with the same loss, in points."""
  losses, found = kept["config"]["losses"], {row["method"]: row for row in kept["same_loss"]}
  names = list(dict.fromkeys(Method(method).generator for method in found))
  controls = {
    Method(row["control"]).loss: Method(row["control"]).generator for row in found.values()
  }
  lines = [
    [f"`{name}`", *(_gain(found[Method.of(name, loss)]["gain"]) for loss in losses)]
    for name in names
  ]
  head = [f"{LOSSES[loss]}, over `{controls[loss]}`" for loss in losses]
  return table_of(["points", *head], lines)


def _gain(gain: Mapping[str, Any]) -> str:
  text = f"{numerals.points(gain['mean'])} ({numerals.to(gain['interval'])})"
  return f"**{text}**" if answer.verdict(gain) == "better" else text


def pool_table(kept: Mapping[str, Any]) -> str:
  """How many images there are, and what a classifier of real ones says of them."""
  titles = {
    "method": "generator", "filter": "filter", "drawn": "drawn", "used": "used",
    "right": "of the drawn, right class %", "copied": "copies %",
  }  # fmt: skip
  lines = [
    [f"`{row[key]}`" if key in ("method", "filter") else row[key] for key in titles]
    for row in pool_tables.pools(kept)
  ]
  return table_of(list(titles.values()), lines)


def summary_table(kept: Mapping[str, Any]) -> str:
  """A line per set: what cross-validation would use with generated images, and without."""
  lines = []
  for name in (name for name in SETS if name in kept):
    found = kept[name]["comparison"]
    scores = [
      f"{percent(row_of(kept[name], method).get('balanced_accuracy'))} (`{method}`)"
      for method in (found["control"], found["method"], found["reference"])
    ]
    lines.append([SETS[name].split(",")[0], *scores[:2], _gain(found["gain"]), scores[2]])
  return table_of(
    [
      *("balanced accuracy, %", "real images alone", "with generated ones"),
      *("difference, points", "with left-out real images"),
    ],
    lines,
  )


def _protocol(kept: Mapping[str, Any]) -> str:
  config, counts, timing = kept["config"], kept["dataset"]["train_counts"], kept["timing"]
  diffusion, pool = config["diffusion"], config["pool"]
  return (
    f"{sum(counts):,} training images of {len(counts)} classes, {kept['dataset']['test_count']:,}"
    f" test images. U-Nets of {diffusion['num_steps']:,} steps of {diffusion['batch_size']} images;"
    f" {config['sampling']['sampler']} with {config['sampling']['num_steps']} steps, guidance scale"
    f" {pool['guidance']:g}; every class filled to {pool['fill_to'] or max(counts):,} images, out"
    f" of {pool['surplus']:g} drawn for each. Classifiers: {config['encoder']['backbone']['name']},"
    f" {config['classifier']['num_epochs']:g} epochs. {len(config['seeds'])} seeds, mean ± std;"
    f" advice from {config['selection']['folds']} folds of the training images."
    f" {kept['hardware']['cpu_count']} cores of a {kept['hardware']['platform'].upper()}, Python"
    f" {kept['versions']['python']}, JAX {kept['versions']['jax']}{_cost(timing)}."
  )


def _cost(timing: Mapping[str, float]) -> str:
  if not timing:
    return "; hours, in several parts"
  minutes = f"{timing['total_seconds'] / 60:.0f} minutes beside other work"
  return f"; {minutes}, {timing['total_cpu_seconds']:,.0f} CPU-seconds"


def _first_words(found: answer.Answer) -> list[str]:
  first = f"{found.title}. {found.explanation}"
  return [first, *(effect.sentence for effect in found.effects), *found.synthetic]


def _set(name: str, kept: Mapping[str, Any]) -> str:
  counts, found = kept["dataset"]["train_counts"], answer.answer(kept)
  loss = Method(kept["comparison"]["method"]).loss
  parts = [
    f"## {SETS[name]}, {max(counts)} to {min(counts)} training images per class",
    f"`{kept['command']}`",
    "\n".join(f"- {sentence}" for sentence in _first_words(found)),
    _protocol(kept),
    *([kept["note"]] if "note" in kept else []),
    "Balanced accuracy of every row under every loss:",
    accuracy_table(kept),
    "The other scores under one loss:",
    group_table(kept, loss),
    "What generated images add to the best control with the same loss, chosen by cross-validation;"
    " paired, with the 95 % interval over seeds and test images; bold if it is above zero:",
    gain_table(kept),
    "The images, means over the seeds:",
    pool_table(kept),
  ]
  if (RESULT.parent / _PICTURE.format(name)).exists():
    parts.append(
      f"![Training images and generated ones, used and not, first seed]({_PICTURE.format(name)})"
    )
  return "\n\n".join(parts)


def page(kept: Mapping[str, Any], cost: Mapping[str, Any]) -> str:
  """The whole page.

  Args:
    kept: set -> what is kept of its run.
    cost: the result of `benchmarks.added_images`.
  """
  rows = (
    "A row is what a classifier is trained on. Controls have real images alone: `real`;"
    " `oversampling`, rare ones repeated; `affine`, copies that are scaled, turned and moved as far"
    " as the first generator's images lie from training images; `elastic`, copies that are bent as"
    " far; `strong`, Cutout, with RandAugment if there are colours; `mixup`. `METHOD:FILTER` adds"
    " generated images that a filter keeps (`none`, `confident`, ...; `@0.3`: each weighs 0.3, and"
    " `ddpm:diffult@0.3` is DiffuLT). `...:head` trains a new head alone, on the encoder of real"
    " images: the difference from the row without it is what the images do for the encoder."
    " `oracle` adds real images that the long tail left out, up to the largest class; no method may"
    " use it."
  )
  intro = (
    "Classifiers that are trained from scratch on real and generated images, against everything"
    " that real images alone can do. U-Nets and classifiers are small and trained for minutes:"
    " they are not comparable with published figures. Generators and classifiers of"
    " cross-validation have not seen the images that judge them; nothing was selected on test"
    " images."
  )
  sets = [_set(name, kept[name]) for name in SETS if name in kept]
  size = cost["size"]
  costs = (
    f"`python -m benchmarks.added_images`: {size['backbone']}, {size['side']} x {size['side']}"
    f" pixels in colour, {size['train']:,} training images."
    f" {speed_tables.machine(cost['environment'])}"
  )
  parts = ["# What generated images are worth", intro, rows, *sets]
  return "\n\n".join([*parts, "## Cost", costs, speed_tables.measured(cost["table"])]) + "\n"


def keep(name: str, workdir: pathlib.Path) -> dict[str, Any]:
  """What is kept of the run in a folder; its picture goes beside the JSON."""
  report = json.loads((workdir / "report.json").read_text(encoding="utf-8"))
  shown = Method(report["headline"]["synthetic"]["method"]).generator.removesuffix(":head")
  shutil.copyfile(
    workdir / "evaluation" / f"pool_{shown}.png", RESULT.parent / _PICTURE.format(name)
  )
  return reduced(report)


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  for name in SETS:
    parser.add_argument(f"--{name}", type=pathlib.Path, help="folder of its finished run")
  kept = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
  parser.add_argument(
    "--interrupted", nargs="*", default=[], choices=SETS,
    help="sets whose run was resumed: its phases do not know what they took before",
  )  # fmt: skip
  arguments = vars(parser.parse_args(argv))
  interrupted = arguments.pop("interrupted")
  for name, workdir in arguments.items():
    if workdir:
      kept[name] = keep(name, workdir) | ({"timing": {}} if name in interrupted else {})
  write_json(RESULT, kept)


if __name__ == "__main__":
  main()
