"""The isolating table: one encoder, every generator, every loss; what does diffusion add?

  python -m benchmarks.isolating --config=configs/isolating_cifar100_lt.py:foreign --json FILE \\
    [--workdir=DIR] [--config.dataset.data_dir=DIR ...]

Runs `main.py` with that config (a finished or interrupted run in the workdir goes on) and writes
FILE, the same as Markdown beside it, and the pictures: FILE.json, FILE.md, FILE_gap_closed.png, ...
Further options go to main.py. Works on the report of any experiment on features, digits included.
FILE.md is made from FILE.json alone (`python -m benchmarks.pages` makes it again); a key "note" in
the JSON, added by hand, is shown on the page.
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

from memdiff import config_flag
from memdiff.evaluation import answer, tables, wording
from memdiff.evaluation.lookup import is_reference, mean_of, row_of
from memdiff.evaluation.method import Method
from memdiff.evaluation.numerals import is_interval, share, share_bounds
from memdiff.runtime.workdir import write_atomically, write_json

_KEPT = (
  "name", "command", "dataset", "groups", "criterion", "headline", "classification", "comparison",
  "joint", "recommendation", "choices", "generators", "generator_seconds", "timing", "hardware",
  "versions", "config",
)  # fmt: skip
_FIGURES = {
  "gap_closed": "Share of the gap between the control and the oracle that every method closes.",
  "feature_map": "Real, left-out and hallucinated features, t-SNE, first seed.",
  "confidence_reliability": "Confidence against nearness to left-out features, first seed.",
}
_AS_TRAINED = "as trained"  # the encoder's own head
LOSSES = {
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


def table_of(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
  return "\n".join([_line(header), "|---" * len(header) + "|", *map(_line, lines)])


def _criterion(report: Mapping[str, Any]) -> tuple[str, str]:
  """Name and key of the score that the run was judged by; top-1 if its rows know no other."""
  name, _, key = answer.CRITERIA.get(report.get("criterion"), answer.CRITERIA["accuracy"])
  return name, key


def _closed(stat: Mapping[str, Any] | None) -> str:
  """Share of the gap in percent: with its interval, or its deviation in older reports."""
  if not stat or stat.get("mean") is None:
    return "–"
  if is_interval(stat.get("interval")):
    return f"{share(stat)} ({share_bounds(stat)})"
  return f"{share(stat)} ± {100 * stat['std']:.0f}"


def _difference(stat: Mapping[str, Any]) -> str:
  """A difference in points: with its interval, or its deviation in older reports."""
  if is_interval(stat.get("interval")):
    low, high = (100 * end for end in stat["interval"])
    return f"{100 * stat['mean']:+.2f} ({low:+.2f} to {high:+.2f})"
  return f"{100 * stat['mean']:+.2f} ± {100 * stat['std']:.2f}"


def _by_generator(report: Mapping[str, Any]) -> dict[str, dict[str, dict]]:
  """generator -> loss -> row; own heads and references too."""
  found: dict[str, dict[str, dict]] = {}
  for row in report["classification"]:
    method = Method(row["method"])
    name, loss = method.generator, method.loss
    found.setdefault(name, {})[loss or _AS_TRAINED] = row
  return found


def accuracy_table(report: Mapping[str, Any]) -> str:
  """The criterion of every generator under every loss."""
  name_of_score, key = _criterion(report)
  found = _by_generator(report)
  losses = list(report["config"]["head"]["losses"])
  if any(_AS_TRAINED in rows for rows in found.values()):
    losses.insert(0, _AS_TRAINED)
  lines = [
    [f"`{name}`", *(percent(rows.get(loss, {}).get(key), 2) for loss in losses)]
    for name, rows in found.items()
  ]
  return table_of([f"{name_of_score} %", *(LOSSES.get(loss, loss) for loss in losses)], lines)


def _as_chosen(report: Mapping[str, Any], name: str) -> str:
  """The method of a generator with the loss that cross-validation chose, or the compared loss."""
  known = (report["recommendation"] or {}).get("scores", {})
  methods = [row["method"] for row in _by_generator(report).get(name, {}).values()]
  judged = [method for method in methods if method in known]
  if judged:
    return max(judged, key=lambda method: known[method]["score"])
  return Method.of(name, Method(report["comparison"]["method"]).loss)


def chosen_table(report: Mapping[str, Any]) -> str:
  """Every generator with the loss that cross-validation chose for it, and its setting."""
  known = (report["recommendation"] or {}).get("scores", {})
  columns = tables.columns(report)
  lines = []
  for name in _by_generator(report):
    method = _as_chosen(report, name)
    row, judged = row_of(report, method), known.get(method, {})
    if not row:
      continue
    choice = (report["choices"] or {}).get(method, {})
    setting = ", ".join(f"{key} {value:g}" for key, value in choice.items() if value < 1e6)
    lines.append(
      [
        f"`{method}`",
        *(percent(row[key], 2 if key == "top1" else 1) for key, _ in columns),
        _closed(row.get("gap_closed")),
        f"{100 * judged['score']:.2f}" if judged else "–",
        str(judged.get("settings", "–")),
        setting or "–",
      ]
    )
  titles = [f"{title} %" for _, title in columns[:1]] + [title for _, title in columns[1:]]
  return table_of(["method", *titles, "gap closed %", "CV score", "settings", "setting"], lines)


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
  return table_of(["generator", *_QUALITY, "training s", "sampling s"], lines)


def recommendation_text(report: Mapping[str, Any]) -> str:
  """What cross-validation recommends, and how far the test set agrees."""
  r = report["recommendation"]
  if r is None:
    return "No cross-validation was run."
  return f"Recommended: **`{r['method']}`**. " + " ".join(wording.decision(report))


def settings_table(reports: Mapping[str, Mapping[str, Any]]) -> str:
  """A line per run: the best real-only head, the compared generator, and the references."""
  lines = []
  for title, report in reports.items():
    compared, (name, key) = report["comparison"], _criterion(report)
    loss = Method(compared["reference"]).loss
    methods = (
      compared["control"], compared["method"], f"unseen_exemplars+{loss}", compared["reference"],
    )  # fmt: skip
    scores = [f"{percent(row_of(report, m).get(key), 2)} (`{m}`)" for m in methods]
    closed = _closed(compared.get("gap_closed"))
    lines.append(
      [f"{title}, {name}", *scores[:2], _difference(compared["gain"]), *scores[2:], closed]
    )
  header = [
    "setting, score in %", "best head on real features, by cross-validation", "memdiff",
    "difference, points", "unseen exemplars", "oracle", "gap closed %",
  ]  # fmt: skip
  return table_of(header, lines)


def judged_table(report: Mapping[str, Any]) -> str:
  """A line per generator under the loss that cross-validation prefers for it, tested or not."""
  scores, best = report["recommendation"]["scores"], {}
  for method, entry in scores.items():
    name = Method(method).generator
    if name not in best or entry["score"] > scores[best[name]]["score"]:
      best[name] = method
  return scores_table(report, list(best.values()))


def scores_table(report: Mapping[str, Any], methods: Sequence[str]) -> str:
  """A line for each of some methods: by cross-validation, and on the test set."""
  (_, key), scores = _criterion(report), report["recommendation"]["scores"]
  lines = [
    [
      f"`{method}`",
      f"{100 * entry['score']:.2f}",
      _difference({"mean": entry["gain"], "interval": entry["interval"]}),
      percent(row_of(report, method).get(key), 2),
    ]
    for method, entry in ((method, scores[method]) for method in methods)
  ]
  control = report["recommendation"]["control"]
  return table_of(
    ["method", "cross-validation, %", f"difference from `{control}`, points", "test, %"], lines
  )


def recommendations_table(reports: Mapping[str, Mapping[str, Any]]) -> str:
  """A line per run: what was recommended, and what the test set said afterwards."""
  lines = []
  for title, report in reports.items():
    r, (_, key) = report["recommendation"], _criterion(report)
    agreement = r["agreement"]
    rows = [row for row in report["classification"] if row["method"] in r["scores"]]
    best = max(rows, key=lambda row: mean_of(row, key))["method"]
    lines.append(
      [
        title,
        f"`{r['method']}`",
        f"`{best}`",
        f"{100 * agreement['regret_of_recommended']:.2f}",
        f"{agreement['kendall_tau']:.2f}",
        str(agreement["methods"]),
      ]
    )
  header = [
    "setting", "recommended", "best of those judged, on test", "points below it on test",
    "Kendall's tau", "methods judged",
  ]  # fmt: skip
  return table_of(header, lines)


def joint_table(report: Mapping[str, Any]) -> str:
  """Encoder and head trained together, beside encoders trained once."""
  name, key = _criterion(report)
  gains = {entry["method"]: entry["gain"] for entry in report["joint"]}
  lines = [
    [
      f"`{row['method']}`",
      percent(row[key], 2),
      _difference(gains[row["method"]]) if row["method"] in gains else "",
    ]
    for row in report["classification"]
    if row["method"].startswith(("joint:", "own_head"))
  ]
  return table_of(["method", f"{name} %", "difference from `joint:real`, points"], lines)


def default_run(report: Mapping[str, Any]) -> str:
  """README's account of the default run: its short table, its answer, and what it cost."""
  head, *lines = tables.text_cells(report)
  references = {r["method"] for r in report["classification"] if is_reference(report, r)}
  named = [[f"`{m}`{', reference' if m in references else ''}", *cells] for m, *cells in lines]
  seeds, timing = len(report["config"]["seeds"]), report["timing"]
  hardware, versions = report["hardware"], report["versions"]
  found = answer.answer(report)
  return "\n".join(
    [
      table_of([f"test %, mean ± std over {seeds} seeds", *head[1:]], named),
      "",
      "The report of this run begins:",
      "",
      *(f"- {sentence}" for sentence in found.lines()),
      "",
      f"Python {versions['python']}, JAX {versions['jax']}, {hardware['cpu_count']} cores of a"
      f" {hardware['platform'].upper()}: {timing['total_seconds'] / 60:.1f} minutes after"
      f" installation, {timing['total_compile_seconds'] / 60:.1f} of them compiling;"
      f" {timing['total_cpu_seconds']:.0f} CPU-seconds.",
    ]
  )


def markdown(report: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
  """The whole page, with `pictures` (file -> title)."""
  data, config = report["dataset"], report["config"]
  counts = data["train_counts"]
  # Older reports have no intervals, and without one nothing can be said of a difference.
  judged = "interval" in report["comparison"]["gain"]
  sentences = wording.comparison(report) if judged else []
  parts = [
    f"# {report['name']}",
    f"{data['name']}, {data['num_classes']} classes, {sum(counts):,} training examples"
    f" ({max(counts)} to {min(counts)} per class), {len(config['seeds'])} seeds, mean ± std;"
    f" split SHA-256 `{data['split_sha256'][:12]}`. Nothing was selected on test data.",
    *([report["note"]] if "note" in report else []),
    *(["\n".join(f"- {sentence}" for sentence in sentences)] if sentences else []),
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
    f"{hardware}. {versions}.{_duration(report)}",
  ]
  return "\n\n".join(parts) + "\n"


def _duration(report: Mapping[str, Any]) -> str:
  """How long the run took; nothing if it was interrupted, so that nobody knows."""
  timing = report.get("timing") or {}
  if "total_seconds" not in timing:
    return ""
  worked = timing.get("total_cpu_seconds")
  cpu = f", {worked:.0f} CPU-seconds" if worked else ""
  return f" {timing['total_seconds'] / 60:.1f} minutes in all{cpu}."


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
  return config_flag.command_line(typed)


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


def reduced(report: Mapping[str, Any]) -> dict[str, Any]:
  """What is kept of a report: all that pages show, without values per class of measures."""
  return {key: report[key] for key in _KEPT if key in report} | {
    "command": _portable(report["command"]),
    "config": _portable_config(report["config"]),
    "generators": _without_classes(report["generators"]),
  }


def page(path: pathlib.Path) -> str:
  """The page of FILE.json, with the pictures that lie beside it."""
  report = json.loads(path.read_text(encoding="utf-8"))
  named = {f"{path.stem}_{name}.png": title for name, title in _FIGURES.items()}
  return markdown(report, {f: title for f, title in named.items() if (path.parent / f).exists()})


def write(report: Mapping[str, Any], folder: pathlib.Path, path: pathlib.Path) -> None:
  """FILE.json, FILE.md and the pictures of the run in `folder`."""
  stem = path.with_suffix("")
  path.parent.mkdir(parents=True, exist_ok=True)
  write_json(path, reduced(report))
  for name in _FIGURES:
    picture, copy = folder / "evaluation" / f"{name}.png", pathlib.Path(f"{stem}_{name}.png")
    copy.unlink(missing_ok=True)  # of an earlier run
    if picture.exists():  # some need left-out features
      shutil.copyfile(picture, copy)
  write_atomically(stem.with_suffix(".md"), page(path).encode())


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
