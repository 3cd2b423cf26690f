"""The evaluation of classifiers that were trained on generated images: table, answer, pictures."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from memdiff.classifier import heads
from memdiff.evaluation import calibration, scores
from memdiff.evaluation.lookup import made_data
from memdiff.evaluation.method import Method
from memdiff.experiments import augmented_pool, prompting, record
from memdiff.experiments.augmented_runs import Part, members, part_of
from memdiff.experiments.augmented_selection import load_selection, logits_of
from memdiff.experiments.augmented_settings import (
  AugmentedConfig,
  Choice,
  Row,
  candidates,
  rows_of,
)
from memdiff.experiments.base import Experiment
from memdiff.experiments.comparison import (
  Scored,
  agreement,
  best_of,
  compare,
  headline,
  known_scores,
  known_temperatures,
  mark_shown,
)
from memdiff.runtime.workdir import read_arrays
from memdiff.synthesis import image_methods

if TYPE_CHECKING:
  from matplotlib.figure import Figure

_REAL, _GENERATED = 4, 7  # images per class in a grid
_MAX_CURVES = 6  # trainings in one picture


def classify(
  experiment: Experiment, choices: Mapping[str, Choice], recommendation: Mapping | None
) -> Scored:
  """Scores every row under every loss on the test set."""
  config, data = experiment.config, experiment.dataset
  groups = scores.make_groups(data.train_counts)
  final, rows, found = part_of(experiment, "final"), [], {}
  temperatures, criterion = known_temperatures(recommendation), config.selection.criterion
  for row in rows_of(config, data):
    for loss in config.losses:
      method = Method.of(row.name, loss)
      choice = choices.get(method, candidates(config, row, loss)[0])
      logits = logits_of(experiment, final, row, loss, choice)
      found[method] = logits.argmax(axis=-1)
      words = f"{row.describe()}; {heads.LOSSES[loss]}{_details(config, row, loss, choice)}"
      scored = scores.score_method(
        method, words, found[method], data.test_labels, groups, experiment.seeds, data.num_classes
      )
      calibrated = calibration.measure(
        logits, data.test_labels, criterion, temperatures.get(method)
      )
      rows.append(scored | {"reference": row.reference, "calibration": calibrated})
  return Scored(
    rows=rows,
    predictions=found,
    heads={},
    labels=data.test_labels,
    criterion=criterion,
    groups=groups,
  )


def _details(config: AugmentedConfig, row: Row, loss: str, choice: Choice) -> str:
  """What cross-validation chose, if there was a choice."""
  words = [f"tau {choice.tau:g}"] if loss == "logit_adjustment" else []
  if len(candidates(config, row, loss)) > 1 and len(config.added.counts) > 1 and row.has_pool:
    words.append(f"class prior from {choice.counts} counts")
  return f" ({', '.join(words)})" if words else ""


def _methods(experiment: Experiment, rows: Sequence[Row]) -> list[Method]:
  return [Method.of(row.name, loss) for row in rows for loss in experiment.config.losses]


def plain_training(experiment: Experiment) -> str:
  """The method that a user would have without memdiff: cross-entropy on the real images."""
  losses = experiment.config.losses
  return Method.of("real", "cross_entropy" if "cross_entropy" in losses else losses[0])


def same_loss_gains(
  experiment: Experiment, scored: Scored, recommendation: Mapping | None
) -> list[dict[str, Any]]:
  """What generated images add to the best control that is trained with the same loss; paired.

  The control is the best in cross-validation; without it, real images only.
  """
  rows, gains = rows_of(experiment.config, experiment.dataset), []
  known = known_scores(recommendation)
  for loss in experiment.config.losses:
    controls = [Method.of(row.name, loss) for row in rows if row.control]
    control = best_of(controls, known) if known else Method.of("real", loss)
    for row in rows:
      if not row.control:
        method = Method.of(row.name, loss)
        gain = scored.gain(method, control)
        gains.append({"method": method, "control": control, "gain": gain})
  return gains


def pool_numbers(experiment: Experiment, part: Part) -> list[dict[str, Any]]:
  """Of every generator and filter: images drawn and used per class, means over the runs."""
  data, config, found = experiment.dataset, experiment.config, []
  lacking = augmented_pool.wanted(experiment, part).mean(axis=0)
  for method in config.sources:
    for name in config.pool.filters:
      used, drawn = [], []
      for fold_or_seed in members(experiment, part):
        arrays, index = augmented_pool.kept(fold_or_seed, Row(method, name))
        used.append(np.bincount(arrays["labels"][index], minlength=data.num_classes))
        drawn.append(np.bincount(arrays["labels"], minlength=data.num_classes))
      used = np.mean(used, axis=0)
      found.append(
        {
          "method": method,
          "filter": name,
          "drawn": np.mean(drawn, axis=0).tolist(),
          "used": used.tolist(),
          "classes_with_real_images_only": [
            data.class_names[c] for c in np.flatnonzero((used == 0) & (lacking > 0))
          ],
        }
      )
  return found


def pool_signs(experiment: Experiment, part: Part) -> list[dict[str, Any]]:
  """What is known of every generator's images, mean and deviation over the runs."""
  found = []
  for method in experiment.config.sources:
    signs = [augmented_pool.signs_of(one, method) for one in members(experiment, part)]
    found.append(
      {
        "method": method,
        "right": scores.mean_std(np.array([(s.predicted == s.labels).mean() for s in signs])),
        "copied": scores.mean_std(np.array([s.copied.mean() for s in signs])),
      }
    )
  return found


def evaluate(experiment: Experiment) -> dict:
  """Scores every row on the test set, and draws."""
  data, (choices, recommendation) = experiment.dataset, load_selection(experiment)
  experiment.run.progress.say("scoring the rows on the test set")
  scored = classify(experiment, choices, recommendation)
  known = known_scores(recommendation)
  rows = rows_of(experiment.config, data)
  generated = _methods(experiment, [row for row in rows if not row.control and not row.reference])
  controls = _methods(experiment, [row for row in rows if row.control])
  comparison = compare(scored, best_of(generated, known), best_of(controls, known))
  if recommendation:
    recommendation = recommendation | {"agreement": agreement(scored, recommendation)}
  first = headline(scored, generated, plain_training(experiment), comparison, recommendation)
  mark_shown(scored, first, comparison)
  final = part_of(experiment, "final")
  numbers = pool_numbers(experiment, final)
  shown = Method(first["synthetic"]["method"]).generator
  of_row = next(row for row in rows if row.name == shown)
  used = next(
    n["used"] for n in numbers if (n["method"], n["filter"]) == (of_row.source, of_row.filter)
  )
  outcome = record.record(experiment, scored.rows) | {
    "synthetic_kind": "images",
    "criterion": scored.criterion,
    "headline": first,
    "comparison": comparison,
    "recommendation": recommendation,
    "choices": {method: dataclasses.asdict(choice) for method, choice in choices.items()},
    "same_loss": same_loss_gains(experiment, scored, recommendation),
    "pools": numbers,
    "pool_signs": pool_signs(experiment, final),
    "synthetic_counts": np.round(used).astype(int).tolist(),
  }
  experiment.run.progress.say("drawing")
  return record.save(experiment, outcome, _draw(experiment, scored, comparison, outcome))


def _draw(
  experiment: Experiment, scored: Scored, comparison: Mapping, outcome: Mapping
) -> Iterator[tuple[str, "Figure"]]:
  """The report's figures and their names."""
  from memdiff.evaluation import plots  # matplotlib takes a second

  data = experiment.dataset
  yield (
    "long_tail_profile",
    plots.long_tail_profile(
      data.class_names,
      data.train_counts,
      np.array(outcome["synthetic_counts"]),
      record.group_of_class(experiment),
      made_data(outcome),
    ),
  )
  named = [comparison[key] for key in ("control", "method", "reference") if comparison[key]]
  yield "per_class_accuracy", record.accuracy_by_class(experiment, scored.rows, named)
  if comparison["gap_closed"]:
    gaps = [
      (row["method"], row["gap_closed"]["mean"], row["gap_closed"]["interval"])
      for row in scored.rows
      if not row["reference"]
    ]
    yield "gap_closed", plots.gap_closed(gaps)
  trained = image_methods.trainings(experiment.config.methods)
  stages = [f"diffusion/final/{method}" for method in trained]
  stages += [f"classifiers/final/{row}/cross_entropy" for row in ("real", "oracle")]
  stages = [s for s in stages if (experiment.workdir.path / s / "metrics.jsonl").exists()]
  yield (
    "training_curves",
    plots.training_curves(record.training_curves(experiment, stages[:_MAX_CURVES])),
  )
  for method in experiment.config.sources:
    for name in experiment.config.pool.filters:
      yield f"pool_{Row(method, name).name}", _grid(experiment, method, name)
  first = members(experiment, part_of(experiment, "final"))[0]
  for method in experiment.config.sources:
    arrays = read_arrays(first.pool_path(method))
    if "prompt" in arrays:
      yield f"prompts_{method}", prompting.draw_sheet(experiment, method, arrays)


def _grid(experiment: Experiment, method: str, filter_name: str) -> "Figure":
  """Real training images, generated ones that are used and that are not, of the first seed."""
  from memdiff.evaluation import plots

  data, first = experiment.dataset, members(experiment, part_of(experiment, "final"))[0]
  arrays, index = augmented_pool.kept(first, Row(method, filter_name))
  used = np.zeros(len(arrays["labels"]), bool)
  used[index] = True
  shown = plots.shown_classes(data.train_counts)
  columns = {
    "training images": [data.train_images[data.train_labels == c][:_REAL] for c in shown],
    "generated, used": [arrays["images"][(arrays["labels"] == c) & used] for c in shown],
    "generated, not used": [arrays["images"][(arrays["labels"] == c) & ~used] for c in shown],
  }
  return plots.sample_grid(
    f"{method}, filter {filter_name}",
    [f"{data.class_names[c]} ({data.train_counts[c]:,})" for c in shown],
    [
      (title, rows, _REAL if title == "training images" else _GENERATED)
      for title, rows in columns.items()
      if any(len(row) for row in rows)
    ],
  )
