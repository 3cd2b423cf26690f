"""Figures of generated images."""

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from memdiff.evaluation.plots.accuracy import draw_by_class, method_styles
from memdiff.evaluation.plots.style import (
  MUTED,
  WIDTH,
  by_count,
  legend_below,
  new_figure,
  short,
  style,
)

MOST_ROWS = 12  # classes in a grid
_GAP = 2  # pixels between images of 32
PROMPTED = 6  # images in a row of a sheet with prompts
_PROMPT_WIDTH, _PROMPT_INCHES = 22, 0.42  # letters of a line, and room for three of them


def shown_classes(train_counts: np.ndarray) -> np.ndarray:
  """Class indices for a grid, from the largest class to the smallest, evenly spaced in rank."""
  order = by_count(np.asarray(train_counts))
  ranks = np.linspace(0, len(order) - 1, min(len(order), MOST_ROWS)).round().astype(int)
  return order[ranks]


def sample_grid(
  title: str,
  names: Sequence[str],
  panels: Sequence[tuple[str, Sequence[np.ndarray], int]],
) -> Figure:
  """Images of some classes, a row each, in panels side by side.

  Args:
    title: of the figure.
    names: [R] of the rows.
    panels: (title, R arrays of images [n, H, W, 1 or 3] uint8, columns); rows may have fewer.
  """
  columns = [panel[2] for panel in panels]
  with style():
    figure = Figure(figsize=(WIDTH, 0.9 + (WIDTH - 1.6) / sum(columns) * len(names)))
    axes = figure.subplots(1, len(panels), width_ratios=columns)
    for place, (heading, rows, number) in zip(np.atleast_1d(axes), panels, strict=True):
      place.imshow(_tiled(rows, number), interpolation="nearest")
      place.set_title(heading, fontsize=9.5, fontweight="normal", color=MUTED, pad=5)
      place.grid(visible=False)
      place.set_xticks([])
      place.set_yticks([])
      for side in place.spines.values():
        side.set_visible(False)
    height = _tiled(panels[0][1], 1).shape[0] / len(names)
    first = np.atleast_1d(axes)[0]
    first.set_yticks(
      [(row + 0.5) * height for row in range(len(names))], [short(name, 22) for name in names]
    )
    first.tick_params(axis="y", length=0)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=12)
  return figure


def prompt_sheet(
  title: str, names: Sequence[str], rows: Sequence[tuple[np.ndarray, Sequence[str]]]
) -> Figure:
  """Images of some classes, a row each, with the prompt of each below it.

  Args:
    title: of the figure.
    names: [R] of the rows.
    rows: R of (images [n, H, W, 1 or 3] uint8, n prompts); the first few are shown.
  """
  cell = (WIDTH - 1.6) / PROMPTED
  with style():
    figure = Figure(figsize=(WIDTH, 0.6 + (cell + _PROMPT_INCHES) * len(rows)))
    axes = figure.subplots(len(rows), PROMPTED, squeeze=False)
    for of_class, name, (images, prompts) in zip(axes, names, rows, strict=True):
      for place in of_class:
        place.set_axis_off()
      for place, image, prompt in zip(of_class, images, prompts, strict=False):
        place.imshow(np.broadcast_to(image, (*image.shape[:2], 3)), interpolation="nearest")
        lines = textwrap.wrap(short(prompt, 3 * _PROMPT_WIDTH), _PROMPT_WIDTH)
        place.text(
          0.5, -0.04, "\n".join(lines), transform=place.transAxes, ha="center", va="top",
          fontsize=6.5, color=MUTED,
        )  # fmt: skip
      of_class[0].text(
        -0.1, 0.5, "\n".join(textwrap.wrap(short(name, 36), 18)), va="center", ha="right",
        transform=of_class[0].transAxes, fontsize=9,
      )  # fmt: skip
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=12)
  return figure


def _tiled(rows: Sequence[np.ndarray], columns: int) -> np.ndarray:
  """One uint8 picture [h, w, 3] of rows of images; white where there are none."""
  side, width = next(row.shape[1:3] for row in rows if len(row))
  gap = max(round(_GAP * side / 32), 1)
  canvas = np.full((len(rows) * (side + gap), columns * (width + gap), 3), 255, np.uint8)
  for y, row in enumerate(rows):
    for x, image in enumerate(row[:columns]):
      top, left = y * (side + gap), x * (width + gap)
      canvas[top : top + side, left : left + width] = image
  return canvas


def by_class(
  title: str,
  label: str,
  class_names: Sequence[str],
  train_counts: np.ndarray,
  rows: Sequence[tuple[str, np.ndarray, np.ndarray]],
) -> Figure:
  """A number of every class under every method, from the largest class to the smallest.

  Args:
    title: of the figure.
    label: of the numbers.
    class_names: [C].
    train_counts: [C].
    rows: (method, mean [C], standard deviation [C]) per method.
  """
  with style():
    figure, axes = new_figure(height=4.2)
    handles = draw_by_class(axes, class_names, np.asarray(train_counts, float), rows)
    axes.set_ylabel(label)
    axes.set_title(title)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    legend_below(axes, handles)
  return figure


def sweep(
  panels: Sequence[tuple[str, Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray]]]],
  label: str,
) -> Figure:
  """Metrics of methods against a number, such as the guidance scale or the training step.

  Args:
    panels: (title, rows of (method, numbers [G], means [G], standard deviations [G])).
    label: of the number.
  """
  with style():
    figure = Figure(figsize=(WIDTH, 3.6))
    axes = np.atleast_1d(figure.subplots(1, len(panels)))
    handles = []
    for place, (title, rows) in zip(axes, panels, strict=True):
      styles = method_styles([method for method, *_ in rows])
      handles = [
        place.errorbar(
          numbers, means, stds, color=styles[method][0], marker=styles[method][1], markersize=5,
          linewidth=1.4, capsize=2, label=method,
        )
        for method, numbers, means, stds in rows
      ]  # fmt: skip
      place.set_title(title, fontsize=10.5)
      place.set_xlabel(label)
      place.xaxis.set_major_locator(MaxNLocator(5))
    legend_below(axes[0], handles)
  return figure
