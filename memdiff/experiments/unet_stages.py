"""The trainings of U-Nets: from the beginning, or tuning what was trained before."""

import dataclasses
import pathlib

import jax
import numpy as np

from memdiff.experiments import prompting
from memdiff.experiments.base import Experiment
from memdiff.experiments.drawer import class_directions
from memdiff.runtime import loop, results
from memdiff.runtime import mesh as mesh_lib
from memdiff.synthesis import image_methods, pixel_data, pixel_diffusion, pixel_tuning
from memdiff.synthesis.pixel_data import ImageData


def make_stage(
  experiment: Experiment,
  method: str,
  folder: pathlib.Path,
  shared: ImageData,
  rows: np.ndarray | None = None,
) -> loop.Stage:
  """A training of `image_methods.trainings`; all of them draw the same noise.

  Args:
    experiment: the experiment.
    method: what is trained, or tuned if the training of its base has ended.
    folder: which holds a folder of each training.
    shared: the training images.
    rows: [R, N] which of them each run learns from, -1 if it has fewer; None: all runs from all.
  """
  data, mesh = experiment.dataset, experiment.mesh
  config = image_methods.apply(method, experiment.config.diffusion)
  parts = None
  if rows is not None:
    parts = pixel_data.make_parts(
      config.class_exponent, data.train_labels, rows, data.num_classes, mesh
    )
  kind, counts = image_methods.tuning(method), data.train_counts
  if not kind:
    stage = pixel_diffusion.make_stage(config, shared, counts, mesh, parts)
    return dataclasses.replace(stage, streams="diffusion")
  params = results.load(folder / image_methods.base(method), mesh).ema_params
  if kind == pixel_tuning.SENTENCES:
    params = params | {kind: _first_sentences(experiment, rows)}
  stage = pixel_diffusion.make_tuning_stage(config, kind, params, shared, counts, mesh, parts)
  return dataclasses.replace(stage, streams="tuning")


def _first_sentences(experiment: Experiment, rows: np.ndarray | None) -> jax.Array:
  """What the captions of each class mean, which tuning begins from. [R, C, D]."""
  data, vectors = experiment.dataset, prompting.caption_vectors(experiment)
  if rows is None:
    rows = np.tile(np.arange(len(vectors)), (len(experiment.seeds), 1))
  found = []
  for known in rows:
    known = known[known >= 0]
    found.append(class_directions(vectors[known], data.train_labels[known], data.num_classes))
  return mesh_lib.replicate(experiment.mesh, np.stack(found).astype(np.float32))
