"""The map of features: real, left-out and synthetic ones on one plane."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import threadpoolctl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

from memdiff.evaluation.plots.style import (
  CLASS_COLORS,
  INK,
  MUTED,
  legend_below,
  new_figure,
  short,
  style,
)

KINDS = ("real, used in training", "real, left out of training", "synthetic")
_MAX_MAP_COLORS = len(CLASS_COLORS)
_MAX_BACKGROUND_POINTS = 1500
_TSNE_STEPS = 500  # of which 250 with early exaggeration; later ones hardly move the picture


@dataclasses.dataclass(frozen=True)
class FeaturePlane:
  """Features of three kinds, real, left out and synthetic, and a background, on one plane."""

  points: list[np.ndarray]  # [N_i, 2] of each kind, the background last
  labels: list[np.ndarray]  # [N_i] of the three kinds
  classes: np.ndarray  # those that are in colour


Labelled = tuple[ArrayLike, ArrayLike]  # features and their classes


def embed(
  real: Labelled,
  left_out: Labelled,
  synthetic: Labelled,
  num_classes: int,
  seed: int = 0,
  max_per_class: int = 60,
) -> FeaturePlane:
  """A joint t-SNE of real, left-out and synthetic features.

  Each kind of each class is thinned to `max_per_class` features; the same arguments give the same
  plane. With more than ten classes, colour goes to the ten with the fewest real features among
  those that have synthetic ones, and a sample of the other classes' real features stays as
  background.

  Args:
    real: features [N, D] of training examples and their classes [N].
    left_out: [M, D] and [M], real features that training never saw.
    synthetic: [S, D] and [S].
    num_classes: C.
    seed: chooses the features that are shown and starts t-SNE.
    max_per_class: the most features shown per kind and class.
  """
  kinds = [_finite_rows(*kind) for kind in (real, left_out, synthetic)]
  shown = _classes_in_colour(kinds[0][1], kinds[2][1], num_classes)
  chosen = [_thin(y, shown, max_per_class, (seed, kind)) for kind, (_, y) in enumerate(kinds)]
  background = _background(kinds[0][1], shown, seed)
  picked = [x[rows] for (x, _), rows in zip(kinds, chosen, strict=True)]
  points = _embed([*picked, kinds[0][0][background]], seed)
  return FeaturePlane(points, [y[rows] for (_, y), rows in zip(kinds, chosen, strict=True)], shown)


def feature_map(
  plane: FeaturePlane,
  class_names: Sequence[str],
  title: str = "t-SNE map of the features",
  kinds: tuple[str, str, str] = KINDS,
) -> Figure:
  """The picture of `embed`, coloured by class; `kinds` names the three kinds in the legend."""
  with style():
    figure, axes = new_figure(height=7.2)
    _draw_map(axes, plane.points, plane.labels, plane.classes, class_names)
    axes.set_title(title)
    handles = _map_handles(kinds, [len(y) for y in plane.labels], len(plane.points[-1]))
    if handles:
      legend_below(axes, handles)
  return figure


def _finite_rows(features: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
  features, labels = np.asarray(features, np.float32), np.asarray(labels, int).reshape(-1)
  features = features.reshape(len(labels), math.prod(features.shape[1:]))
  keep = np.isfinite(features).all(axis=1)
  return features[keep], labels[keep]


def _classes_in_colour(
  real_labels: np.ndarray, synthetic_labels: np.ndarray, num_classes: int
) -> np.ndarray:
  if num_classes <= _MAX_MAP_COLORS:
    return np.arange(num_classes)
  counts = np.bincount(real_labels, minlength=num_classes)
  without = np.bincount(synthetic_labels, minlength=num_classes) == 0
  return np.sort(np.lexsort((counts, without))[:_MAX_MAP_COLORS])


def _thin(labels: np.ndarray, classes: np.ndarray, most: int, seed: tuple[int, ...]) -> np.ndarray:
  """Rows of at most `most` examples of each class, the same rows for the same seed."""
  rows = []
  for c in classes:
    of_class = np.flatnonzero(labels == c)
    if len(of_class) > most:
      generator = np.random.default_rng((*seed, int(c)))
      of_class = np.sort(generator.choice(of_class, most, replace=False))
    rows.append(of_class)
  return np.concatenate(rows) if rows else np.zeros(0, int)


def _background(labels: np.ndarray, shown: np.ndarray, seed: int) -> np.ndarray:
  """Rows of a sample of the classes that are not in colour."""
  others = np.setdiff1d(labels, shown)[:_MAX_BACKGROUND_POINTS]
  if not len(others):
    return np.zeros(0, int)
  return _thin(labels, others, max(1, _MAX_BACKGROUND_POINTS // len(others)), (seed, 3))


def _embed(parts: Sequence[np.ndarray], seed: int) -> list[np.ndarray]:
  """Maps the rows of all parts [N_i, D] to the plane together: a list of [N_i, 2]."""
  widths = [part.shape[1] for part in parts if len(part)]
  filled = [part if len(part) else np.zeros((0, max(widths, default=1))) for part in parts]
  rows = np.concatenate(filled).astype(np.float32)
  plane = _tsne(rows, seed)
  return np.split(plane, np.cumsum([len(part) for part in parts])[:-1])


def _tsne(rows: np.ndarray, seed: int) -> np.ndarray:
  from sklearn.decomposition import PCA  # here, because scikit-learn takes a second to import
  from sklearn.manifold import TSNE

  distinct = len(np.unique(rows, axis=0))
  if distinct < 5:
    # Too few neighbours for t-SNE; two coordinates of the centred rows show all there is.
    centred = rows - rows.mean(axis=0, keepdims=True) if len(rows) else rows
    return np.pad(centred, ((0, 0), (0, 2)))[:, :2]
  if min(rows.shape) > 50:
    rows = PCA(50, random_state=seed).fit_transform(rows)
  perplexity = min(30.0, (len(rows) - 1) / 3)
  init = "pca" if rows.shape[1] >= 2 else "random"
  # On a machine with other work, its threads wait for each other 30 times as long as one takes.
  with threadpoolctl.threadpool_limits(1, "openmp"):
    tsne = TSNE(perplexity=perplexity, init=init, max_iter=_TSNE_STEPS, random_state=seed)
    return tsne.fit_transform(rows)


def _draw_map(
  axes: Axes,
  points: Sequence[np.ndarray],
  labels: Sequence[np.ndarray],
  shown: np.ndarray,
  class_names: Sequence[str],
) -> None:
  axes.scatter(*points[3].T, s=7, color="#d5dae0", linewidths=0, zorder=1)
  for i, c in enumerate(shown):
    color = CLASS_COLORS[i]
    real, left_out, synthetic = (points[k][labels[k] == c] for k in range(3))
    if len(left_out):
      axes.scatter(*left_out.T, s=13, color=color, alpha=0.28, linewidths=0, zorder=2)
    if len(synthetic):
      axes.scatter(*synthetic.T, s=30, color=color, marker="x", linewidths=1.25, zorder=3)
    if len(real):
      axes.scatter(*real.T, s=36, facecolor=color, edgecolor=INK, linewidths=0.9, zorder=4)
    of_class = np.concatenate([real, left_out, synthetic])
    if len(of_class):
      top = (np.median(of_class[:, 0]), np.quantile(of_class[:, 1], 0.92))
      _name_on_map(axes, top, short(class_names[c]), color)
  axes.set(xticks=[], yticks=[])
  axes.grid(False)
  axes.spines[:].set_visible(False)
  axes.margins(0.03, 0.05)


def _name_on_map(axes: Axes, at: tuple[float, float], name: str, color: str) -> None:
  box = {"boxstyle": "round,pad=0.28", "facecolor": "white", "edgecolor": color, "alpha": 0.93}
  axes.annotate(
    name, at, (0, 9), textcoords="offset points", ha="center", va="bottom", fontsize=10.5,
    fontweight="bold", bbox=box, zorder=6,
  )  # fmt: skip


def _map_handles(
  kinds: tuple[str, str, str], numbers: Sequence[int], background: int
) -> list[Line2D]:
  looks = [
    (kinds[0], numbers[0], {"marker": "o", "markeredgecolor": INK}),
    (kinds[1], numbers[1], {"marker": "o", "alpha": 0.4, "markersize": 5}),
    (kinds[2], numbers[2], {"marker": "x", "markeredgewidth": 1.4}),
    ("other classes", background, {"marker": "o", "color": "#d5dae0", "markersize": 4}),
  ]
  return [
    Line2D([], [], linestyle="", label=label, **({"color": MUTED, "markersize": 6.5} | look))
    for label, number, look in looks
    if number
  ]
