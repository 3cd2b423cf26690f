"""Asks a classifier about many inputs, on all devices, and writes what it says as a table."""

import contextlib
import csv
import dataclasses
import io
import pathlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from input_pipeline.new_inputs import ArrayInputs, ImageInputs
from memdiff.errors import ConfigError, DataError, WorkdirError
from memdiff.prediction.classifier import Classifier
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.workdir import write_atomically

SUFFIXES = (".csv", ".parquet")
_IMAGES, _ROWS = 256, 4096  # inputs at a time


@dataclasses.dataclass(frozen=True)
class Predictions:
  """The most probable classes of N inputs.

  Attributes:
    classes: [N, k] int, the most probable first.
    probabilities: [N, k] float32.
    errors: number of an input -> why it has no classes.
  """

  classes: np.ndarray
  probabilities: np.ndarray
  errors: dict[int, str]


def predict(
  classifier: Classifier,
  inputs: ImageInputs | ArrayInputs,
  mesh: Mesh,
  top: int,
  done: Callable[[int], None] = lambda number: None,
) -> Predictions:
  """The `top` most probable classes of every input, fewer if there are fewer classes.

  Args:
    classifier: see there.
    inputs: of its shape.
    mesh: inputs are split over it.
    top: k.
    done: is told how many inputs are done.
  """
  top = min(top, len(classifier.class_names))
  weights = mesh_lib.replicate(mesh, classifier.weights)

  @jax.jit
  def best(weights, chunk):
    probabilities = jnp.exp(classifier.log_probabilities(weights, chunk))
    return jax.lax.top_k(probabilities, top)

  size = _IMAGES if classifier.takes_images else _ROWS
  size = -(-min(size, len(inputs)) // mesh.size) * mesh.size
  found = []
  for start in range(0, len(inputs), size):
    chunk = mesh_lib.place_rows(mesh, inputs, start, size)
    number = min(size, len(inputs) - start)
    found.append([x[:number] for x in mesh_lib.fetch(best(weights, chunk))])
    done(start + number)
  probabilities, classes = (np.concatenate(parts) for parts in zip(*found, strict=True))
  return Predictions(classes, probabilities, dict(inputs.errors))


def table(
  classifier: Classifier, inputs: ImageInputs | ArrayInputs, predictions: Predictions
) -> dict[str, list]:
  """Columns: path, or row from 0; class, probability, class_2, probability_2, ...; error."""
  number = len(inputs)
  columns = {"row": list(range(number))}
  if inputs.paths is not None:
    columns = {"path": [str(path) for path in inputs.paths]}
  names, errors = classifier.class_names, predictions.errors
  for k in range(predictions.classes.shape[1]):
    end = f"_{k + 1}" if k else ""
    of_rank = zip(predictions.classes[:, k], predictions.probabilities[:, k], strict=True)
    said = [None if i in errors else (names[c], float(p)) for i, (c, p) in enumerate(of_rank)]
    columns[f"class{end}"] = [pair and pair[0] for pair in said]
    columns[f"probability{end}"] = [pair and pair[1] for pair in said]
  return columns | {"error": [errors.get(i) for i in range(number)]}


def check_output(path: pathlib.Path) -> None:
  """Raises ConfigError if a table cannot be written there, before any work."""
  if path.suffix.lower() not in SUFFIXES:
    raise ConfigError(f"--output is {path}, but must end in one of {', '.join(SUFFIXES)}.")
  if not path.parent.is_dir():
    raise ConfigError(f"--output is {path}, but there is no folder {path.parent}.")


def write(path: pathlib.Path, columns: dict[str, list]) -> None:
  """Writes a table as .csv or .parquet; what is None stays empty.

  Raises:
    DataError: if it cannot be written.
  """
  as_bytes = _parquet if path.suffix.lower() == ".parquet" else _csv
  with writing_output():
    write_atomically(path, as_bytes(columns))


@contextlib.contextmanager
def writing_output() -> Iterator[None]:
  """Says of an output that cannot be written what is wrong; there is no run to start again."""
  try:
    yield
  except WorkdirError as error:
    cause = error.__cause__
    raise DataError(f"Cannot write {cause.filename} ({cause.strerror}).") from error


def _parquet(columns: dict[str, list]) -> bytes:
  from input_pipeline import parquet_files  # Arrow takes its time to load

  if "path" in columns:  # of names that are no UTF-8
    paths = [path.encode(errors="backslashreplace").decode() for path in columns["path"]]
    columns = columns | {"path": paths}
  return parquet_files.table_bytes(columns)


def _csv(columns: dict[str, list]) -> bytes:
  text = io.StringIO(newline="")
  writer = csv.writer(text)
  writer.writerow(columns)
  writer.writerows(zip(*columns.values(), strict=True))
  return text.getvalue().encode(errors="surrogateescape")
