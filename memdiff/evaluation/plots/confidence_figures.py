"""Figures of the confidence in synthetic features."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import ArrayLike

from memdiff.evaluation.plots.style import (
  INK,
  MAX_NAMED_CLASSES,
  MUTED,
  SYNTHETIC,
  legend_below,
  new_figure,
  short,
  style,
)


def confidence_histogram(
  confidence: ArrayLike, labels: ArrayLike, class_names: Sequence[str]
) -> Figure:
  """How sure the method is of its synthetic features, class by class.

  Up to 30 classes with synthetic features are drawn as ridges with their medians; more are drawn as
  quantile bands over the classes.

  Args:
    confidence: [S], usually in [0, 1]; the axis widens if values lie outside.
    labels: [S], the class of each synthetic feature.
    class_names: [C].
  """
  confidence, labels = np.asarray(confidence, float), np.asarray(labels, int)
  keep = np.isfinite(confidence)
  confidence, labels = confidence[keep], labels[keep]
  present = np.unique(labels)
  groups = [confidence[labels == c] for c in present]
  low = min(0.0, confidence.min()) if confidence.size else 0.0
  high = max(1.0, confidence.max()) if confidence.size else 1.0
  with style():
    if len(present) <= MAX_NAMED_CLASSES:
      figure, axes = new_figure(height=1.5 + 0.42 * max(3, len(present)))
      _ridges(axes, groups, [class_names[c] for c in present], (low, high))
    else:
      figure, axes = new_figure(height=3.9)
      _quantile_bands(axes, groups, (low, high))
    axes.set_title("Confidence in the synthetic features, by class")
  return figure


def reliability(confidence: ArrayLike, distance: ArrayLike, num_bins: int = 10) -> Figure:
  """Whether confidence tells which synthetic features lie near unseen real ones.

  Args:
    confidence: [M].
    distance: [M] to the nearest unseen real feature, 1 as near as those are to each other; NaN
      if there is none.
    num_bins: groups of equal size by confidence.
  """
  confidence, distance = np.asarray(confidence, float), np.asarray(distance, float)
  keep = np.isfinite(confidence) & np.isfinite(distance)
  confidence, distance = confidence[keep], distance[keep]
  groups = np.array_split(np.argsort(confidence, kind="stable"), num_bins)
  groups = [group for group in groups if len(group)]
  with style():
    figure, axes = new_figure(height=4.2)
    if groups:
      x = [np.median(confidence[group]) for group in groups]
      low, middle, high = np.transpose(
        [np.quantile(distance[group], (0.25, 0.5, 0.75)) for group in groups]
      )
      axes.fill_between(x, low, high, color=SYNTHETIC, alpha=0.2, linewidth=0, label="quartiles")
      axes.plot(x, middle, "o-", color=SYNTHETIC, label="median")
      axes.axhline(1, color=MUTED, linewidth=1, linestyle="--", label="real to real")
      legend_below(axes, axes.get_legend_handles_labels()[0])
    axes.set_xlabel("confidence")
    axes.set_ylabel("distance to the nearest unseen real feature")
    axes.set_title("Are confident features nearer to unseen real ones?")
  return figure


def _ridges(
  axes: Axes, groups: Sequence[np.ndarray], names: Sequence[str], limits: tuple[float, float]
) -> None:
  grid = np.linspace(*limits, 401)
  for i, values in enumerate(groups):
    base = len(groups) - 1 - i
    density = _density(values, grid)
    axes.fill_between(
      grid, base, base + 0.86 * density, color=SYNTHETIC, alpha=0.42, linewidth=0, zorder=2 + i
    )
    axes.plot(grid, base + 0.86 * density, color=SYNTHETIC, linewidth=1.2, zorder=2 + i)
    median = float(np.median(values))
    axes.plot(
      [median, median], [base, base + 0.3], color=INK, linewidth=2, zorder=60,
      solid_capstyle="butt",
    )  # fmt: skip
    axes.annotate(
      f"median {median:.2f}   n = {len(values):,}", (1.01, base + 0.16),
      xycoords=("axes fraction", "data"), fontsize=8.5, color=MUTED,
    )  # fmt: skip
  axes.set_yticks(range(len(groups)), [short(name) for name in reversed(names)])
  for label in axes.get_yticklabels():
    label.set(va="bottom", color=INK)
  axes.tick_params(axis="y", length=0)
  axes.grid(False, axis="y")
  axes.grid(True, axis="x")
  axes.spines["left"].set_visible(False)
  axes.set_xlim(*limits)
  axes.set_ylim(-0.06, max(len(groups), 1))
  axes.set_xlabel("confidence")


def _density(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
  """A Gaussian-kernel density on `grid`, scaled to a peak of one; it never degenerates."""
  span = grid[-1] - grid[0]
  width = max(1.06 * float(values.std()) * len(values) ** -0.2, 0.008 * span)
  histogram, edges = np.histogram(values, bins=400, range=(grid[0], grid[-1]))
  centres = (edges[:-1] + edges[1:]) / 2
  used = histogram > 0
  kernel = np.exp(-0.5 * ((grid[:, None] - centres[used]) / width) ** 2)
  density = kernel @ histogram[used]
  return density / density.max()


def _quantile_bands(axes: Axes, groups: Sequence[np.ndarray], limits: tuple[float, float]) -> None:
  quantiles = np.array([np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95]) for values in groups])
  rank = np.arange(len(groups))
  for low, high, alpha in ((0, 4, 0.18), (1, 3, 0.34)):
    axes.fill_between(
      rank, quantiles[:, low], quantiles[:, high], step="mid", color=SYNTHETIC, alpha=alpha,
      linewidth=0,
    )  # fmt: skip
  axes.step(rank, quantiles[:, 2], where="mid", color=SYNTHETIC, linewidth=1.6)
  handles = [
    Line2D([], [], color=SYNTHETIC, linewidth=1.6, label="median"),
    Patch(color=SYNTHETIC, alpha=0.45, linewidth=0, label="middle half"),
    Patch(color=SYNTHETIC, alpha=0.18, linewidth=0, label="5 % to 95 %"),
  ]
  axes.set_xlim(-0.5, len(groups) - 0.5)
  axes.set_ylim(*limits)
  axes.set_xlabel("classes with synthetic features")
  axes.set_ylabel("confidence")
  legend_below(axes, handles)
