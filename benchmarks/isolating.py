"""The isolating table: one encoder, every generator, every loss; what does diffusion add?

  python -m benchmarks.isolating --config=configs/isolating_cifar100_lt.py:foreign --json FILE \\
    [--workdir=DIR] [--config.dataset.data_dir=DIR ...]

Runs `main.py` with that config (a finished or interrupted run in the workdir goes on) and writes
FILE, the same as Markdown beside it, and the pictures: FILE.json, FILE.md, FILE_gap_closed.png, ...
Further options go to main.py. Works on the report of any experiment on features, digits included.
"""

import argparse
import json
import pathlib
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from memdiff.evaluation import wording
from memdiff.runtime.workdir import write_atomically, write_json

_KEPT = (
  "name", "command", "dataset", "groups", "classification", "comparison", "joint", "recommendation",
  "choices", "generators", "generator_seconds", "timing", "hardware", "versions", "config",
)  # fmt: skip
_FIGURES = {
  "gap_closed": "Share of the gap between the control and the oracle that every method closes.",
  "feature_map": "Real, left-out and hallucinated features, t-SNE, first seed.",
  "confidence_reliability": "Confidence against nearness to left-out features, first seed.",
}
_AS_TRAINED = "as trained"  # the encoder's own head
_LOSSES = {
  "cross_entropy": "CE",
  "balanced_softmax": "balanced softmax",
  "logit_adjustment": "logit adjustment",
  "csl": "adaptive CSL",
}
_QUALITY = {
  "MMD": ("truth_test", "mmd"),
  "Fréchet": ("truth_test", "frechet"),
  "precision": ("truth_test", "precision"),
  "recall": ("truth_test", "recall"),
  "memorisation": ("memorization_ratio",),
  "diversity": ("diversity",),
  "separation": ("separation",),
}


def percent(stat: Mapping[str, Any] | None, digits: int = 1) -> str:
  """`mean ± std` in percent; a dash where there is nothing."""
  if not stat or stat.get("mean") is None:
    return "–"
  return f"{100 * stat['mean']:.{digits}f} ± {100 * stat['std']:.{digits}f}"


def _line(cells: Sequence[str]) -> str:
  return "| " + " | ".join(cells) + " |"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
  return "\n".join([_line(header), "|---" * len(header) + "|", *map(_line, lines)])


def _by_generator(report: Mapping[str, Any]) -> dict[str, dict[str, dict]]:
  """generator -> loss -> row; own heads and references too."""
  found: dict[str, dict[str, dict]] = {}
  for row in report["classification"]:
    name, _, loss = row["method"].partition("+")
    found.setdefault(name, {})[loss or _AS_TRAINED] = row
  return found


def accuracy_table(report: Mapping[str, Any]) -> str:
  """Top-1 of every generator under every loss."""
  found = _by_generator(report)
  losses = list(report["config"]["head"]["losses"])
  if any(_AS_TRAINED in rows for rows in found.values()):
    losses.insert(0, _AS_TRAINED)
  lines = [
    [f"`{name}`", *(percent(rows.get(loss, {}).get("top1"), 2) for loss in losses)]
    for name, rows in found.items()
  ]
  return _table(["top-1 %", *(_LOSSES.get(loss, loss) for loss in losses)], lines)


def chosen_table(report: Mapping[str, Any]) -> str:
  """Every generator with the loss that cross-validation chose for it, and its setting."""
  known = (report["recommendation"] or {}).get("scores", {})
  lines = []
  for name, rows in _by_generator(report).items():
    methods = {row["method"]: row for row in rows.values()}
    judged = {m: known[m]["score"] for m in methods if m in known}
    default = f"{name}+{report['comparison']['method'].partition('+')[2]}"
    best = max(judged, key=judged.get) if judged else default
    if best not in methods:
      continue
    row, choice = methods[best], report["choices"].get(best, {})
    setting = ", ".join(f"{key} {value:g}" for key, value in choice.items() if value < 1e6)
    closed = row.get("gap_closed")
    lines.append(
      [
        f"`{best}`",
        percent(row["top1"], 2),
        *(percent(row[group]) for group in ("many", "medium", "few")),
        "–" if not closed else f"{100 * closed['mean']:.0f} ± {100 * closed['std']:.0f}",
        f"{100 * judged[best]:.2f}" if best in judged else "–",
        setting or "–",
      ]
    )
  header = ["method", "top-1 %", "many", "medium", "few", "gap closed %", "CV score", "setting"]
  return _table(header, lines)


def quality_table(report: Mapping[str, Any]) -> str:
  """Features against the left-out real ones, and what they took."""
  lines = []
  for name, measured in report["generators"].items():
    cells = []
    for path in _QUALITY.values():
      stat: Any = measured
      for key in path:
        stat = (stat or {}).get(key)
      cells.append("–" if not stat or stat["mean"] is None else f"{stat['mean']:.3g}")
    taken = report["generator_seconds"][name]
    seconds = [f"{s:.0f}" if s is not None else "–" for s in taken.values()]
    lines.append([f"`{name}`", *cells, *seconds])
  return _table(["generator", *_QUALITY, "training s", "sampling s"], lines)


def recommendation_text(report: Mapping[str, Any]) -> str:
  """What cross-validation recommends, and how far the test set agrees."""
  r = report["recommendation"]
  if r is None:
    return "No cross-validation was run."
  basis, agreement = r["basis"], r["agreement"]
  low, high = (100 * end for end in r["interval"])
  return (
    f"Recommended on training data alone: **`{r['method']}`**. Best by cross-validation:"
    f" `{r['best']}`, {100 * r['expected_gain']:+.2f} points over the best control"
    f" `{r['control']}` (95 % interval {low:+.2f} to {high:+.2f}; {basis['folds']} folds x"
    f" {basis['repeats']}, {basis['encoder']} encoder). On the test set that difference is"
    f" {100 * agreement['test_gain']['mean']:+.2f} ± {100 * agreement['test_gain']['std']:.2f};"
    f" Kendall's tau of the two rankings of {agreement['methods']} methods is"
    f" {agreement['kendall_tau']:.2f} ({100 * agreement['pairs']:.0f} % of pairs in the same"
    f" order), and the recommended method is {100 * agreement['regret_of_recommended']:.2f} points"
    " below the best of them on test."
  )


def markdown(report: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
  """The whole page, with `pictures` (file -> title)."""
  data, config = report["dataset"], report["config"]
  counts = data["train_counts"]
  parts = [
    f"# {report['name']}",
    f"{data['name']}, {data['num_classes']} classes, {sum(counts):,} training examples"
    f" ({max(counts)} to {min(counts)} per class), {len(config['seeds'])} seeds, mean ± std;"
    f" split SHA-256 `{data['split_sha256'][:12]}`. Nothing was selected on test data.",
    "\n".join(f"- {sentence}" for sentence in wording.comparison(report)),
    "## Every generator under every loss",
    accuracy_table(report),
    "## Every generator as cross-validation would use it",
    chosen_table(report),
    "`oracle` adds real features that the long tail left out, `unseen_exemplars` trains on as many"
    " left-out features in place of the training ones; no method may use either. Gap closed: from"
    f" `{report['comparison']['control']}` to `{report['comparison']['reference']}`.",
    "## Recommendation",
    recommendation_text(report),
    "## The features themselves",
    quality_table(report),
    "Against left-out real features of the same classes (MMD, Fréchet: lower is better), settings"
    f" as chosen for `{report['comparison']['method'].partition('+')[2]}`; seconds are of all seeds"
    " together, compiling left out, on a machine that did other work too.",
  ]
  parts += [f"![{title}]({file})" for file, title in pictures.items()]
  hardware = ", ".join(f"{key} {value}" for key, value in report["hardware"].items())
  versions = ", ".join(f"{key} {value}" for key, value in report["versions"].items())
  parts += [
    "## Reproduce",
    f"```\n{_portable(report['command'])}\n```",
    f"{hardware}. {versions}. {report['timing']['total_seconds'] / 60:.0f} minutes in all.",
  ]
  return "\n\n".join(parts) + "\n"


def _portable_path(text: str) -> str:
  """An absolute path, perhaps with `:key` behind it, without the folders of one machine."""
  path = text.partition(":")[0]
  return text.replace(path, f"DIR/{pathlib.Path(path).name}") if path.startswith("/") else text


def _portable(command: str) -> str:
  """The command with folders of one machine left out."""
  typed = []
  for word in shlex.split(command):
    name, equals, value = word.partition("=")
    typed.append(name + equals + _portable_path(value))
  return shlex.join(typed)


def _portable_config(tree: Any) -> Any:
  """The same of every text in the config."""
  if isinstance(tree, Mapping):
    return {key: _portable_config(value) for key, value in tree.items()}
  return _portable_path(tree) if isinstance(tree, str) else tree


def _without_classes(tree: Any) -> Any:
  """Measures without their values per class, which would be most of the file."""
  if not isinstance(tree, Mapping):
    return tree
  return {key: _without_classes(value) for key, value in tree.items() if key != "per_class"}


def write(report: Mapping[str, Any], folder: pathlib.Path, path: pathlib.Path) -> None:
  """FILE.json, FILE.md and the pictures of the run in `folder`."""
  stem = path.with_suffix("")
  path.parent.mkdir(parents=True, exist_ok=True)
  kept = {key: report[key] for key in _KEPT if key in report} | {
    "command": _portable(report["command"]),
    "config": _portable_config(report["config"]),
    "generators": _without_classes(report["generators"]),
  }
  write_json(path, kept)
  pictures = {}
  for name, title in _FIGURES.items():
    picture = folder / "evaluation" / f"{name}.png"
    if picture.exists():  # some need left-out features
      shutil.copyfile(picture, f"{stem}_{name}.png")
      pictures[f"{stem.name}_{name}.png"] = title
  write_atomically(stem.with_suffix(".md"), markdown(report, pictures).encode())


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.add_argument("--config", required=True, help="file of the config, with its variant")
  parser.add_argument("--json", required=True, type=pathlib.Path, help="file to write")
  parser.add_argument("--workdir", help="folder of the run; default runs/<name of the JSON file>")
  arguments, passed_on = parser.parse_known_args(argv)
  workdir = pathlib.Path(arguments.workdir or f"runs/{arguments.json.stem}").expanduser()
  typed = ["main.py", f"--config={arguments.config}", f"--workdir={workdir}", *passed_on]
  print(shlex.join(["python", *typed]), flush=True)
  code = subprocess.run([sys.executable, *typed], check=False).returncode
  if code:
    return code
  report = json.loads((workdir / "report.json").read_text(encoding="utf-8"))
  write(report, workdir, arguments.json)
  print(f"\nwritten: {arguments.json}, {arguments.json.with_suffix('.md')}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
