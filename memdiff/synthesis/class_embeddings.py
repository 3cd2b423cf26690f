"""Embeddings of classes, however they are given."""

import collections
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from memdiff.errors import WorkdirError
from memdiff.runtime.workdir import read_arrays

NAMES = "names"
_ARRAYS = ("names", "embeddings")
_MOST_COMPONENTS = 32


def of_classes(given: Any, classes: np.ndarray) -> np.ndarray:
  """Embeddings [C, E] in the order of `classes` [C].

  Args:
    given: an array [C, E] in that order; {label: embedding}; the path of a .npz file with `names`
      and `embeddings`; or "names": the labels are texts, which a sentence encoder reads.
    classes: the labels, in the order that is wanted.

  Raises:
    ValueError: if a class has none, or they are no finite numbers of one length.
    DataError: if the sentence encoder is not installed.
  """
  if isinstance(given, str) and given == NAMES:
    return _of_names(classes)
  if isinstance(given, (str, pathlib.Path)):
    given = _of_file(pathlib.Path(given), as_texts=classes.dtype.kind == "U")
  if isinstance(given, Mapping):
    missing = [label for label in classes.tolist() if label not in given]
    if missing:
      raise ValueError(
        f"class_embeddings has none for {len(missing)} classes, for example {missing[0]!r}."
      )
    given = [given[label] for label in classes.tolist()]
  try:
    found = np.array(given, np.float64)
  except (TypeError, ValueError):
    found = np.zeros(0)
  if found.ndim != 2 or len(found) != len(classes):
    raise ValueError(
      f"class_embeddings must be one row of numbers for each of the {len(classes)} classes, all of"
      " one length."
    )
  if not np.isfinite(found).all():
    raise ValueError("class_embeddings has a NaN or an infinity.")
  return found


def components(embeddings: np.ndarray) -> np.ndarray:
  """Principal components of embeddings [C, E] over the classes, as a denoiser reads them.

  Returns:
    [C, K + 1] float32, K at most 32: components with a mean square of 1 over all, and a column of
    ones, which is 0 where nothing is told of a class.
  """
  away = embeddings - embeddings.mean(axis=0, keepdims=True)
  left, lengths, _ = np.linalg.svd(away, full_matrices=False)
  found = (left * lengths[None])[:, :_MOST_COMPONENTS]
  size = np.sqrt(np.square(found).mean()) or 1.0
  return np.pad(found / size, ((0, 0), (0, 1)), constant_values=1).astype(np.float32)


def check(given: Any, classes: np.ndarray) -> None:
  """Raises what `of_classes` would, at once: of names, it only looks for the sentence encoder."""
  if isinstance(given, str) and given == NAMES:
    _words(classes)
    _sentence_encoder()
  else:
    of_classes(given, classes)


def _of_file(path: pathlib.Path, *, as_texts: bool) -> dict[Any, np.ndarray]:
  try:
    names, embeddings = read_arrays(path, _ARRAYS).values()
  except WorkdirError as error:
    raise ValueError(
      f"class_embeddings is {path}, which cannot be read ({error.__cause__}); it must be"
      f" {NAMES!r} or a .npz file with {' and '.join(_ARRAYS)}."
    ) from error
  if names.ndim != 1 or embeddings.ndim != 2 or len(names) != len(embeddings):
    raise ValueError(
      f"class_embeddings is {path}, which must have one name and one row of embeddings for each"
      f" class, but has names {list(names.shape)} and embeddings {list(embeddings.shape)}."
    )
  keys = [str(name) if as_texts else name for name in names.tolist()]
  name, number = collections.Counter(keys).most_common(1)[0] if keys else ("", 0)
  if number > 1:
    raise ValueError(f"class_embeddings is {path}, which names {name!r} {number} times.")
  return dict(zip(keys, embeddings, strict=True))


def _of_names(classes: np.ndarray) -> np.ndarray:
  from memdiff.synthesis.text_to_image import sentences  # only if they are asked for

  words = _words(classes)
  return sentences.embed(_sentence_encoder(), words).astype(np.float64)


def _sentence_encoder() -> Any:
  from memdiff.synthesis.text_to_image import sentences

  return sentences.load("minilm", "")


def _words(classes: np.ndarray) -> list[str]:
  """Names of classes as texts to read."""
  labels = classes.tolist()
  if not all(isinstance(label, str) and not label.isdigit() for label in labels):
    raise ValueError("class_embeddings is 'names', but not all classes have words as names.")
  return [label.replace("_", " ").replace("-", " ") for label in labels]
