"""The figures of a run that generates images."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from memdiff.evaluation import image_quality, networks
from memdiff.experiments import bottlenecks, prompting, record
from memdiff.experiments.base import Experiment
from memdiff.experiments.image_store import read_drawn, read_samples, sample_folder
from memdiff.synthesis import image_methods

if TYPE_CHECKING:
  from matplotlib.figure import Figure

_REAL, _GENERATED = 5, 9  # images per class in a grid
_MAPS = 4  # methods whose bottlenecks are drawn; t-SNE takes seconds
_SWEPT = ("fd", "kid", "recall", "right")
_COSINES = {
  "test intra_cosine": "cosine of bottlenecks within a class",
  "test inter_cosine": "cosine of bottlenecks of two classes",
}


def draw(experiment: Experiment, result: Mapping[str, Any]) -> Iterator[tuple[str, "Figure"]]:
  """(name, figure), in the order of the page."""
  from memdiff.evaluation import plots  # matplotlib takes a second

  data, found = experiment.dataset, result["images"]
  nothing = np.zeros(data.num_classes, int)
  yield (
    "long_tail_profile",
    plots.long_tail_profile(
      data.class_names, data.train_counts, nothing, record.group_of_class(experiment)
    ),
  )
  for row in found["rows"]:
    yield f"samples_{row['method']}", _grid(experiment, row["method"], row["scale"])
    folder = sample_folder(experiment, row["method"], row["scale"], 0)
    drawn = read_drawn(folder)
    if "prompt" in drawn:
      yield f"prompts_{row['method']}", prompting.draw_sheet(experiment, row["method"], drawn)
  for row in found["rows"][:_MAPS]:
    yield f"bottleneck_{row['method']}", bottlenecks.draw(experiment, row["method"], row["scale"])
  kids = [
    (row["method"], _numbers(row["per_class_kid"], "mean"), _numbers(row["per_class_kid"], "std"))
    for row in found["rows"]
  ]
  yield (
    "kid_by_class",
    plots.by_class(
      "Distance from real images by class, from the most to the fewest training examples",
      "kernel distance (KID), lower is better",
      data.class_names,
      data.train_counts,
      kids,
    ),
  )
  if found["sweep"]:
    yield (
      "guidance_sweep",
      plots.sweep(_panels(found["sweep"], found["network"]), "guidance scale (1: none)"),
    )
  trained = image_methods.trainings(experiment.config.methods)
  stages = [f"diffusion/{method}" for method in trained]
  curves = record.training_curves(experiment, stages)
  cosines = [curve for curve in curves if curve["metric"] in _COSINES]
  if cosines:
    yield "class_cosines", plots.sweep(_cosine_panels(cosines), "training step")
  if losses := [curve for curve in curves if curve["metric"] not in _COSINES]:
    yield "training_curves", plots.training_curves(losses)


def _numbers(stat: Mapping[str, Any], key: str) -> np.ndarray:
  return np.array(stat[key], float)  # None becomes NaN


def _panels(sweep, network: str) -> list:
  titles = {"kid": "KID", "recall": "recall", "right": "right class"}
  titles["fd"] = networks.distance_title(network)
  panels = []
  for key in _SWEPT:
    rows = []
    for method in dict.fromkeys(row["method"] for row in sweep):
      own = [row for row in sweep if row["method"] == method and key in row]
      if own:
        scales = np.array([row["scale"] for row in own])
        order = scales.argsort()
        means, stds = (np.array([row[key][k] for row in own], float) for k in ("mean", "std"))
        rows.append((method, scales[order], means[order], stds[order]))
    if rows:
      panels.append((titles[key], rows))
  return panels


def _cosine_panels(curves: Sequence[Mapping[str, Any]]) -> list:
  return [
    (
      title,
      [
        (curve["stage"].removeprefix("diffusion/"), np.array(curve["step"]), curve["mean"],
         curve["std"])
        for curve in curves
        if curve["metric"] == metric
      ],
    )
    for metric, title in _COSINES.items()
  ]  # fmt: skip


def _grid(experiment: Experiment, method: str, scale: float) -> "Figure":
  """Real training images, the first generated ones, and the training image nearest to each."""
  from memdiff.evaluation import plots

  data = experiment.dataset
  images, labels = read_samples(sample_folder(experiment, method, scale, 0))
  real, generated, nearest = [], [], []
  for c in plots.shown_classes(data.train_counts):
    rows = images[labels == c][:_GENERATED]
    real.append(data.train_images[data.train_labels == c][:_REAL])
    generated.append(rows)
    nearest.append(data.train_images[image_quality.nearest(rows, data.train_images).index])
  names = [
    f"{data.class_names[c]} ({data.train_counts[c]:,})"
    for c in plots.shown_classes(data.train_counts)
  ]
  return plots.sample_grid(
    method,
    names,
    (
      ("training images", real, _REAL),
      ("generated", generated, _GENERATED),
      ("nearest training image of each", nearest, _GENERATED),
    ),
  )
