"""The pictures of a run: pure functions from arrays to matplotlib figures in one shared style.

Every function returns a `matplotlib.figure.Figure` that belongs to nobody else: pyplot and its
global list of figures are never involved, so the functions can be called from any thread of a
training job and their results need no closing. Colours come from palettes that stay apart for
colour-blind readers, and no kind or method is told by its colour alone. `to_png` and `to_rgb` turn
a figure into bytes for the report and into an array for TensorBoard.
"""

import contextlib
import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence

import matplotlib
import numpy as np
import threadpoolctl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

INK, MUTED, GRID, BAND = "#1f2a37", "#667380", "#e4e8ec", "#f4f6f8"
REAL, SYNTHETIC, LEFT_OUT = "#0072b2", "#d55e00", "#9aa5b1"

# Okabe and Ito's colours without the yellow, which fades on white, joined by Tol's muted ones.
CLASS_COLORS = (
  "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9",
  "#d55e00", "#332288", "#999933", "#882255", "#7f7f7f",
)  # fmt: skip

# (colour, marker, hollow); the same method looks the same in every figure and every run.
_METHOD_STYLES = {
  "cross_entropy": ("#8793a0", "o", False),
  "csl": ("#56b4e9", "s", False),
  "real": ("#0072b2", "^", False),
  "memdiff": ("#d55e00", "D", False),
  "oracle": ("#1f2a37", "o", True),
}
_OTHER_METHOD_STYLES = tuple(
  (color, marker, False)
  for marker in ("v", "P", "X")
  for color in ("#009e73", "#cc79a7", "#e69f00", "#332288", "#999933", "#882255")
)

_STYLE = {
  "figure.facecolor": "white",
  "figure.constrained_layout.use": True,
  "figure.constrained_layout.w_pad": 0.1,
  "figure.constrained_layout.h_pad": 0.07,
  "savefig.facecolor": "white",
  "font.family": "sans-serif",
  "font.sans-serif": ["DejaVu Sans"],
  "font.size": 10,
  "text.color": INK,
  "text.parse_math": False,
  "axes.facecolor": "white",
  "axes.edgecolor": "#b3bcc5",
  "axes.linewidth": 0.8,
  "axes.labelcolor": MUTED,
  "axes.labelsize": 9.5,
  "axes.titlesize": 12,
  "axes.titleweight": "bold",
  "axes.titlelocation": "left",
  "axes.titlepad": 12,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.axisbelow": True,
  "axes.grid": True,
  "axes.grid.axis": "y",
  "grid.color": GRID,
  "grid.linewidth": 0.8,
  "xtick.color": "#b3bcc5",
  "ytick.color": "#b3bcc5",
  "xtick.labelcolor": MUTED,
  "ytick.labelcolor": MUTED,
  "xtick.labelsize": 9,
  "ytick.labelsize": 9,
  "legend.frameon": False,
  "legend.fontsize": 9,
  "hatch.linewidth": 0.9,
  "lines.solid_capstyle": "round",
}

MAX_NAMED_CLASSES = 30
_MAX_LABELLED_BARS = 16
_MAX_MAP_COLORS = len(CLASS_COLORS)
_MAX_BACKGROUND_POINTS = 1500
_WIDTH = 9.6


@contextlib.contextmanager
def style() -> Iterator[None]:
  """The look shared by all figures; put drawing of further artists inside it."""
  with matplotlib.rc_context(_STYLE):
    yield


def long_tail_profile(
  class_names: Sequence[str],
  train_counts: ArrayLike,
  synthetic_counts: ArrayLike,
  group_of_class: Sequence[str],
) -> Figure:
  """Real training examples per class, and the synthetic features stacked on top of them.

  Args:
    class_names: [C].
    train_counts: [C], real training examples.
    synthetic_counts: [C], synthetic features added.
    group_of_class: [C], the group of each class, such as many, medium and few.

  Returns:
    One axes with two bar containers (real, synthetic), from the largest class to the smallest. The
    axis is logarithmic only where the largest class is over 100 times the smallest non-empty one.
  """
  real, synthetic = np.asarray(train_counts, float), np.asarray(synthetic_counts, float)
  order = _by_count(real)
  real, synthetic = real[order], synthetic[order]
  names = [class_names[i] for i in order]
  position = np.arange(len(order))
  few_bars = len(order) <= MAX_NAMED_CLASSES
  edges = {"linewidth": 0.8} if few_bars else {"linewidth": 0}
  with style():
    figure, axes = _figure(height=3.9)
    width = 0.74 if few_bars else 1.0
    axes.bar(position, real, width, color=REAL, label="real training examples", **edges)
    added = axes.bar(
      position, synthetic, width, bottom=real, label="synthetic features added", hatch="////",
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
        Patch(
          facecolor="#fbe3d3", edgecolor=SYNTHETIC, hatch="////", label="synthetic features added"
        )
      )
    _legend_below(axes, handles)
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
  counts = np.asarray(train_counts, float)
  order = _by_count(counts)
  names = [class_names[i] for i in order]
  scaled = [
    (method, 100 * np.asarray(mean, float)[order], 100 * np.asarray(std, float)[order])
    for method, mean, std in rows
  ]
  styles = _method_styles([method for method, _, _ in scaled])
  with style():
    figure, axes = _figure(height=4.6)
    if len(order) <= MAX_NAMED_CLASSES:
      _accuracy_dots(axes, scaled, styles)
    else:
      _accuracy_lines(axes, scaled, styles)
    _name_classes(axes, names, counts[order])
    _accuracy_limits(axes, scaled)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.set_ylabel("test accuracy")
    axes.set_title("Accuracy by class, from the most to the fewest training examples")
    handles = [_method_handle(method, styles[method]) for method, _, _ in scaled]
    if handles:
      _legend_below(axes, handles)
  return figure


def feature_map(
  real: ArrayLike,
  real_labels: ArrayLike,
  left_out: ArrayLike,
  left_out_labels: ArrayLike,
  synthetic: ArrayLike,
  synthetic_labels: ArrayLike,
  class_names: Sequence[str],
  seed: int = 0,
  max_per_class: int = 60,
) -> Figure:
  """A joint t-SNE map of real, left-out and synthetic features, coloured by class.

  Each kind of each class is thinned to `max_per_class` features; the same arguments give the same
  map. With more than ten classes, colour goes to the ten with the fewest real features among those
  that have synthetic ones, and a sample of the other classes' real features stays as background.

  Args:
    real, real_labels: [N, D] features of training examples and their classes [N].
    left_out, left_out_labels: [M, D], [M], real features that training never saw.
    synthetic, synthetic_labels: [S, D], [S].
    class_names: [C].
    seed: chooses the features that are shown and starts t-SNE.
    max_per_class: the most features shown per kind and class.
  """
  kinds = [
    _finite_rows(features, labels)
    for features, labels in (
      (real, real_labels),
      (left_out, left_out_labels),
      (synthetic, synthetic_labels),
    )
  ]
  num_classes = len(class_names)
  shown = _classes_in_colour(kinds[0][1], kinds[2][1], num_classes)
  chosen = [_thin(y, shown, max_per_class, (seed, kind)) for kind, (_, y) in enumerate(kinds)]
  background = _background(kinds[0][1], shown, seed)
  picked = [x[rows] for (x, _), rows in zip(kinds, chosen, strict=True)]
  points = _embed([*picked, kinds[0][0][background]], seed)
  labels = [y[rows] for (_, y), rows in zip(kinds, chosen, strict=True)]
  with style():
    figure, axes = _figure(height=7.2)
    _draw_map(axes, points, labels, shown, class_names)
    axes.set_title("t-SNE map of the features")
    handles = _map_handles([len(y) for y in labels], len(background))
    if handles:
      _legend_below(axes, handles)
  return figure


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
    figure = Figure(figsize=(_WIDTH, 0.5 + 2.7 * lines))
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, stage in zip(panels, stages, strict=False):
      _draw_stage(axes, stage, [curve for curve in curves if curve["stage"] == stage])
    for axes in panels[len(stages) :]:
      axes.remove()
  return figure


def confidence_histogram(
  confidence: ArrayLike, labels: ArrayLike, class_names: Sequence[str]
) -> Figure:
  """How sure the method is of its synthetic features, class by class.

  Up to 30 classes with synthetic features are drawn as ridges with their medians; more are drawn as
  quantile bands over the classes.

  Args:
    confidence: [S], usually in [0, 1]; the axis widens where values lie outside.
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
      figure, axes = _figure(height=1.5 + 0.42 * max(3, len(present)))
      _ridges(axes, groups, [class_names[c] for c in present], (low, high))
    else:
      figure, axes = _figure(height=3.9)
      _quantile_bands(axes, groups, (low, high))
    axes.set_title("Confidence in the synthetic features, by class")
  return figure


def gap_closed(rows: Sequence[tuple[str, float, float]]) -> Figure:
  """Share of the way from the real-only control to the oracle that each method goes.

  Args:
    rows: (method, mean, standard deviation) as fractions; drawn from the best to the worst.
  """
  rows = sorted(rows, key=lambda row: row[1])
  position = np.arange(len(rows))
  with style():
    figure, axes = _figure(height=1.4 + 0.24 * len(rows))
    for y, (method, mean, std) in zip(position, rows, strict=True):
      color = SYNTHETIC if method.startswith("memdiff") else REAL
      axes.errorbar(100 * mean, y, xerr=100 * std, fmt="o", color=color, capsize=2, markersize=5)
    axes.axvline(0, color=MUTED, linewidth=1)
    axes.axvline(100, color=MUTED, linewidth=1, linestyle="--")
    axes.set_yticks(position, [_short(method, 44) for method, _, _ in rows])
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.set_xlabel("0 %: best control with real features only      100 %: oracle")
    axes.set_title("Share of the gap that each method closes")
  return figure


def reliability(confidence: ArrayLike, distance: ArrayLike, num_bins: int = 10) -> Figure:
  """Whether confidence tells which synthetic features lie near unseen real ones.

  Args:
    confidence: [M].
    distance: [M] to the nearest unseen real feature, 1 as near as those are to each other; NaN
      where there is none.
    num_bins: groups of equal size by confidence.
  """
  confidence, distance = np.asarray(confidence, float), np.asarray(distance, float)
  keep = np.isfinite(confidence) & np.isfinite(distance)
  confidence, distance = confidence[keep], distance[keep]
  groups = np.array_split(np.argsort(confidence, kind="stable"), num_bins)
  groups = [group for group in groups if len(group)]
  with style():
    figure, axes = _figure(height=4.2)
    if groups:
      x = [np.median(confidence[group]) for group in groups]
      low, middle, high = np.transpose(
        [np.quantile(distance[group], (0.25, 0.5, 0.75)) for group in groups]
      )
      axes.fill_between(x, low, high, color=SYNTHETIC, alpha=0.2, linewidth=0, label="quartiles")
      axes.plot(x, middle, "o-", color=SYNTHETIC, label="median")
      axes.axhline(1, color=MUTED, linewidth=1, linestyle="--", label="real to real")
      _legend_below(axes, axes.get_legend_handles_labels()[0])
    axes.set_xlabel("confidence")
    axes.set_ylabel("distance to the nearest unseen real feature")
    axes.set_title("Are confident features nearer to unseen real ones?")
  return figure


def to_png(figure: Figure, dpi: int = 160) -> bytes:
  """Renders a figure as a PNG file; equal figures give equal bytes."""
  buffer = io.BytesIO()
  with style(), _quiet_about_glyphs():
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
  return buffer.getvalue()


def to_rgb(figure: Figure, dpi: int = 100) -> np.ndarray:
  """Renders a figure as uint8 pixels [H, W, 3], the size in inches times `dpi`."""
  previous = figure.dpi
  figure.set_dpi(dpi)
  canvas = FigureCanvasAgg(figure)
  with style(), _quiet_about_glyphs():
    canvas.draw()
  pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()
  figure.set_dpi(previous)
  return pixels


@contextlib.contextmanager
def _quiet_about_glyphs() -> Iterator[None]:
  """Class names in a script that the font lacks are drawn as boxes, not reported as warnings."""
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Glyph .* missing from font")
    yield


def _figure(height: float) -> tuple[Figure, Axes]:
  figure = Figure(figsize=(_WIDTH, height))
  return figure, figure.subplots()


def _by_count(counts: np.ndarray) -> np.ndarray:
  """Class indices [C] from the largest count to the smallest; ties keep their order."""
  return np.argsort(-counts, kind="stable")


def _short(name: str, limit: int = 18) -> str:
  name = " ".join(str(name).split())
  return name if len(name) <= limit else name[: limit - 1] + "…"


def _legend_below(axes: Axes, handles: Sequence) -> None:
  axes.figure.legend(
    handles=handles, loc="outside lower center", ncols=min(6, len(handles)), handletextpad=0.6,
    columnspacing=1.8,
  )  # fmt: skip


def _name_classes(axes: Axes, names: Sequence[str], counts: np.ndarray | None) -> None:
  """Labels the class axis with names, or with class ranks where there are too many."""
  axes.set_xlim(-0.6, max(len(names) - 0.4, 0.6))
  if len(names) > MAX_NAMED_CLASSES:
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlabel("classes, from the most to the fewest training examples (rank)")
    return
  labels = [_short(name) for name in names]
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


def _method_styles(methods: Sequence[str]) -> dict[str, tuple[str, str, bool]]:
  """A look per method: its generator's own where it has one that no other of them claims."""
  names = [method if method in _METHOD_STYLES else method.split("+")[0] for method in methods]
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


def _accuracy_dots(axes: Axes, rows: Sequence[tuple], styles: Mapping) -> None:
  num_classes = len(rows[0][1]) if rows else 0
  for c in range(0, num_classes, 2):
    axes.axvspan(c - 0.5, c + 0.5, color=BAND, linewidth=0, zorder=-2)
  offsets = (np.arange(len(rows)) - (len(rows) - 1) / 2) * (0.72 / max(len(rows), 1))
  for offset, (method, mean, std) in zip(offsets, rows, strict=True):
    axes.errorbar(
      np.arange(num_classes) + offset, mean, yerr=_within_percent(mean, std), label=method,
      linestyle="", elinewidth=1.3, **_marker_look(styles[method]),
    )  # fmt: skip


def _within_percent(mean: np.ndarray, std: np.ndarray) -> np.ndarray:
  """Error bars [2, C] below and above the mean that do not leave 0 % to 100 %."""
  return np.clip(np.stack([np.minimum(std, mean), np.minimum(std, 100 - mean)]), 0, None)


def _accuracy_lines(axes: Axes, rows: Sequence[tuple], styles: Mapping) -> None:
  window = 2 * (len(rows[0][1]) // 30) + 1 if rows else 1
  for method, mean, std in rows:
    color, _, hollow = styles[method]
    rank = np.arange(len(mean))
    centre, spread = _running_mean(mean, window), _running_mean(std, window)
    axes.fill_between(
      rank, np.maximum(centre - spread, 0), np.minimum(centre + spread, 100), color=color,
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
    return TSNE(perplexity=perplexity, init=init, random_state=seed).fit_transform(rows)


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
      _name_on_map(axes, top, _short(class_names[c]), color)
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


def _map_handles(numbers: Sequence[int], background: int) -> list[Line2D]:
  looks = [
    ("real, used in training", numbers[0], {"marker": "o", "markeredgecolor": INK}),
    ("real, left out of training", numbers[1], {"marker": "o", "alpha": 0.4, "markersize": 5}),
    ("synthetic", numbers[2], {"marker": "x", "markeredgewidth": 1.4}),
    ("other classes", background, {"marker": "o", "color": "#d5dae0", "markersize": 4}),
  ]
  return [
    Line2D([], [], linestyle="", label=label, **({"color": MUTED, "markersize": 6.5} | look))
    for label, number, look in looks
    if number
  ]


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
  axes.set_yticks(range(len(groups)), [_short(name) for name in reversed(names)])
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
  _legend_below(axes, handles)
