"""What TensorBoard shows first of a run: the answer, few scores, the figures, the features.

Its tags begin with `1_` and `2_`, so that they stand above the curves of the trainings.
"""

import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from memdiff import config as config_lib
from memdiff.evaluation import image_report, tables
from memdiff.evaluation.answer import answer
from memdiff.evaluation.lookup import mean_of, row_of
from memdiff.experiments.base import Experiment

_RESULT, _METHODS = "1_result", "2_methods"

# Columns of TensorBoard's table of runs: name -> field of the config. The data set's name and
# imbalance stand before them, as they were measured.
FIELDS = {
  "experiment": "experiment",
  "seeds": "seeds",
  "backbone": "encoder.backbone.name",
  "classifier_loss": "classifier.loss",
  "epochs": "classifier.num_epochs",
  "head_losses": "head.losses",
  "generators": "generators.names",
  "denoiser": "diffusion.denoiser.name",
  "diffusion_steps": "diffusion.num_steps",
  "folds": "selection.folds",
}
_SCORES = ("balanced_accuracy", "top1", "few", "macro_f1")

MAX_POINTS = 2000  # of each kind in the projector
_MAX_WIDTH = 64  # wider features are reduced by PCA; the browser loads them as text


def write(experiment: Experiment, result: Mapping[str, Any], pictures: Mapping[str, bytes]) -> None:
  """Writes answer, scores, hyper-parameters and PNG files of a result, as it is in result.json."""
  board = experiment.run.tensorboard
  if not board.enabled:
    return
  found = answer(result)
  if found:
    board.texts(0, {f"{_RESULT}/answer": "\n\n".join(found.lines())})
    row = row_of(result, found.method)
    scores = {f"{_RESULT}/{key}": mean_of(row, key) for key in _SCORES}
    board.scalars(0, {name: score for name, score in scores.items() if score is not None})
  for row in tables.short(result):
    known = [key for key, _ in tables.columns(result) if mean_of(row, key) is not None]
    board.scalars(0, {f"{_METHODS}/{row['method']}/{key}": mean_of(row, key) for key in known})
  for name, picture in pictures.items():
    board.pictures(0, {f"{_RESULT}/{name}": _pixels(picture)})
  board.hparams(hyper_parameters(result), [f"{_RESULT}/{key}" for key in _SCORES])


def write_images(
  experiment: Experiment, result: Mapping[str, Any], pictures: Mapping[str, bytes]
) -> None:
  """The same of a run that generates images."""
  board = experiment.run.tensorboard
  if not board.enabled:
    return
  found = image_report.answer(result["images"])
  said = [found.title, *(effect.sentence() for effect in found.effects), *found.sentences]
  board.texts(0, {f"{_RESULT}/answer": "\n\n".join(said)})
  for row in result["images"]["rows"]:
    known = {k: mean_of(row, k) for k, v in row.items() if isinstance(v, dict) and "values" in v}
    scalars = {f"{_METHODS}/{row['method']}/{k}": v for k, v in known.items() if v is not None}
    board.scalars(0, scalars)
  for name, picture in pictures.items():
    board.pictures(0, {f"{_RESULT}/{name}": _pixels(picture)})


def _pixels(png: bytes) -> np.ndarray:
  """uint8 [H, W, 3]."""
  return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def hyper_parameters(result: Mapping[str, Any]) -> dict[str, Any]:
  """The columns of a run; None for a field that its kind of experiment lacks."""
  fields = config_lib.flatten(result["config"])
  measured = {"dataset": result["dataset"]["name"], "imbalance": result["dataset"]["imbalance"]}
  chosen = {name: fields.get(field) for name, field in FIELDS.items()}
  return measured | {
    name: ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
    for name, value in chosen.items()
  }


def project(
  experiment: Experiment,
  features: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> None:
  """Shows features in TensorBoard's projector, to be coloured by kind or class.

  Args:
    features: kind, such as real or synthetic -> (features [N, D], labels [N]). Of more than
      `MAX_POINTS`, a sample is shown, the same one for the same features.
  """
  if not experiment.run.tensorboard.enabled:
    return
  rows, labels, kinds = [], [], []
  for kind, (x, y) in features.items():
    x, y = np.asarray(x), np.asarray(y)
    number = min(len(x), MAX_POINTS)
    chosen = np.sort(np.random.default_rng(0).choice(len(x), number, replace=False))
    chosen = chosen[np.isfinite(x[chosen]).all(axis=1)]
    rows.append(x[chosen].reshape(len(chosen), math.prod(x.shape[1:])))
    labels.append(y[chosen])
    kinds += [kind] * len(chosen)
  if not kinds:
    return
  names = [experiment.dataset.class_names[c] for c in np.concatenate(labels)]
  points = _narrow(np.concatenate(rows))
  experiment.run.tensorboard.projector("features", points, {"class": names, "kind": kinds})


def _narrow(points: np.ndarray) -> np.ndarray:
  if min(points.shape) <= _MAX_WIDTH:
    return points
  from sklearn.decomposition import PCA  # here, because scikit-learn takes a second to import

  return PCA(_MAX_WIDTH, random_state=0).fit_transform(points)
