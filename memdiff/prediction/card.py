"""The model card of an exported classifier."""

from collections.abc import Mapping
from typing import Any

from memdiff.evaluation import wording
from memdiff.evaluation.answer import CRITERIA, answer
from memdiff.evaluation.lookup import row_of
from memdiff.evaluation.numerals import percent
from memdiff.prediction.classifier import Classifier
from memdiff.prediction.finished import FinishedRun

_USE = """```python
import jax, jax.export
import numpy as np
import safetensors.numpy

program = jax.export.deserialize(open("classifier.stablehlo", "rb").read())
weights = safetensors.numpy.load_file("weights.safetensors")
inputs = np.zeros({shape}, np.{dtype})  # {meaning}
log_probabilities = program.call(weights, inputs)  # [batch, {number}]
```"""


def render(run: FinishedRun, classifier: Classifier) -> str:
  """The card in Markdown: what it is for, how good it is, what it was trained on, its limits."""
  report, row = run.report, row_of(run.report, classifier.method)
  data, versions = report["dataset"], report["versions"]
  shown = answer(report)
  is_recommended = shown is not None and shown.method == classifier.method
  said = [f"- {line}" for line in shown.lines()] if is_recommended else []
  sections = [
    f"# {report['name']}: {classifier.method}",
    f"Tells {len(classifier.class_names)} classes apart: {_names(classifier)}."
    f" {_sentence(classifier.description)}",
    "## Use",
    f"It needs JAX {versions['jax']} or later, NumPy, safetensors and flatbuffers.",
    _use(classifier),
    "`model.json` has the names of the classes in the order of the probabilities, and what inputs"
    " must be.",
    "## How good it is",
    "\n".join([*said, f"- {wording.calibration(classifier.calibration)}", *_averaged(classifier)]),
    _scores(report, row),
    "## Classes",
    _classes(data, row),
    "## Training data",
    f"{data['name']}: {sum(data['train_counts']):,} training examples, {data['test_count']:,} test"
    f" examples. SHA-256 of the split: `{data['split_sha256']}`. Made with memdiff"
    f" {versions['memdiff']} by\n\n```\n{report['command']}\n```",
    "## Limits",
    _limits(data, row),
  ]
  return "\n\n".join(section for section in sections if section) + "\n"


def _names(classifier: Classifier, most: int = 12) -> str:
  names = classifier.class_names
  more = f" and {len(names) - most} more" if len(names) > most else ""
  return ", ".join(names[:most]) + more


def _sentence(text: str) -> str:
  return f"{text[0].upper()}{text[1:].rstrip('.')}." if text else ""


def _use(classifier: Classifier) -> str:
  if classifier.takes_images:
    meaning = "images; model.json says how they are cut"
  else:
    meaning = "embeddings of the encoder that the training features are of"
  return _USE.format(
    shape=(1, *classifier.input_shape),
    dtype=classifier.input_dtype.name,
    meaning=meaning,
    number=len(classifier.class_names),
  )


def _averaged(classifier: Classifier) -> list[str]:
  number = classifier.weights.num_models
  if number == 1:
    return []
  return [f"- It averages {number} models. All figures are those of single models."]


def _scores(report: Mapping[str, Any], row: Mapping[str, Any]) -> str:
  """A table of the scores of one model, mean and deviation over the seeds of the run."""
  columns = {"balanced_accuracy": "balanced accuracy", "top1": "top-1", "macro_f1": "macro-F1"}
  columns |= {group["name"]: group["name"] for group in report["groups"]}
  known = {title: row[name] for name, title in columns.items() if row[name]["mean"] is not None}
  cells = [f"{percent(v['mean'])} ± {percent(v['std'])}" for v in known.values()]
  rules = "; ".join(f"{group['name']}: {group['rule']}" for group in report["groups"])
  criterion = CRITERIA.get(report.get("criterion"), CRITERIA["balanced_accuracy"])
  return "\n".join(
    [
      f"| {' | '.join(known)} |",
      "|" + "---|" * len(known),
      f"| {' | '.join(cells)} |",
      "",
      f"Percent of the test set, mean ± standard deviation over {len(row['seeds'])} models;"
      f" {rules}. {_sentence(criterion[0])[:-1]} is {criterion[1]}.",
    ]
  )


def _classes(data: Mapping[str, Any], row: Mapping[str, Any]) -> str:
  lines = ["| class | training examples | test accuracy, % |", "|---|---|---|"]
  accuracy = row["per_class_top1"]["mean"]
  for name, count, value in zip(data["class_names"], data["train_counts"], accuracy, strict=True):
    told = "not tested" if value is None else percent(value)
    lines.append(f"| {name.replace('|', chr(92) + '|')} | {count:,} | {told} |")
  return "\n".join(lines)


def _limits(data: Mapping[str, Any], row: Mapping[str, Any]) -> str:
  counts = data["train_counts"]
  lines = [
    f"- The rarest class has {min(counts):,} training examples, the commonest {max(counts):,}. What"
    " it says of rare classes rests on few examples.",
    "- It always names one of its classes, also for inputs that show none of them.",
    "- Figures hold for inputs like those of the test set. Probabilities count all classes alike"
    " unless the run's criterion is accuracy.",
  ]
  untested = data["classes_without_test_rows"]
  if untested:
    lines.append(f"- {len(untested)} classes were not tested: {', '.join(untested[:8])}.")
  return "\n".join(lines)
