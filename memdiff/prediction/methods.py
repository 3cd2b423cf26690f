"""The classifier of each method of a finished run, read from what the run has left."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from memdiff.classifier import decoupled, encoder, encoder_training
from memdiff.classifier.priors import log_prior, log_shares
from memdiff.evaluation.method import Method
from memdiff.experiments import augmented_settings, feature_heads, fitted
from memdiff.experiments.augmented_runs import PREDICTIONS
from memdiff.experiments.augmented_settings import Row, Training
from memdiff.experiments.feature_scores import JOINT
from memdiff.experiments.methods import OWN
from memdiff.fitting.heads import Head
from memdiff.fitting.selection import BLEND
from memdiff.prediction.classifier import Classifier, Weights
from memdiff.prediction.finished import FinishedRun
from memdiff.runtime import results
from memdiff.runtime.workdir import read_arrays

_NOTHING = Weights(**dict.fromkeys(field.name for field in dataclasses.fields(Weights)))


def load(run: FinishedRun, method: str, seeds: Sequence[int], mesh: Mesh) -> Classifier:
  """The classifier of a method.

  Args:
    run: see there.
    method: one of its methods.
    seeds: numbers of the seeds whose models are averaged, from 0.
    mesh: the device mesh.

  Raises:
    WorkdirError: if a file is missing or damaged.
  """
  weights, more = _READERS[run.report["experiment"]](run, Method(method), mesh)
  chosen = jax.tree.map(lambda x: _of_seeds(np.asarray(x), seeds), weights)
  calibration = run.calibration(method)
  chosen = chosen.replace(temperature=np.float32(calibration["temperature"] or 1.0))
  takes = run.report["input"]
  if "features" in takes:
    shape, margin = (takes["features"],), 1.0
  else:
    shape, margin = tuple(takes["image_shape"]), takes["margin"]
    pixels = {name: np.array(takes[name], np.float32) for name in ("pixel_mean", "pixel_std")}
    chosen = chosen.replace(pixels=pixels)
  return Classifier(
    method=method,
    description=run.description(method),
    class_names=run.class_names,
    input_shape=shape,
    margin=margin,
    calibration=calibration,
    weights=chosen,
    **more,
  )


def _of_seeds(array: np.ndarray, seeds: Sequence[int]) -> np.ndarray:
  """Of arrays that lead with seeds; one of length 1 is that of all."""
  return array[[seed % len(array) for seed in seeds]]


# --- networks --------------------------------------------------------------------------------


def _network(run: FinishedRun, folder: str, loss: str, mesh: Mesh) -> tuple[Weights, dict]:
  """A whole classifier of images, and what Classifier needs beside its weights.

  It computes in float32, so that programs for all platforms agree, whatever it was trained in.
  """
  state = results.load(run.folder(folder), mesh)
  variables = {"params": state.params, "batch_stats": state.model_state}
  backbone = dataclasses.replace(run.settings.encoder.backbone, dtype="float32")
  settings = dataclasses.replace(run.settings.encoder, backbone=backbone)
  model = encoder.make_model(settings, loss, len(run.class_names))
  return _NOTHING.replace(network=variables), {"network": model, "input": settings.input}


def _lowered(offset: np.ndarray, weights: Weights) -> Weights:
  """With logits that are lowered by `offset` [C] or [S, C]."""
  return weights.replace(offset=np.asarray(offset, np.float32).reshape(-1, offset.shape[-1]))


def _prior_of_data(run: FinishedRun) -> np.ndarray:
  return log_prior(np.array(run.report["dataset"]["train_counts"]))


# --- experiments on features -----------------------------------------------------------------


def _of_features(run: FinishedRun, method: Method, mesh: Mesh) -> tuple[Weights, dict]:
  """A head on embeddings."""
  return _with_head(run, method, _NOTHING, {})


def _of_memdiff(run: FinishedRun, method: Method, mesh: Mesh) -> tuple[Weights, dict]:
  """An encoder with its own head, with a new one, or trained together with one."""
  source, joint = method.generator, f"{JOINT}:"
  if source.startswith(joint):
    return _network(run, f"joint/{source.removeprefix(joint)}", method.loss, mesh)
  loss = run.settings.classifier.loss
  if source == OWN or source.startswith(f"{OWN}:"):
    loss = source.partition(":")[2] or loss
    weights, more = _network(run, f"classifier/{loss}", loss, mesh)
    if method.loss == "logit_adjustment":
      chosen = run.choice(Method.of(OWN, method.loss))
      tau = chosen.get("tau", run.settings.head.taus[0])
      weights = _lowered(tau * _prior_of_data(run), weights)
    return weights, more
  return _with_head(run, method, *_network(run, f"classifier/{loss}", loss, mesh))


def _with_head(
  run: FinishedRun, method: Method, weights: Weights, more: dict
) -> tuple[Weights, dict]:
  """With the head that the run has trained or fitted for a method."""
  folder, settings = run.folder("heads"), run.settings.head
  scale = read_arrays(folder / feature_heads.STANDARDIZER, ("mean", "scale"))
  weights = weights.replace(standardizer=scale)
  of_fitted = fitted.Fitted(**run.report["fitted"])
  if method in of_fitted.methods:
    return _with_fitted(folder, of_fitted, method, weights, more)
  of_losses = feature_heads.read_heads(
    folder / method.generator, settings.losses, len(run.settings.seeds)
  )
  head = dict(of_losses[method.loss])
  prior = head.pop("prior")
  if method.loss == "logit_adjustment":
    chosen = run.choice(method) or run.choice(Method.of("real", method.loss))
    weights = _lowered(chosen.get("tau", settings.taus[0]) * log_shares(prior), weights)
  return weights.replace(head=head), more


def _with_fitted(
  folder: pathlib.Path, of_fitted: fitted.Fitted, method: Method, weights: Weights, more: dict
) -> tuple[Weights, dict]:
  """With one family of heads, or with the blend of all."""
  of_runs = fitted.load_heads(folder)
  names = of_fitted.parts(method)
  arrays = {name: _stacked([of_run[name] for of_run in of_runs]) for name in names}
  weights = weights.replace(fitted=arrays)
  if method.loss == BLEND:
    shares = np.array([of_fitted.weights[name] for name in names], np.float32)
    weights = weights.replace(blend=shares[None])
  kinds = {name: type(of_runs[0][name]).__name__ for name in names}
  return weights, more | {"fitted": kinds}


def _stacked(runs: Sequence[Head]) -> dict[str, np.ndarray]:
  """The arrays of the same head of several runs; leading with runs.

  Gaussians of different runs may have different numbers of directions. Missing ones are filled up
  by directions along which all classes are alike: no kernel, one mean, variance 1.
  """
  found = {}
  for field in dataclasses.fields(runs[0]):
    parts = [np.asarray(getattr(head, field.name), np.float32) for head in runs]
    if parts[0].ndim == 2:
      width, alike = max(part.shape[1] for part in parts), float(field.name == "variances")
      parts = [
        np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=alike) for part in parts
      ]
    found[field.name] = np.stack(parts)
  return found


# --- classification --------------------------------------------------------------------------


def _of_classification(run: FinishedRun, method: Method, mesh: Mesh) -> tuple[Weights, dict]:
  """A classifier, or its encoder with a head that was made afterwards."""
  if method in encoder_training.trained_losses(run.settings.classifier):
    return _network(run, f"classifier/{method}", str(method), mesh)
  loss, kind = method.generator, method.loss
  weights, more = _network(run, f"classifier/{loss}", loss, mesh)
  if kind == "logit_adjustment":
    return _lowered(run.choice(method)["tau"] * _prior_of_data(run), weights), more
  own = weights.network["params"]["head"]
  if kind == "ncm":
    means = read_arrays(run.folder("features") / f"{loss}.npz", ("class_means",))["class_means"]
    means = means / np.maximum(np.linalg.norm(means, axis=-1, keepdims=True), 1e-12)
    head, more = _without_bias(means.swapaxes(1, 2)), more | {"by_cosine": True}
  elif kind == "tau_norm":
    kernel = np.asarray(own["kernel"])
    lengths = np.maximum(np.linalg.norm(kernel, axis=1, keepdims=True), 1e-12)
    head = _without_bias(kernel / lengths ** run.choice(method)["tau"])
  elif kind in decoupled.TRAINED:
    trained = results.load(run.folder("heads") / kind, mesh).params
    head = trained
    if kind == "lws":
      scale = trained["scale"]
      head = {"kernel": own["kernel"] * scale[:, None], "bias": own["bias"] * scale}
  return weights.replace(head=head), more


def _without_bias(kernel: np.ndarray) -> dict[str, np.ndarray]:
  return {"kernel": kernel, "bias": np.zeros(kernel.shape[::2], kernel.dtype)}


# --- generated images ------------------------------------------------------------------------


def _of_augmented(run: FinishedRun, method: Method, mesh: Mesh) -> tuple[Weights, dict]:
  """A classifier of real and generated images."""
  row = Row.named(method.generator)
  chosen = run.choice(method)
  if chosen:
    choice = augmented_settings.Choice(**chosen)
  else:
    choice = augmented_settings.candidates(run.settings, row, method.loss)[0]
  training = choice.training(method.loss)
  folder = f"classifiers/final/{row.name}/{training.name}"
  if row.head_only:
    real = f"classifiers/final/{Row(augmented_settings.REAL).name}/{Training(training.loss).name}"
    weights, more = _network(run, real, training.loss, mesh)
    head = results.load(run.folder(folder), mesh).params
    params = weights.network["params"] | {"head": head}
    weights = weights.replace(network=weights.network | {"params": params})
  else:
    weights, more = _network(run, folder, training.loss, mesh)
  if choice.tau:
    counts = read_arrays(run.folder(folder) / PREDICTIONS, (choice.counts,))[choice.counts]
    weights = _lowered(choice.tau * np.stack([log_prior(c) for c in counts]), weights)
  return weights, more


_READERS: Mapping[str, Callable[[FinishedRun, Method, Mesh], tuple[Weights, dict[str, Any]]]] = {
  "features": _of_features,
  "memdiff": _of_memdiff,
  "classification": _of_classification,
  "augmented": _of_augmented,
}
