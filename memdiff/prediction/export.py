"""Writes a classifier as files that work without memdiff.

weights.safetensors    every number of the classifier, by name
classifier.stablehlo   the program (weights, inputs) -> log probabilities, of jax.export
model.json             classes, what the inputs are, temperature, where it comes from
README.md              the model card: what it is for, how good it is, its limits, how to use it
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from flax import serialization, traverse_util

from memdiff.errors import ConfigError
from memdiff.prediction import card
from memdiff.prediction.classifier import Classifier, Weights
from memdiff.prediction.finished import FinishedRun
from memdiff.prediction.predict import writing_output
from memdiff.runtime.workdir import write_atomically, write_json, writing

PROGRAM, WEIGHTS, DESCRIPTION = "classifier.stablehlo", "weights.safetensors", "model.json"
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def write(folder: pathlib.Path, run: FinishedRun, classifier: Classifier) -> list[str]:
  """Writes all files into a folder, which is made if it is not there.

  Returns:
    Their names.

  Raises:
    ConfigError: if the folder holds something else.
    DataError: if they cannot be written.
  """
  files = {
    WEIGHTS: safetensors.numpy.save(flat_weights(classifier.weights)),
    PROGRAM: bytes(program(classifier).serialize()),
    "README.md": card.render(run, classifier).encode(errors="backslashreplace"),
  }
  known = {*files, DESCRIPTION}
  if folder.exists() and not folder.is_dir():
    raise ConfigError(f"--output is {folder}, which is a file; give a folder.")
  others = {path.name for path in folder.iterdir()} - known if folder.exists() else set()
  if others:
    raise ConfigError(
      f"--output is {folder}, which holds other files ({sorted(others)[0]}); give a new folder."
    )
  with writing_output():
    with writing(folder):
      folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
      write_atomically(folder / name, data)
    write_json(folder / DESCRIPTION, description(run, classifier))
  return sorted(known)


def flat_weights(weights: Weights) -> dict[str, np.ndarray]:
  """By names such as `network/params/head/kernel`, as the program takes them."""
  tree = {name: x for name, x in serialization.to_state_dict(weights).items() if x is not None}
  return {
    name: np.array(x, order="C") for name, x in traverse_util.flatten_dict(tree, sep="/").items()
  }


def program(classifier: Classifier) -> jax.export.Exported:
  """The jitted (flat weights, inputs [B, ...]) -> log probabilities [B, C], for any B."""
  flat = flat_weights(classifier.weights)

  def log_probabilities(flat: Mapping[str, jax.Array], inputs: jax.Array) -> jax.Array:
    tree = traverse_util.unflatten_dict(dict(flat), sep="/")
    missing = dict.fromkeys(vars(classifier.weights))
    return classifier.log_probabilities(Weights(**missing | tree), inputs)

  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), flat)
  (batch,) = jax.export.symbolic_shape("batch")
  inputs = jax.ShapeDtypeStruct((batch, *classifier.input_shape), classifier.input_dtype)
  return jax.export.export(jax.jit(log_probabilities), platforms=PLATFORMS)(shapes, inputs)


def description(run: FinishedRun, classifier: Classifier) -> dict[str, Any]:
  """model.json."""
  if classifier.takes_images:
    height, width, channels = classifier.input_shape
    inputs = {
      "kind": "images",
      "dtype": "uint8",
      "shape": ["batch", height, width, channels],
      "channels": "RGB" if channels == 3 else "grey",
      "resize_shorter_side_to": round(min(height, width) * classifier.margin),
      "resize_filter": "bilinear, antialiased",
      "then": "cut out the centre",
      "ground_of_transparent_images": "white",
    }
  else:
    inputs = {"kind": "features", "dtype": "float32", "shape": ["batch", *classifier.input_shape]}
  return {
    "classes": list(classifier.class_names),
    "inputs": inputs,
    "outputs": {"kind": "log probabilities", "shape": ["batch", len(classifier.class_names)]},
    "temperature": float(classifier.weights.temperature),
    "method": classifier.method,
    "description": classifier.description,
    "models_averaged": classifier.weights.num_models,
    "run": {name: run.report[name] for name in ("name", "command", "versions")},
    "data": {name: run.report["dataset"][name] for name in ("name", "split_sha256", "sha256")},
  }
