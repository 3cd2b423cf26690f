"""Figures of the data and of what methods reach on them."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike

from memdiff.evaluation.method import Method
from memdiff.evaluation.plots.style import (
  BAND,
  MAX_NAMED_CLASSES,
  MUTED,
  REAL,
  SYNTHETIC,
  by_count,
  legend_below,
  new_figure,
  short,
  style,
)

# (colour, marker, hollow); the same method looks the same in every figure and every run.
_METHOD_STYLES = {
  "cross_entropy": ("#8793a0", "o", False),
  "csl": ("#56b4e9", "s", False),
  "real": ("#0072b2", "^", False),
  "memdiff": ("#d55e00", "D", False),
  "oracle": ("#1f2a37", "o", True),
  "ddpm": ("#8793a0", "o", False),
  "balanced": ("#0072b2", "^", False),
  "coral": ("#cc79a7", "s", False),
  "cbdm": ("#009e73", "v", False),
  "t2h": ("#e69f00", "P", False),
  "diffrop": ("#332288", "X", False),
}
_OTHER_METHOD_STYLES = tuple(
  (color, marker, False)
  for marker in ("v", "P", "X")
  for color in ("#009e73", "#cc79a7", "#e69f00", "#332288", "#999933", "#882255")
)

_MAX_LABELLED_BARS = 16


def long_tail_profile(
  class_names: Sequence[str],
  train_counts: ArrayLike,
  synthetic_counts: ArrayLike,
  group_of_class: Sequence[str],
  made: str = "synthetic features",
) -> Figure:
  """Real training examples per class, and what was made stacked on top of them.

  Args:
    class_names: [C].
    train_counts: [C], real training examples.
    synthetic_counts: [C], features or images added.
    group_of_class: [C], the group of each class, such as many, medium and few.
    made: what was added, in words.

  Returns:
    One axes with two bar containers (real, synthetic), from the largest class to the smallest. The
    axis is logarithmic only if the largest class is over 100 times the smallest non-empty one.
  """
  real, synthetic = np.asarray(train_counts, float), np.asarray(synthetic_counts, float)
  order = by_count(real)
  real, synthetic = real[order], synthetic[order]
  names = [class_names[i] for i in order]
  position = np.arange(len(order))
  few_bars = len(order) <= MAX_NAMED_CLASSES
  edges = {"linewidth": 0.8} if few_bars else {"linewidth": 0}
  with style():
    figure, axes = new_figure(height=3.9)
    width = 0.74 if few_bars else 1.0
    axes.bar(position, real, width, color=REAL, label="real training examples", **edges)
    added = axes.bar(
      position, synthetic, width, bottom=real, label=f"{made} added", hatch="////",
      facecolor="#fbe3d3", edgecolor=SYNTHETIC, **edges,
    )  # fmt: skip
    for bar, height in zip(added, synthetic, strict=True):
      bar.set_visible(height > 0)
    _scale_counts(axes, real, real + synthetic)
    _mark_groups(axes, [group_of_class[i] for i in order])
    if len(order) <= _MAX_LABELLED_BARS:
      _label_bars(axes, position, real, synthetic)
    _name_classes(axes, names, None)
    axes.set_ylabel("examples" + (", log scale" if axes.get_yscale() == "log" else ""))
    axes.set_title("Training examples per class", pad=24)  # the group names stand between
    handles = [Patch(color=REAL, linewidth=0, label="real training examples")]
    if synthetic.any():
      handles.append(
        Patch(facecolor="#fbe3d3", edgecolor=SYNTHETIC, hatch="////", label=f"{made} added")
      )
    legend_below(axes, handles)
  return figure


def per_class_accuracy(
  class_names: Sequence[str],
  train_counts: ArrayLike,
  rows: Sequence[tuple[str, ArrayLike, ArrayLike]],
) -> Figure:
  """Test accuracy of every class under every method, from the largest class to the smallest.

  Up to 30 classes are drawn as dots with error bars; more are drawn as one line per method, a
  running mean over neighbouring class ranks with a band for the spread over seeds.

  Args:
    class_names: [C].
    train_counts: [C], real training examples, for the order and the labels.
    rows: (method, mean [C], standard deviation [C]) per method, fractions in [0, 1].
  """
  percent = [
    (method, 100 * np.asarray(mean, float), 100 * np.asarray(std, float))
    for method, mean, std in rows
  ]
  with style():
    figure, axes = new_figure(height=4.6)
    handles = draw_by_class(axes, class_names, train_counts, percent, (0, 100))
    _accuracy_limits(axes, percent)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.set_ylabel("test accuracy")
    axes.set_title("Accuracy by class, from the most to the fewest training examples")
    if handles:
      legend_below(axes, handles)
  return figure


def draw_by_class(
  axes: Axes,
  class_names: Sequence[str],
  train_counts: ArrayLike,
  rows: Sequence[tuple[str, ArrayLike, ArrayLike]],
  limits: tuple[float, float] = (-math.inf, math.inf),
) -> list[Line2D]:
  """A number of every class under every method, as `per_class_accuracy` lays it out.

  Args:
    axes: to draw on.
    class_names, train_counts: see there.
    rows: (method, mean [C], standard deviation [C]) per method.
    limits: that no error bar leaves.

  Returns:
    Handles for a legend.
  """
  counts = np.asarray(train_counts, float)
  order = by_count(counts)
  ordered = [(m, np.asarray(x, float)[order], np.asarray(s, float)[order]) for m, x, s in rows]
  styles = method_styles([method for method, _, _ in rows])
  draw = _dots if len(order) <= MAX_NAMED_CLASSES else _lines
  draw(axes, ordered, styles, limits)
  _name_classes(axes, [class_names[i] for i in order], counts[order])
  return [_method_handle(method, styles[method]) for method, _, _ in rows]


def gap_closed(rows: Sequence[tuple[str, float, Sequence[float]]]) -> Figure:
  """Share of the way from the control without synthetic data to the oracle that each method goes.

  Args:
    rows: (method, mean, (low, high)) as fractions, the ends those of a 95 % interval; drawn from
      the best to the worst.
  """
  rows = sorted(rows, key=lambda row: row[1])
  with style():
    figure, axes = new_figure(height=1.4 + 0.24 * len(rows))
    for y, (method, mean, (low, high)) in enumerate(rows):
      color = SYNTHETIC if method.startswith("memdiff") else REAL
      axes.plot([100 * low, 100 * high], [y, y], "|-", color=color, linewidth=1.5, markersize=4)
      axes.plot([100 * mean], [y], "o", color=color, markersize=5)
    axes.axvline(0, color=MUTED, linewidth=1)
    axes.axvline(100, color=MUTED, linewidth=1, linestyle="--")
    axes.set_yticks(range(len(rows)), [short(method, 44) for method, _, _ in rows])
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.set_xlabel("0 %: best control with real features only      100 %: oracle")
    axes.set_title("Share of the gap that each method closes, with 95 % intervals")
  return figure


def _name_classes(axes: Axes, names: Sequence[str], counts: np.ndarray | None) -> None:
  """Labels the class axis with names, or with class ranks if there are too many."""
  axes.set_xlim(-0.6, max(len(names) - 0.4, 0.6))
  if len(names) > MAX_NAMED_CLASSES:
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlabel("classes, from the most to the fewest training examples (rank)")
    return
  labels = [short(name) for name in names]
  crowded = max((len(label) for label in labels), default=0) * len(names) > 95
  if counts is not None:
    separator = "  " if crowded else "\n"
    labels = [f"{label}{separator}({n:,.0f})" for label, n in zip(labels, counts, strict=True)]
  axes.set_xticks(range(len(names)), labels)
  axes.tick_params(axis="x", length=0)
  if crowded:
    for label in axes.get_xticklabels():
      label.set(rotation=40, ha="right", rotation_mode="anchor")
  axes.set_xlabel("class" + (" (training examples)" if counts is not None else ""))


def _scale_counts(axes: Axes, real: np.ndarray, total: np.ndarray) -> None:
  positive = real[real > 0]
  top = max(float(total.max(initial=0.0)), 1.0)
  if positive.size and positive.max() / positive.min() > 100:
    bottom = 0.6 * float(positive.min())
    axes.set_yscale("log")
    axes.set_ylim(bottom, top * (top / bottom) ** 0.16)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
  else:
    axes.set_ylim(0, top * 1.2)
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))


def _mark_groups(axes: Axes, groups: Sequence[str]) -> None:
  """Shades every second run of neighbouring classes of one group, and names each run."""
  starts = [i for i in range(len(groups)) if i == 0 or groups[i] != groups[i - 1]]
  ends = [*starts[1:], len(groups)]
  for run, (start, end) in enumerate(zip(starts, ends, strict=True)):
    if run % 2 == 0:
      axes.axvspan(start - 0.5, end - 0.5, color=BAND, linewidth=0, zorder=-2)
    if end - start >= len(groups) / 40:
      axes.annotate(
        groups[start], ((start + end - 1) / 2, 1.01), xycoords=("data", "axes fraction"),
        ha="center", va="bottom", color=MUTED, fontsize=10, fontstyle="italic",
      )  # fmt: skip


def _label_bars(axes: Axes, position: np.ndarray, real: np.ndarray, synthetic: np.ndarray) -> None:
  for x, count, added in zip(position, real, synthetic, strict=True):
    text = f"{count:,.0f}" + (f"\n+{added:,.0f}" if added else "")
    axes.annotate(
      text, (x, count + added), (0, 3), textcoords="offset points", ha="center", va="bottom",
      fontsize=8.5, linespacing=1.1,
    )  # fmt: skip


def method_styles(methods: Sequence[str]) -> dict[str, tuple[str, str, bool]]:
  """A look per method: its generator's own if it has one that no other of them claims."""
  names = [method if method in _METHOD_STYLES else Method(method).generator for method in methods]
  fixed = {
    method: _METHOD_STYLES[name]
    for method, name in zip(methods, names, strict=True)
    if name in _METHOD_STYLES and names.count(name) == 1
  }
  others = [method for method in methods if method not in fixed]
  cycle = len(_OTHER_METHOD_STYLES)
  return {m: _OTHER_METHOD_STYLES[i % cycle] for i, m in enumerate(others)} | fixed


def _marker_look(look: tuple[str, str, bool]) -> dict:
  color, marker, hollow = look
  return {
    "color": color,
    "marker": marker,
    "markersize": 6.5,
    "markerfacecolor": "white" if hollow else color,
    "markeredgecolor": color,
    "markeredgewidth": 1.4 if hollow else 0.6,
  }


def _method_handle(method: str, look: tuple[str, str, bool]) -> Line2D:
  return Line2D([], [], linestyle="", label=method, **_marker_look(look))


def _dots(axes: Axes, rows: Sequence[tuple], styles: Mapping, limits: tuple) -> None:
  num_classes = len(rows[0][1]) if rows else 0
  for c in range(0, num_classes, 2):
    axes.axvspan(c - 0.5, c + 0.5, color=BAND, linewidth=0, zorder=-2)
  offsets = (np.arange(len(rows)) - (len(rows) - 1) / 2) * (0.72 / max(len(rows), 1))
  for offset, (method, mean, std) in zip(offsets, rows, strict=True):
    axes.errorbar(
      np.arange(num_classes) + offset, mean, yerr=_within(mean, std, limits), label=method,
      linestyle="", elinewidth=1.3, **_marker_look(styles[method]),
    )  # fmt: skip


def _within(mean: np.ndarray, std: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
  """Error bars [2, C] below and above the mean that do not leave the limits."""
  low, high = limits
  return np.clip(np.stack([np.minimum(std, mean - low), np.minimum(std, high - mean)]), 0, None)


def _lines(axes: Axes, rows: Sequence[tuple], styles: Mapping, limits: tuple) -> None:
  window = 2 * (len(rows[0][1]) // 30) + 1 if rows else 1
  for method, mean, std in rows:
    color, _, hollow = styles[method]
    rank = np.arange(len(mean))
    centre, spread = _running_mean(mean, window), _running_mean(std, window)
    axes.fill_between(
      rank, np.maximum(centre - spread, limits[0]), np.minimum(centre + spread, limits[1]),
      color=color,
      alpha=0.13, linewidth=0,
    )  # fmt: skip
    axes.plot(
      rank, centre, label=method, color=color, linewidth=2.0 if method == "memdiff" else 1.5,
      linestyle=(0, (5, 2)) if hollow else "-", marker=styles[method][1],
      markevery=max(1, len(mean) // 8), markersize=5, markerfacecolor="white" if hollow else color,
    )  # fmt: skip
  axes.annotate(
    f"running mean over {window} classes", (0.995, 0.97), xycoords="axes fraction", ha="right",
    va="top", fontsize=8.5, color=MUTED,
  )  # fmt: skip


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
  """The mean over `window` neighbours, fewer at the ends; gaps (NaN) are left out."""
  known = np.isfinite(values)
  kernel = np.ones(window)
  total = np.convolve(np.where(known, values, 0.0), kernel, mode="same")
  number = np.convolve(known.astype(float), kernel, mode="same")
  return np.divide(total, number, out=np.full(len(values), np.nan), where=number > 0.5)


def _accuracy_limits(axes: Axes, rows: Sequence[tuple]) -> None:
  lows = [np.nanmin(mean - std) for _, mean, std in rows if np.isfinite(mean - std).any()]
  low = min(lows, default=0.0)
  axes.set_ylim(max(-2.0, 10 * math.floor((low - 3) / 10)), 103)
