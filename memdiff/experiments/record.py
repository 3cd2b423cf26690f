"""What every kind of experiment reports: the record of a run, its curves, report.json and .html."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from input_pipeline.dataset import LongTailDataset
from input_pipeline.embeddings import LongTailEmbeddings
from memdiff import config as config_lib
from memdiff.classifier import encoder
from memdiff.evaluation import ratings, scores
from memdiff.experiments import summaries
from memdiff.experiments.base import Experiment
from memdiff.runtime import environment, meter
from memdiff.runtime.workdir import write_atomically, write_json
from memdiff.runtime.writers import read_history

if TYPE_CHECKING:
  from matplotlib.figure import Figure

SCHEMA = 1


def record(experiment: Experiment, rows: list[dict]) -> dict[str, Any]:
  """The part of report.json that does not depend on the kind of experiment."""
  data = experiment.dataset
  groups = scores.make_groups(data.train_counts)
  tested = np.bincount(data.test_labels, minlength=data.num_classes) > 0
  return {
    "schema": SCHEMA,
    "experiment": experiment.config.experiment,
    "name": experiment.config.name,
    "command": experiment.command,
    "config": config_lib.as_dict(experiment.config),
    "versions": environment.versions(),
    "hardware": environment.hardware(),
    "dataset": {
      "name": data.name,
      "num_classes": data.num_classes,
      "class_names": list(data.class_names),
      "train_counts": data.train_counts.tolist(),
      "left_out_counts": np.bincount(data.left_out_labels, minlength=data.num_classes).tolist(),
      "holdout_counts": np.bincount(data.holdout_labels, minlength=data.num_classes).tolist(),
      "test_count": len(data.test_labels),
      "classes_without_test_rows": [data.class_names[c] for c in np.flatnonzero(~tested)],
      "split_sha256": data.split_sha256,
      "sha256": experiment.data_digests,
      "profile": data.profile,
      "imbalance": data.imbalance,
    },
    "input": input_of(experiment),
    "groups": [dataclasses.asdict(g) | {"classes": list(g.classes)} for g in groups],
    "classification": rows,
  }


def input_of(experiment: Experiment) -> dict[str, Any]:
  """What the classifiers of a run take, as far as predicting without its data needs it.

  {"features": D} of embeddings; {"image_shape", "margin"} of images, with {"pixel_mean",
  "pixel_std"} if there are classifiers.
  """
  data = experiment.dataset
  if isinstance(data, LongTailEmbeddings):
    return {"features": data.train_features.shape[1]}
  if not isinstance(data, LongTailDataset):
    return {}
  images = data.train_images
  found = {"image_shape": list(images.shape[1:]), "margin": getattr(images, "margin", 1.0)}
  if hasattr(experiment.config, "encoder"):
    statistics = encoder.pixel_statistics(experiment.config.encoder.input, images)
    found |= {name: values.tolist() for name, values in statistics.items()}
  return found


def training_curves(experiment: Experiment, stages: Sequence[str]) -> list[dict]:
  """Loss and accuracy of `stages` by metrics.jsonl, mean and sample deviation over seeds."""
  curves = []
  for stage in stages:
    series: dict[str, list] = {}
    for record in read_history(experiment.workdir.path / stage / "metrics.jsonl"):
      for name, values in record["metrics"].items():
        kind = "test " if record["kind"] == "eval" else ""
        spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
        series.setdefault(kind + name, []).append((record["step"], np.mean(values), spread))
    for metric, points in series.items():
      step, mean, std = zip(*points, strict=True)
      curves.append(
        {
          "stage": stage,
          "metric": metric,
          "step": step,
          "mean": np.array(mean),
          "std": np.array(std),
        }
      )
  return curves


def group_of_class(experiment: Experiment) -> list[str]:
  """[C] names: many, medium or few."""
  groups = scores.make_groups(experiment.dataset.train_counts)
  return [
    next(g.name for g in groups if c in g.classes) for c in range(experiment.dataset.num_classes)
  ]


def accuracy_by_class(experiment: Experiment, rows: list[dict], methods: Sequence[str]) -> "Figure":
  """The per-class picture of some of the rows."""
  from memdiff.evaluation import plots  # matplotlib takes a second

  chosen = [
    (r["method"], np.array(r["per_class_top1"]["mean"]), np.array(r["per_class_top1"]["std"]))
    for r in rows
    if r["method"] in methods
  ]
  return plots.per_class_accuracy(
    experiment.dataset.class_names, experiment.dataset.train_counts, chosen
  )


def save(
  experiment: Experiment,
  result: Mapping[str, Any],
  figures: Iterable[tuple[str, "Figure"]],
  summarise: Callable[..., None] = summaries.write,
) -> dict:
  """Writes result.json, the figures by name, and by `summarise` what TensorBoard shows first.

  Returns:
    The top-1 score of every method, for the manifest.
  """
  from memdiff.evaluation import plots  # matplotlib takes a second

  folder = experiment.workdir.folder("evaluation")
  pictures = {name: plots.to_png(figure, dpi=150) for name, figure in figures}
  for name, picture in pictures.items():
    write_atomically(folder / f"{name}.png", picture)
  summarise(experiment, result, pictures)
  write_json(folder / "result.json", result)
  return {row["method"]: row["top1"] for row in result["classification"]}


def write_report(
  experiment: Experiment, manifests: Mapping[str, dict], render: Callable[..., str]
) -> dict:
  """report.json and report.html from the evaluation's result and all phases' manifests."""
  folder = experiment.workdir.folder("evaluation")
  result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
  keys = ("seconds", "compile_seconds", "cpu_seconds")
  phases = {
    name: {key: manifest.get(key, 0) for key in (*keys, "killed")}
    for name, manifest in manifests.items()
  }
  result["timing"] = {"phases": phases, "stages": meter.read_all(experiment.workdir.path)} | {
    f"total_{key}": sum(phase[key] for phase in phases.values()) for key in keys
  }
  if rated := ratings.of_run(experiment.workdir.path):
    result["ratings"] = rated
  pictures = {path.stem: path.read_bytes() for path in sorted(folder.glob("*.png"))}
  write_json(experiment.workdir.path / "report.json", result)
  page = render(result, pictures).encode(errors="backslashreplace")
  write_atomically(experiment.workdir.path / "report.html", page)
  return result
