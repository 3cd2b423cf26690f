"""Files of generated images with what is known of where they come from.

A file is a .npz with the arrays

  version        [] whole number, VERSION
  images         [M, H, W, ch] uint8, as large as those of the data set
  labels         [M] their classes, by number
  class_names    [C] of the data set, in order
  learned_from   the training images that the generator was trained on, by number; of length 0 if
                 it has never seen the data set
  train_sha256   [] of the split that these numbers belong to; "" if there are none

and others, of which `confidence` [M], from 0 on, is read: how far each image is trusted. `write`
makes such a file.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from input_pipeline.dataset import LongTailDataset
from memdiff.errors import DataError, MemdiffError
from memdiff.runtime.workdir import read_arrays, write_arrays

VERSION = 1
_NEEDED = ("version", "images", "labels", "class_names", "learned_from", "train_sha256")


@dataclasses.dataclass(frozen=True, eq=False)
class ImagePoolFile:
  """Images of a file, with what decides how they may be used.

  Attributes:
    images: [M, H, W, ch] uint8.
    labels: [M].
    confidence: [M], one for images of which none is known.
    learned_from: training images that the generator has seen.
  """

  images: np.ndarray
  labels: np.ndarray
  confidence: np.ndarray
  learned_from: np.ndarray


def provenance(
  class_names: Sequence[str], learned_from: np.ndarray, train_sha256: str
) -> dict[str, np.ndarray]:
  """The arrays of a file that speak of all its images."""
  return {
    "version": np.array(VERSION),
    "class_names": np.array(class_names),
    "learned_from": np.asarray(learned_from, np.int32),
    "train_sha256": np.array(train_sha256),
  }


def write(
  path: str | pathlib.Path,
  images: np.ndarray,
  labels: np.ndarray,
  class_names: Sequence[str],
  *,
  learned_from: Sequence[int] = (),
  train_sha256: str = "",
  **others: np.ndarray,
) -> None:
  """Writes images that were made elsewhere, so that a run can train on them.

  Args:
    path: of the .npz file.
    images: [M, H, W, ch] uint8, as large as those of the data set.
    labels: [M] whole numbers from 0 to C - 1.
    class_names: C names, those of the data set in its order.
    learned_from: numbers of the training images that the generator was trained on.
    train_sha256: of their split, as in a run's report.json; needed if there are any.
    others: arrays to keep beside them.
  """
  about = provenance(class_names, np.array(learned_from, np.int32), train_sha256)
  write_arrays(pathlib.Path(path), {"images": images, "labels": labels} | about | others)


def never_saw_the_data(path: str) -> bool:
  """Whether the generator of a file knows no image of the data set."""
  return len(_arrays(path, ("learned_from",))["learned_from"]) == 0


def read(path: str, data: LongTailDataset) -> ImagePoolFile:
  """The images of a file for the classes of a data set.

  Raises:
    DataError: if it cannot be read, holds no image, or does not fit the data set: other classes,
      another size, or a generator that was trained on another split of it.
  """
  arrays = _arrays(path)
  if missing := [name for name in _NEEDED if name not in arrays]:
    raise DataError(
      f"{path} has no array {missing[0]}; memdiff.synthesis.image_pool.write makes files that can"
      " be read."
    )
  if arrays["version"] != VERSION:
    raise DataError(
      f"{path} is of version {arrays['version']}, but this memdiff reads version {VERSION}."
    )
  labels, learned_from = arrays["labels"], arrays["learned_from"]
  _check_images(path, arrays, data)
  if len(learned_from) and str(arrays["train_sha256"]) != data.split_sha256:
    raise DataError(
      f"The images in {path} were generated from another split of the data, which may train on what"
      " is test data here; generate them from this one."
    )
  confidence = np.asarray(arrays.get("confidence", np.ones(len(labels))), float)
  if confidence.shape != labels.shape or not (confidence >= 0).all():
    raise DataError(f"The confidence in {path} must be a number from 0 for each image.")
  return ImagePoolFile(arrays["images"], labels.astype(np.int32), confidence, learned_from)


def _arrays(path: str, names: Sequence[str] | None = None) -> Mapping[str, np.ndarray]:
  try:
    return read_arrays(pathlib.Path(path), names)
  except MemdiffError as error:
    cause = error.__cause__
    raise DataError(f"Cannot read the images in {path}: {cause}.") from cause


def _check_images(path: str, arrays: Mapping[str, np.ndarray], data: LongTailDataset) -> None:
  images, labels, names = (arrays[name] for name in ("images", "labels", "class_names"))
  if images.dtype != np.uint8 or images.ndim != 4 or labels.shape != images.shape[:1]:
    raise DataError(
      f"The images in {path} must be uint8 [M, H, W, channels] with a label each, but they are"
      f" {images.dtype} {list(images.shape)}, and the labels {list(labels.shape)}."
    )
  if not len(images):
    raise DataError(f"{path} holds no image; leave it out.")
  shape = data.train_images.shape[1:]
  if images.shape[1:] != shape:
    ours, theirs = (f"{h} x {w} pixels, {ch} channels" for h, w, ch in (shape, images.shape[1:]))
    raise DataError(f"The images in {path} are {theirs}, but those of the data set {ours}.")
  if names.tolist() != list(data.class_names):
    raise DataError(
      f"The classes in {path} are not those of the data set: {_some(names.tolist())} against"
      f" {_some(data.class_names)}; it must have the same ones in the same order."
    )
  if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= len(names):
    raise DataError(f"The labels in {path} must be whole numbers from 0 to {len(names) - 1}.")


def _some(names: Sequence[str]) -> str:
  return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
