"""Generated sets class by class, group by group and image by image, for the evaluator alone."""

from typing import Any

import numpy as np

from memdiff.errors import DataError
from memdiff.evaluation import image_quality, image_sets, scores
from memdiff.evaluation.image_quality import Labelled
from memdiff.evaluation.image_sets import ImageSet


def _numbered(names: np.ndarray, classes: np.ndarray, path: str, reference: str) -> np.ndarray:
  """Which of `classes` [C], in order, each name is. [N].

  Raises:
    DataError: if one is none of them.
  """
  unknown = np.setdiff1d(names, classes)
  if len(unknown):
    raise DataError(f"The class {str(unknown[0])!r} of {path} has no image in {reference}.")
  return np.searchsorted(classes, names)


def by_class(
  real: np.ndarray, generated: np.ndarray, paths: dict[str, str], train: str = ""
) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
  """Kernel distance and diversity of classes; distances of groups, if the training set is given.

  Args:
    real, generated: features [N, D] and [M, D].
    paths: of the sets `reference` and `generated`, which tell the classes.
    train: path of the training set, whose counts make the groups many, medium and few.

  Returns:
    (metrics, {class: {"kid", "diversity", "generated", "real", "train"}}).

  Raises:
    DataError: if a set does not tell its classes, or one class is in no real image.
  """
  names = {kind: image_sets.read_labels(path) for kind, path in paths.items()}
  classes = np.unique(names["reference"])
  labels = {
    kind: _numbered(found, classes, paths[kind], paths["reference"])
    for kind, found in names.items()
  }
  sides = Labelled(real, labels["reference"]), Labelled(generated, labels["generated"])
  found = image_quality.by_class(*sides, len(classes))
  counts = {kind: np.bincount(own, minlength=len(classes)) for kind, own in labels.items()}
  table = {
    str(name): {
      "kid": scores.plain(found["kid"])[c],
      "diversity": scores.plain(found["diversity"])[c],
      "generated": int(counts["generated"][c]),
      "real": int(counts["reference"][c]),
    }
    for c, name in enumerate(classes)
  }
  metrics = {"diversity": _mean(found["diversity"]), "kid_of_classes": _mean(found["kid"])}
  if train:
    own = _numbered(image_sets.read_labels(train), classes, train, paths["reference"])
    numbers = np.bincount(own, minlength=len(classes))
    metrics |= image_quality.by_group(*sides, scores.make_groups(numbers))
    for c, name in enumerate(classes):
      table[str(name)]["train"] = int(numbers[c])
  return metrics, table


def _mean(values: np.ndarray) -> float:
  """Over classes with images enough; NaN if there is none."""
  known = values[np.isfinite(values)]
  return float(known.mean()) if len(known) else float("nan")


def memorisation(generated: ImageSet, train: ImageSet) -> dict[str, float]:
  """{"copied": the share of generated images that are nearly one training image}.

  Raises:
    DataError: if the images differ in size, or there are fewer than two in training.
  """
  pixels = [np.concatenate(list(images.blocks(0))) for images in (generated, train)]
  if pixels[0].shape[1:] != pixels[1].shape[1:]:
    sizes = " and ".join(f"{x.shape[2]} x {x.shape[1]}" for x in pixels)
    raise DataError(
      f"The images of {generated.path} and {train.path} are {sizes} pixels; copies can only be told"
      " among images of one size."
    )
  if len(train) < 2:
    raise DataError(f"{train.path} holds one image; copies can only be told among two or more.")
  return {"copied": float(image_quality.nearest(*pixels).copied.mean())}
