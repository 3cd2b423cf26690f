"""LongTailClassifier against common alternatives: the same embeddings, the same rare classes.

  python -m benchmarks.embeddings [--data NAME=FILE ...] [--seeds N] [--json FILE]

Rivals: scikit-learn's LogisticRegression with class_weight="balanced" and C tuned by five folds,
its linear discriminant analysis with classes equally likely, and, if imbalanced-learn is installed,
SMOTE before a regression with C = 1 (a class of one example is left as it is, which SMOTE cannot
fill). scikit-learn's digits are there without a file. A FILE is an .npz with `features` [N, D] and
`labels` [N]. Of every class a share is held out for the test, and what is left is cut to a long
tail, anew for every seed; NAME=FILE:natural leaves it as it is. Every fit uses one thread.
"""

import argparse
import importlib.util
import pathlib
import shlex
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from benchmarks.timing import environment
from memdiff import LongTailClassifier
from memdiff.runtime.workdir import read_arrays, write_json

OURS = "LongTailClassifier"
_TUNED = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # C of the rivals
_RATIO, _TEST = 100, 0.3  # largest class over smallest; share of a class that is held out
_FEW = 3  # the rarest classes: a third


def _regression() -> GridSearchCV:
  line = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=500))
  return GridSearchCV(
    line, {"logisticregression__C": _TUNED}, scoring="balanced_accuracy", cv=StratifiedKFold(5)
  )


def _discriminants(number: int) -> LinearDiscriminantAnalysis:
  prior = np.full(number, 1 / number)
  return LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=prior)


def _after_smote(X: np.ndarray, y: np.ndarray) -> Any:
  from imblearn.over_sampling import SMOTE

  labels, counts = np.unique(y, return_counts=True)
  filled = {c: int(counts.max()) for c, n in zip(labels, counts, strict=True) if n > 1}
  neighbours = int(min(5, counts[counts > 1].min() - 1))
  more = SMOTE(sampling_strategy=filled, k_neighbors=neighbours, random_state=0)
  line = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
  return line.fit(*more.fit_resample(X, y))


METHODS: dict[str, Callable[[np.ndarray, np.ndarray], Any]] = {
  OURS: lambda X, y: LongTailClassifier(random_state=0).fit(X, y),
  "LogisticRegression, balanced, C tuned": lambda X, y: _regression().fit(X, y),
  "LDA, classes equally likely": lambda X, y: _discriminants(len(np.unique(y))).fit(X, y),
}
if importlib.util.find_spec("imblearn"):
  METHODS["SMOTE, then LogisticRegression"] = _after_smote


def _split(labels: np.ndarray, seed: int, *, natural: bool) -> tuple[np.ndarray, np.ndarray]:
  """Rows that train and rows that test; the order of the classes by size is drawn."""
  rng, train, test = np.random.default_rng(seed), [], []
  classes = rng.permutation(np.unique(labels))
  members = [rng.permutation(np.flatnonzero(labels == c)) for c in classes]
  held = [max(round(_TEST * len(rows)), 1) for rows in members]
  most = min(len(rows) - n for rows, n in zip(members, held, strict=True))
  ratio = min(_RATIO, most)
  wanted = np.round(most * ratio ** -np.linspace(0, 1, len(classes))).astype(int)
  for rows, number, few in zip(members, held, wanted, strict=True):
    test.append(rows[:number])
    train.append(rows[number:] if natural else rows[number : number + few])
  return np.concatenate(train), np.concatenate(test)


def _runs(
  name: str, features: np.ndarray, labels: np.ndarray, *, natural: bool, seeds: int
) -> Iterator[dict[str, Any]]:
  """One record for each seed and method."""
  for seed in range(seeds):
    train, test = _split(labels, seed, natural=natural)
    test = test[np.isin(labels[test], labels[train])]
    known, counts = np.unique(labels[train], return_counts=True)
    rare = known[np.argsort(counts, kind="stable")][: max(len(known) // _FEW, 1)]
    few = np.isin(labels[test], rare)
    for method, fit in METHODS.items():
      begun = time.process_time()
      with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore")  # small classes, iterations that end
        predicted = fit(features[train], labels[train]).predict(features[test])
        seconds = time.process_time() - begun
        scores = [
          balanced_accuracy_score(labels[test][rows], predicted[rows])
          for rows in (np.ones(len(test), bool), few)
        ]
      print(f"{name}, seed {seed}: {method} {scores[0]:.3f}, {seconds:.1f} CPU-seconds", flush=True)
      yield {
        "data": name, "method": method, "seed": seed, "balanced_accuracy": scores[0],
        "few": scores[1], "cpu_seconds": seconds, "train": len(train), "classes": len(known),
        "dimensions": features.shape[1], "smallest": int(counts.min()),
        "largest": int(counts.max()),
      }  # fmt: skip


def _sets(arguments: Sequence[str]) -> Iterator[tuple[str, np.ndarray, np.ndarray, bool]]:
  digits = load_digits()
  yield "digits, pixels", digits.data.astype(np.float32), digits.target, False
  for text in arguments:
    name, _, path = text.partition("=")
    natural = path.endswith(":natural")
    arrays = read_arrays(pathlib.Path(path.removesuffix(":natural")))
    yield name, arrays["features"].astype(np.float32), arrays["labels"], natural


def _mean_std(values: np.ndarray) -> dict[str, float]:
  """Over seeds; a single one has no deviation."""
  return {"mean": float(values.mean()), "std": float(values.std(ddof=min(len(values) - 1, 1)))}


def summary(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """For each data set and method: means over seeds, and what is paired with ours."""
  rows = []
  for data in dict.fromkeys(record["data"] for record in records):
    ours = [r for r in records if r["data"] == data and r["method"] == OURS]
    for method in dict.fromkeys(r["method"] for r in records if r["data"] == data):
      own = [r for r in records if r["data"] == data and r["method"] == method]
      row = {name: own[0][name] for name in ("data", "method", "classes", "dimensions", "train",
                                             "smallest", "largest")}  # fmt: skip
      for name in ("balanced_accuracy", "few", "cpu_seconds"):
        values = np.array([r[name] for r in own])
        row[name] = _mean_std(values)
      lead = [a["balanced_accuracy"] - b["balanced_accuracy"]
              for a, b in zip(ours, own, strict=True)]  # fmt: skip
      row["lead"] = _mean_std(np.array(lead))
      rows.append(row | {"seeds": len(own)})
  return rows


def page(result: Mapping[str, Any]) -> str:
  """docs/results/embeddings.md."""
  rows = result["rows"]
  ordered = sorted(rows, key=lambda row: row["balanced_accuracy"]["mean"])
  best = {row["data"]: row["method"] for row in ordered}  # the last one of a data set stays
  wins = list(best.values()).count(OURS)
  lines = [
    "# A classifier for embeddings with rare classes",
    "",
    f"`{OURS}` has the highest class-mean accuracy on {wins} of {len(best)} data sets.",
    "",
    f"`{OURS}()` with its defaults against common alternatives. Class-mean accuracy in % of test"
    " examples that nothing was chosen on, mean ± standard deviation over"
    f" {rows[0]['seeds']} seeds; each seed draws the split, and which classes are rare. CPU-seconds"
    " are those of a whole fit, tuning included, on one thread. Lead:"
    f" `{OURS}` minus the row, paired by seed.",
  ]
  lines += ["", result["note"]] if result["note"] else []
  for data in dict.fromkeys(row["data"] for row in rows):
    own = [row for row in rows if row["data"] == data]
    first = own[0]
    lines += [
      "",
      f"## {data[0].upper()}{data[1:]}",
      "",
      f"{first['classes']} classes of {first['largest']} to {first['smallest']} training examples,"
      f" {first['train']:,} in all, {first['dimensions']:,} numbers each.",
      "",
      "| method | all classes | the rarest third | CPU-seconds | lead |",
      "|---|---|---|---|---|",
    ]
    for row in own:
      accuracy, few = (_percent(row[name]) for name in ("balanced_accuracy", "few"))
      lead = "" if row["method"] == OURS else f"{100 * row['lead']['mean']:+.1f}"
      lead += f" ± {100 * row['lead']['std']:.1f}" if lead else ""
      lines.append(
        f"| {row['method']} | {accuracy} | {few} | {row['cpu_seconds']['mean']:.1f} | {lead} |"
      )
  lines += ["", "## Reproduce", "", f"`{result['command']}`. {_versions(result)}."]
  return "\n".join(lines) + "\n"


def _versions(result: Mapping[str, Any]) -> str:
  versions = result["environment"]["versions"]
  libraries = ("scikit-learn", "imbalanced-learn", "numpy")
  named = [f"{name} {versions[name]}" for name in libraries if versions[name]]
  cpu = result["environment"]["hardware"]["cpu"]
  return f"{cpu}, Python {versions['python']}, {', '.join(named)}"


def _percent(stat: Mapping[str, float]) -> str:
  return f"{100 * stat['mean']:.1f} ± {100 * stat['std']:.1f}"


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--data", nargs="*", default=[], help="NAME=FILE, or NAME=FILE:natural")
  parser.add_argument("--note", default="", help="for the page: what the data are")
  parser.add_argument("--seeds", type=int, default=5, help="splits")
  parser.add_argument("--json", type=pathlib.Path, help="write the result to this file")
  arguments = parser.parse_args()
  records = [
    record
    for name, features, labels, natural in _sets(arguments.data)
    for record in _runs(name, features, labels, natural=natural, seeds=arguments.seeds)
  ]
  files = [text.rpartition("/")[2] for text in arguments.data]  # of paths, what anyone may know
  names = [
    shlex.quote(f"{text.partition('=')[0]}=DIR/{file}")
    for text, file in zip(arguments.data, files, strict=True)
  ]
  command = " ".join(["python -m benchmarks.embeddings", *(["--data"] if names else []), *names])
  result = {
    "rows": summary(records),
    "records": records,
    "command": command,
    "note": arguments.note,
  }
  result["environment"] = environment()
  print(page(result))
  if arguments.json:
    write_json(arguments.json, result)


if __name__ == "__main__":
  main()
