"""The look that all figures share, and figures as bytes and pixels.

Figures belong to nobody else: pyplot and its global list of figures are never involved, so drawing
works in any thread of a training job and needs no closing.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK, MUTED, GRID, BAND = "#1f2a37", "#667380", "#e4e8ec", "#f4f6f8"
REAL, SYNTHETIC = "#0072b2", "#d55e00"

# Okabe and Ito's colours without the yellow, which fades on white, joined by Tol's muted ones.
CLASS_COLORS = (
  "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9",
  "#d55e00", "#332288", "#999933", "#882255", "#7f7f7f",
)  # fmt: skip

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
WIDTH = 9.6  # inches


@contextlib.contextmanager
def style() -> Iterator[None]:
  """The look shared by all figures; put drawing of further artists inside it."""
  with matplotlib.rc_context(_STYLE):
    yield


def to_png(figure: Figure, dpi: int = 160) -> bytes:
  """Renders a figure as a PNG file; equal figures give equal bytes."""
  buffer = io.BytesIO()
  with style(), _quiet_about_glyphs():
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
  return buffer.getvalue()


@contextlib.contextmanager
def _quiet_about_glyphs() -> Iterator[None]:
  """Class names in a script that the font lacks are drawn as boxes, not reported as warnings."""
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Glyph .* missing from font")
    yield


def new_figure(height: float) -> tuple[Figure, Axes]:
  figure = Figure(figsize=(WIDTH, height))
  return figure, figure.subplots()


def by_count(counts: np.ndarray) -> np.ndarray:
  """Class indices [C] from the largest count to the smallest; ties keep their order."""
  return np.argsort(-counts, kind="stable")


def short(name: str, limit: int = 18) -> str:
  name = " ".join(str(name).split())
  return name if len(name) <= limit else name[: limit - 1] + "…"


def legend_below(axes: Axes, handles: Sequence) -> None:
  axes.figure.legend(
    handles=handles, loc="outside lower center", ncols=min(6, len(handles)), handletextpad=0.6,
    columnspacing=1.8,
  )  # fmt: skip
