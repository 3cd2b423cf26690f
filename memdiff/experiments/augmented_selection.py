"""Which row to use, decided by cross-validation on training images, generators included."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from memdiff.classifier.priors import log_prior
from memdiff.evaluation import calibration, cross_validation
from memdiff.evaluation.method import Method
from memdiff.experiments.augmented_runs import PREDICTIONS, Part, classifier_folder, part_of
from memdiff.experiments.augmented_settings import Choice, Row, candidates, in_folds, rows_of
from memdiff.experiments.base import Experiment
from memdiff.runtime.workdir import read_arrays, read_json, write_arrays, write_json


def logits_of(
  experiment: Experiment, part: Part, row: Row, loss: str, choice: Choice
) -> np.ndarray:
  """Of the images that judge, [R, B, C], less tau times the log prior of a run."""
  folder = classifier_folder(experiment, part, row, choice.training(loss))
  arrays = read_arrays(folder / PREDICTIONS)
  prior = np.stack([log_prior(counts) for counts in arrays[choice.counts]])
  return arrays["logits"] - choice.tau * prior[:, None]


def predict(experiment: Experiment, part: Part, row: Row, loss: str, choice: Choice) -> np.ndarray:
  """Classes of the images that judge, [R, B]."""
  return logits_of(experiment, part, row, loss, choice).argmax(axis=-1)


def select(experiment: Experiment) -> dict:
  """Chooses tau where there is one, and recommends a row."""
  folder, config = experiment.workdir.folder("selection"), experiment.config
  rows = [row for row in rows_of(config, experiment.dataset) if in_folds(config, row)]
  if not config.selection.folds:
    choices = {
      Method.of(row.name, loss): candidates(config, row, loss)[0]
      for row in rows
      for loss in config.losses
    }
    _write(folder, choices, None)
    return {}
  part = part_of(experiment, "folds")
  judged = cross_validation.judged_examples(
    part.held_out,
    experiment.dataset.train_labels,
    config.selection.criterion,
    experiment.dataset.num_classes,
  )
  fitted, choices, known = {}, {}, {}
  for row in rows:
    for loss in config.losses:
      settings, method = candidates(config, row, loss), Method.of(row.name, loss)
      found = [predict(experiment, part, row, loss, choice) for choice in settings]
      predictions = np.stack(found)[:, part.held_out >= 0]
      choices[method] = settings[cross_validation.choose(predictions, judged)]
      fitted[method] = cross_validation.cross_fitted(predictions, judged)
      logits = logits_of(experiment, part, row, loss, choices[method])[part.held_out >= 0]
      temperature = calibration.fit_temperature(logits, judged.label, judged.criterion)
      known[method] = {"settings": len(settings), "temperature": temperature}
  controls = [Method.of(row.name, loss) for row in rows if row.control for loss in config.losses]
  recommendation = cross_validation.recommend(fitted, judged, controls)
  for method, more in known.items():
    recommendation["scores"][method] |= more
  basis = {
    "folds": config.selection.folds,
    "repeats": config.selection.repeats,
    "encoder": "retrained",
  }
  _write(folder, choices, recommendation | {"basis": basis})
  write_arrays(
    folder / "predictions.npz",
    fitted | {name: getattr(judged, name) for name in ("label", "example", "run")},
  )
  return {"method": recommendation["method"], "expected_gain": recommendation["expected_gain"]}


def _write(
  folder: pathlib.Path, choices: Mapping[str, Choice], recommendation: Mapping | None
) -> None:
  plain = {method: dataclasses.asdict(choice) for method, choice in choices.items()}
  write_json(folder / "choices.json", {"choices": plain, "recommendation": recommendation})


def load_selection(experiment: Experiment) -> tuple[dict[str, Choice], dict[str, Any] | None]:
  """(method -> choice, recommendation or None)."""
  saved = read_json(experiment.workdir.folder("selection") / "choices.json")
  return {m: Choice(**c) for m, c in saved["choices"].items()}, saved["recommendation"]
