"""The evaluation of a memdiff experiment: methods scored, hallucinations judged, pictures."""

from collections.abc import Mapping

import jax
import numpy as np

from memdiff.classifier import head, losses
from memdiff.classifier.training import trained_losses
from memdiff.evaluation import classification, plots, quality, result
from memdiff.experiment import (
  Experiment,
  Pool,
  Space,
  head_stage,
  load_space,
  load_synthetic,
  make_pools,
)
from memdiff.runtime import loop


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
    folder = e.workdir.folder("heads") / name
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
  outcome = {
    "method": "memdiff",
    "control": "csl_retrain",
    "reference": None,
    "gain": classification.mean_std(gain),
    "headroom": None,
    "gap_closed": None,
  }
  if "oracle" in top1:
    headroom = top1["oracle"] - top1["csl_retrain"]
    outcome |= {"reference": "oracle", "headroom": classification.mean_std(headroom)}
    if (headroom > 0).all():
      outcome["gap_closed"] = classification.mean_std(gain / headroom)
  return outcome


def stages(e: Experiment) -> list[str]:
  """The folders of the trainings, in order."""
  classifiers = [f"classifier/{loss}" for loss in trained_losses(e.config.classifier)]
  return [*classifiers, "diffusion", "heads/csl_retrain", "heads/memdiff", "heads/oracle"]


def draw(e: Experiment, space: Space, rows: list[dict], synthetic: Mapping[str, np.ndarray]):
  """The report's figures by name; the feature map shows the first seed."""
  data = e.dataset
  made = np.bincount(synthetic["labels"], minlength=data.num_classes)
  first = jax.tree.map(lambda x: x[0], space.standardizer)
  return {
    "long_tail_profile": plots.long_tail_profile(
      data.class_names, data.train_counts, made, result.group_of_class(e)
    ),
    "per_class_accuracy": result.accuracy_by_class(e, rows, ("csl_retrain", "memdiff", "oracle")),
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
    "training_curves": plots.training_curves(result.training_curves(e, stages(e))),
  }


def evaluate(e: Experiment) -> dict:
  """Scores, measures, draws."""
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
  if not len(data.left_out_labels):
    del measured["truth_test"]
  outcome = result.record(e, rows) | {
    "comparison": compare(top1),
    "features": measured,
    "synthetic_counts": np.bincount(synthetic["labels"], minlength=data.num_classes).tolist(),
  }
  e.run.progress.say("drawing")
  return result.save(e, outcome, draw(e, space, rows, synthetic))
