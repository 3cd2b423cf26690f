"""Training curves, one panel per stage."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from memdiff.evaluation.plots.style import CLASS_COLORS, MUTED, REAL, SYNTHETIC, WIDTH, style


def training_curves(curves: Sequence[Mapping]) -> Figure:
  """Loss and accuracy over training, one panel per stage.

  Args:
    curves: one dict per curve: `stage` and `metric` (str), `step`, `mean` and `std` ([n] each, over
      seeds). Metrics named after an accuracy or top-1 are fractions and get their own axis, in %.
  """
  stages = list(dict.fromkeys(curve["stage"] for curve in curves))
  columns = min(3, max(1, len(stages)))
  lines = max(1, math.ceil(len(stages) / columns))
  with style():
    figure = Figure(figsize=(WIDTH, 0.5 + 2.7 * lines))
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, stage in zip(panels, stages, strict=False):
      _draw_stage(axes, stage, [curve for curve in curves if curve["stage"] == stage])
    for axes in panels[len(stages) :]:
      axes.remove()
  return figure


def _is_fraction(metric: str) -> bool:
  return any(word in metric.lower() for word in ("accuracy", "top1", "top-1"))


def _draw_stage(axes: Axes, stage: str, curves: Sequence[Mapping]) -> None:
  losses = [curve for curve in curves if not _is_fraction(curve["metric"])]
  fractions = [curve for curve in curves if _is_fraction(curve["metric"])]
  palette = [REAL, *(CLASS_COLORS[i % 10] for i in range(2, 2 + len(losses)))]
  handles = [
    _draw_curve(axes, curve, color, 1.0, "-") for curve, color in zip(losses, palette, strict=False)
  ]
  _log_if_wide(axes, losses)
  front = axes
  if fractions:
    front = axes.twinx() if losses else axes
    handles += [
      _draw_curve(front, curve, SYNTHETIC, 100.0, dashes)
      for curve, dashes in zip(fractions, _dashes(len(fractions)), strict=True)
    ]
    front.grid(front is axes)
    front.set_ylim(top=102)
    front.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    front.tick_params(axis="y", labelcolor=SYNTHETIC)
    if losses:
      axes.tick_params(axis="y", labelcolor=REAL if len(losses) == 1 else MUTED)
  axes.set_title(stage.replace("_", " "), fontsize=10.5, pad=8)
  axes.set_xlabel("step")
  axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
  axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
  if len(losses) <= 1 and len(fractions) <= 1:
    for line in handles:
      line.axes.set_ylabel(line.get_label(), color=line.get_color(), labelpad=2)
  else:
    front.legend(
      handles=handles, fontsize=8, loc="center right", handlelength=1.4, frameon=True,
      framealpha=0.85, edgecolor="none",
    )  # fmt: skip


def _dashes(number: int) -> list:
  return [("-", (0, (4, 2)), (0, (1, 1.5)))[i % 3] for i in range(number)]


def _draw_curve(axes: Axes, curve: Mapping, color: str, scale: float, dashes) -> Line2D:
  step = np.asarray(curve["step"], float)
  mean = scale * np.asarray(curve["mean"], float)
  std = scale * np.asarray(curve["std"], float)
  axes.fill_between(step, mean - std, mean + std, color=color, alpha=0.16, linewidth=0)
  lone = {"marker": "o", "markersize": 4} if len(step) == 1 else {}
  label = curve["metric"].replace("_", " ")
  (line,) = axes.plot(step, mean, color=color, linewidth=1.6, linestyle=dashes, label=label, **lone)
  return line


def _log_if_wide(axes: Axes, curves: Sequence[Mapping]) -> None:
  """A loss that falls over two decades is unreadable on a linear axis."""
  values = [np.asarray(curve["mean"], float) for curve in curves if len(curve["mean"])]
  if not values:
    return
  values = np.concatenate(values)
  values = values[np.isfinite(values)]
  if values.size and values.min() > 0 and values.max() / values.min() > 50:
    axes.set_yscale("log")
    axes.set_ylim(values.min() / 1.5, values.max() * 1.5)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
