"""The evaluation phase: from what the other phases left to report.json, report.html, pictures."""

import dataclasses
import json
from collections.abc import Mapping

import jax
import numpy as np

from memdiff import config as config_lib
from memdiff.classifier import head, losses
from memdiff.evaluation import classification, plots, quality, report
from memdiff.experiment import (
  Experiment,
  Pool,
  Space,
  encoder_losses,
  head_stage,
  load_space,
  load_synthetic,
  make_pools,
)
from memdiff.runtime import environment, loop
from memdiff.runtime.workdir import write_atomically, write_json
from memdiff.runtime.writers import read_history

SCHEMA = 1
_TABLE = ("top1", "many", "medium", "few", "macro_f1")


def classify(
  e: Experiment, space: Space, pools: Mapping[str, Pool]
) -> tuple[list[dict], dict[str, np.ndarray]]:
  """The table's rows, and per-seed top-1 accuracy [S] by method."""
  labels = e.dataset.test_labels
  described = {
    loss: (f"encoder and head trained with {losses.LOSSES[loss].description}", predictions)
    for loss, predictions in space.test_predictions.items()
  }
  for name, pool in pools.items():
    folder = e.workdir.folder("classifier") / name
    state = loop.load_final(head_stage(e, space, name, pool), e.run, folder)
    logits = jax.jit(jax.vmap(head.logits_of))(state.params, space.test)
    described[name] = pool.description, np.asarray(logits.argmax(axis=-1))
  groups = classification.make_groups(e.dataset.train_counts)
  rows = [
    classification.score_method(
      method, description, predictions, labels, groups, e.seeds, e.dataset.num_classes
    )
    for method, (description, predictions) in described.items()
  ]
  top1 = {method: (p == labels).mean(axis=1) for method, (_, p) in described.items()}
  return rows, top1


def compare(top1: Mapping[str, np.ndarray]) -> dict:
  """What hallucination adds to the real-only control, and how much the oracle would; paired."""
  gain = top1["memdiff"] - top1["csl_retrain"]
  headroom = top1["oracle"] - top1["csl_retrain"]
  gap_closed = None
  if (headroom > 0).all():
    gap_closed = classification.mean_std(gain / headroom)
  return {
    "method": "memdiff",
    "control": "csl_retrain",
    "reference": "oracle",
    "gain": classification.mean_std(gain),
    "headroom": classification.mean_std(headroom),
    "gap_closed": gap_closed,
  }


def training_curves(e: Experiment) -> list[dict]:
  """Loss and accuracy of every stage from its metrics.jsonl, mean and deviation over seeds."""
  stages = [f"encoder/{loss}" for loss in encoder_losses(e.config)]
  stages += ["diffusion", "classifier/csl_retrain", "classifier/memdiff", "classifier/oracle"]
  curves = []
  for stage in stages:
    series: dict[str, list] = {}
    for record in read_history(e.workdir.path / stage / "metrics.jsonl"):
      for name, values in record["metrics"].items():
        kind = "test " if record["kind"] == "eval" else ""
        series.setdefault(kind + name, []).append((record["step"], np.mean(values), np.std(values)))
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


def draw(e: Experiment, space: Space, rows: list[dict], synthetic: Mapping[str, np.ndarray]):
  """The report's figures by name; the feature map shows the first seed."""
  data = e.dataset
  groups = classification.make_groups(data.train_counts)
  group_of_class = [next(g.name for g in groups if c in g.classes) for c in range(data.num_classes)]
  made = np.bincount(synthetic["labels"], minlength=data.num_classes)
  first = jax.tree.map(lambda x: x[0], space.standardizer)
  return {
    "long_tail_profile": plots.long_tail_profile(
      data.class_names, data.train_counts, made, group_of_class
    ),
    "per_class_accuracy": plots.per_class_accuracy(
      data.class_names,
      data.train_counts,
      [
        (r["method"], np.array(r["per_class_top1"]["mean"]), np.array(r["per_class_top1"]["std"]))
        for r in rows
        if r["method"] in ("csl_retrain", "memdiff", "oracle")
      ],
    ),
    "feature_map": plots.feature_map(
      np.asarray(space.train[0]),
      data.train_labels,
      np.asarray(space.left_out[0]),
      data.left_out_labels,
      np.asarray(first.forward(synthetic["features"][0])),
      synthetic["labels"],
      data.class_names,
      seed=0,
      max_per_class=e.config.evaluation.map_per_class,
    ),
    "confidence_histogram": plots.confidence_histogram(
      synthetic["confidence"][0], synthetic["labels"], data.class_names
    ),
    "training_curves": plots.training_curves(training_curves(e)),
  }


def evaluate(e: Experiment) -> dict:
  """Writes result.json, the figures, and TensorBoard's pictures and table."""
  space, synthetic, data = load_space(e), load_synthetic(e), e.dataset
  pools = make_pools(e, space)
  e.run.progress.say("scoring the methods on the test set")
  rows, top1 = classify(e, space, pools)
  e.run.progress.say("measuring the hallucinated features against unseen real ones")
  measured = quality.measure(
    np.asarray(space.train),
    data.train_labels,
    np.asarray(space.left_out),
    data.left_out_labels,
    np.asarray(pools["memdiff"].features),
    synthetic["labels"],
    data.num_classes,
  )
  groups = classification.make_groups(data.train_counts)
  result = {
    "schema": SCHEMA,
    "name": e.config.name,
    "command": e.command,
    "config": config_lib.as_dict(e.config),
    "versions": environment.versions(),
    "hardware": environment.hardware(),
    "dataset": {
      "name": data.name,
      "num_classes": data.num_classes,
      "class_names": list(data.class_names),
      "train_counts": data.train_counts.tolist(),
      "left_out_counts": np.bincount(data.left_out_labels, minlength=data.num_classes).tolist(),
      "test_count": len(data.test_labels),
      "split_sha256": data.split_sha256,
      "imbalance": data.imbalance,
    },
    "groups": [dataclasses.asdict(g) | {"classes": list(g.classes)} for g in groups],
    "classification": rows,
    "comparison": compare(top1),
    "features": measured,
    "synthetic_counts": np.bincount(synthetic["labels"], minlength=data.num_classes).tolist(),
  }
  e.run.progress.say("drawing")
  figures = draw(e, space, rows, synthetic)
  folder = e.workdir.folder("evaluation")
  for name, figure in figures.items():
    write_atomically(folder / f"{name}.png", plots.to_png(figure, dpi=150))
    e.run.tensorboard.pictures(0, {f"report/{name}": plots.to_rgb(figure, dpi=100)})
  for row in rows:
    names = [n for n in _TABLE if row[n]["mean"] is not None]  # a group may have no class
    e.run.tensorboard.scalars(0, {f"table/{row['method']}/{n}": row[n]["mean"] for n in names})
  e.run.tensorboard.hparams(config_lib.flatten(config_lib.as_dict(e.config)))
  write_json(folder / "result.json", result)
  return {row["method"]: row["top1"] for row in rows}


def write_report(e: Experiment, manifests: Mapping[str, dict]) -> dict:
  """report.json and report.html from the evaluation's result and all phases' manifests."""
  folder = e.workdir.folder("evaluation")
  result = json.loads((folder / "result.json").read_text())
  keys = ("seconds", "compile_seconds")
  phases = {name: {key: manifest[key] for key in keys} for name, manifest in manifests.items()}
  result["timing"] = {"phases": phases} | {
    f"total_{key}": sum(phase[key] for phase in phases.values()) for key in keys
  }
  pictures = {path.stem: path.read_bytes() for path in sorted(folder.glob("*.png"))}
  write_json(e.workdir.path / "report.json", result)
  write_atomically(e.workdir.path / "report.html", report.render_html(result, pictures).encode())
  return result
