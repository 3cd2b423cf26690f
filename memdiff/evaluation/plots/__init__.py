"""The pictures of a run: pure functions from arrays to matplotlib figures in one shared style.

Colours come from palettes that stay apart for colour-blind readers, and no kind or method is told
by its colour alone. `to_png` turns a figure into a file.
"""

from memdiff.evaluation.plots.accuracy import gap_closed, long_tail_profile, per_class_accuracy
from memdiff.evaluation.plots.confidence_figures import confidence_histogram, reliability
from memdiff.evaluation.plots.curves import training_curves
from memdiff.evaluation.plots.images import (
  PROMPTED,
  by_class,
  prompt_sheet,
  sample_grid,
  shown_classes,
  sweep,
)
from memdiff.evaluation.plots.maps import FeaturePlane, embed, feature_map
from memdiff.evaluation.plots.style import REAL, SYNTHETIC, style, to_png

__all__ = [
  "PROMPTED",
  "REAL",
  "SYNTHETIC",
  "FeaturePlane",
  "by_class",
  "confidence_histogram",
  "embed",
  "feature_map",
  "gap_closed",
  "long_tail_profile",
  "per_class_accuracy",
  "prompt_sheet",
  "reliability",
  "sample_grid",
  "shown_classes",
  "style",
  "sweep",
  "to_png",
  "training_curves",
]
