"""Time and memory of classifiers of embeddings, and of samplers, up to a million rows.

  python -m benchmarks.embeddings_scale --rows 10000 100000 --json FILE
  python -m benchmarks.embeddings_scale --rows 1000000 --dimensions 768 --methods reading

Each method runs in a process of its own, so that its peak memory is its own; that of the data is
told beside it. Data are drawn: classes with means a little apart, of sizes that fall by a factor of
100 from the most common class to the rarest. Accuracy is on a balanced test set; it tells that a
method works, not how good it is on real embeddings, which benchmarks.embeddings tells. SMOTE needs
imbalanced-learn, and is left out without it. `reading` is what a run does with a folder of Parquet
files in half precision, four files with five row groups each. FILE keeps what it has; results are
added, which should come from the same machine and versions.
"""

import argparse
import importlib.util
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression

from benchmarks.speed_tables import machine
from benchmarks.timing import environment
from input_pipeline import embeddings
from input_pipeline.embeddings import EmbeddingsConfig
from memdiff import FeatureHallucinator, LongTailClassifier

_TEST, _RATIO = 20, 100
_LIMIT = 3600  # seconds for one method
READING = "reading"
_PARTS, _GROUPS = 4, 5  # files of a folder, row groups of a file


def _data(rows: int, dim: int, classes: int) -> tuple[np.ndarray, ...]:
  """(features, labels, test features, test labels)."""
  rng = np.random.default_rng(0)
  sizes = _RATIO ** -np.linspace(0, 1, classes)
  counts = np.maximum(np.round(rows * sizes / sizes.sum()).astype(int), 2)
  means = rng.normal(size=(classes, dim)).astype(np.float32) * np.float32(3 / np.sqrt(dim))

  def draw(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    labels = np.repeat(np.arange(classes), numbers)
    features = rng.standard_normal((len(labels), dim), np.float32)
    for c in range(classes):  # without a copy of all
      features[labels == c] += means[c]
    return features, labels

  return *draw(counts), *draw(np.full(classes, _TEST))


def _smote(X: np.ndarray, y: np.ndarray) -> Any:
  from imblearn.over_sampling import SMOTE

  return SMOTE(k_neighbors=1, random_state=0).fit_resample(X, y)


FITS: dict[str, Callable[[np.ndarray, np.ndarray], Any]] = {
  "LongTailClassifier": lambda X, y: LongTailClassifier(random_state=0).fit(X, y),
  "LogisticRegression, balanced, C = 1": lambda X, y: LogisticRegression(
    class_weight="balanced", max_iter=200
  ).fit(X, y),
  "LDA": lambda X, y: LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(X, y),
}
SAMPLERS: dict[str, Callable[[np.ndarray, np.ndarray], Any]] = {
  "FeatureHallucinator, gaussian_shared": lambda X, y: FeatureHallucinator(
    "gaussian_shared", sampling_strategy="auto", random_state=0
  ).fit_resample(X, y),
}
if importlib.util.find_spec("imblearn"):
  SAMPLERS["SMOTE"] = _smote


def _write_parquet(folder: pathlib.Path, rows: int, dim: int, classes: int) -> None:
  """A folder of parts with lists of float16 and a label; never more than one group in memory."""
  import pyarrow
  from pyarrow import parquet

  rng, size = np.random.default_rng(0), rows // (_PARTS * _GROUPS)
  shares = _RATIO ** -np.linspace(0, 1, classes)
  schema = pyarrow.schema(
    [("features", pyarrow.list_(pyarrow.float16(), dim)), ("label", pyarrow.int64())]
  )
  folder.mkdir()
  for part in range(_PARTS):
    with parquet.ParquetWriter(folder / f"part-{part}.parquet", schema) as writer:
      for _ in range(_GROUPS):
        numbers = rng.standard_normal(size * dim, np.float32).astype(np.float16)
        lists = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(numbers), dim)
        labels = rng.choice(classes, size, p=shares / shares.sum())
        writer.write_batch(pyarrow.record_batch([lists, labels], schema=schema))


def _measure_reading(rows: int, dim: int, classes: int) -> dict[str, Any]:
  """In this process: files as `configs/features.py` reads them."""
  with tempfile.TemporaryDirectory() as folder:
    paths = [pathlib.Path(folder) / name for name in ("train", "test")]
    for path, number in zip(paths, (rows, max(rows // 100, 100 * classes)), strict=True):
      _write_parquet(path, number, dim, classes)
    config = EmbeddingsConfig(train_path=str(paths[0]), test_path=str(paths[1]))
    begun, worked = time.perf_counter(), time.process_time()
    data = embeddings.load(config)
    return {
      "method": READING, "rows": len(data.train_features), "dimensions": dim, "classes": classes,
      "seconds": time.perf_counter() - begun, "cpu_seconds": time.process_time() - worked,
      "data_gb": data.train_features.nbytes / 2**30, "peak_gb": _peak(), "balanced_accuracy": None,
    }  # fmt: skip


def _peak() -> float:
  """GB that this process has held at most."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _measure(method: str, rows: int, dim: int, classes: int) -> dict[str, Any]:
  """In this process."""
  if method == READING:
    return _measure_reading(rows, dim, classes)
  X, y, test, labels = _data(rows, dim, classes)
  before, begun, worked = _peak(), time.perf_counter(), time.process_time()
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # iterations that end
    found = (FITS | SAMPLERS)[method](X, y)
  result = {
    "method": method, "rows": len(X), "dimensions": dim, "classes": classes,
    "seconds": time.perf_counter() - begun, "cpu_seconds": time.process_time() - worked,
    "data_gb": before, "peak_gb": _peak(), "balanced_accuracy": None,
  }  # fmt: skip
  if method in FITS:
    result["balanced_accuracy"] = float((found.predict(test) == labels).mean())
  return result


def _in_a_process(method: str, rows: int, dim: int, classes: int) -> dict[str, Any] | None:
  command = [sys.executable, "-m", "benchmarks.embeddings_scale", "--one", method]
  command += ["--rows", str(rows), "--dimensions", str(dim), "--classes", str(classes)]
  try:
    done = subprocess.run(
      command, capture_output=True, text=True, encoding="utf-8", timeout=_LIMIT, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])
  except subprocess.TimeoutExpired:
    print(f"{method} on {rows:,} rows was stopped after {_LIMIT} seconds", file=sys.stderr)
  except subprocess.CalledProcessError as error:
    last = (error.stderr.strip().splitlines() or ["it was killed, perhaps for memory"])[-1]
    print(f"{method} on {rows:,} rows failed: {last}", file=sys.stderr)
  return None


_TOP = """# Classifiers of embeddings at scale

Time and peak memory of each method in a process of its own. The data are drawn, and the accuracy tells only that a
method works; [embeddings.md](embeddings.md) compares on real embeddings. `LongTailClassifier` fits six families of
heads with five folds, and tunes them; the others fit once, untuned. From 2^34 numbers times classes on it leaves
regressions out, unless they are named. `reading` is what a run does with a folder of Parquet files in half precision,
which have just been written. Its "data" are the features that it keeps; those of others are the memory before the call.

| rows x numbers, classes | method | seconds | CPU-seconds | peak GB | of that, data | balanced accuracy, % |
|---|---|---|---|---|---|---|
"""  # noqa: E501


def page(result: dict[str, Any]) -> str:
  """The committed page."""
  lines = []
  for row in result["records"]:
    accuracy = row["balanced_accuracy"]
    told = "" if accuracy is None else f"{100 * accuracy:.1f}"
    lines.append(
      f"| {row['rows']:,} x {row['dimensions']}, {row['classes']:,} | {row['method']}"
      f" | {row['seconds']:.0f} | {row['cpu_seconds']:.0f} | {row['peak_gb']:.1f}"
      f" | {row['data_gb']:.1f} | {told} |"
    )
  table = "\n".join(lines)
  note = f" {result['note']}" if result.get("note") else ""
  sizes = "Other sizes are set by `--rows`, `--dimensions`, `--classes` and `--methods`."
  return f"{_TOP}{table}\n\n`{result['command']}`: {machine(result)}{note} {sizes}\n"


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
  parser.add_argument("--dimensions", type=int, default=512)
  parser.add_argument("--classes", type=int, default=100)
  parser.add_argument("--methods", nargs="+", help=f"some of them, by name, or {READING}")
  parser.add_argument("--one", help="measure one method in this process, and print it as JSON")
  parser.add_argument("--json", type=pathlib.Path, help="file of results, to which is added")
  arguments = parser.parse_args(argv)
  size = arguments.dimensions, arguments.classes
  if arguments.one:
    print(json.dumps(_measure(arguments.one, arguments.rows[0], *size)))
    return
  result = {"command": "python -m benchmarks.embeddings_scale", "records": []} | environment()
  if arguments.json and arguments.json.exists():  # what is added must be of the same machine
    result = json.loads(arguments.json.read_text(encoding="utf-8"))
  for rows in arguments.rows:
    for method in arguments.methods or [*FITS, *SAMPLERS]:
      found = _in_a_process(method, rows, *size)
      if found is None:
        continue
      print(found, flush=True)
      result["records"].append(found)
      if arguments.json:
        text = json.dumps(result, indent=1) + "\n"
        arguments.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
  main()
