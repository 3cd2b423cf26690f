"""The scale in which estimators see features: every column with mean 0 and deviation 1.

Runs standardise float32 features on the devices. Columns of a table may be of any size, such as
times in nanoseconds, so that they are centred in float64 first.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

_ROWS = 4096  # at a time in float64
_FARTHEST = 1e6  # deviations; what lies beyond is taken as that far


@dataclasses.dataclass(frozen=True, eq=False)
class Scale:
  """Of D columns, float64.

  Attributes:
    peak: [D] largest magnitude, by which columns are divided first, so that no square overflows.
    mean: [D] of what is left.
    deviation: [D] the same, 0 for a column that is constant but for rounding.
    lowest: [D] 0 for a column without negative numbers, else minus infinity.
  """

  peak: np.ndarray
  mean: np.ndarray
  deviation: np.ndarray
  lowest: np.ndarray

  @classmethod
  def of(
    cls,
    features: np.ndarray,
    rows: np.ndarray | None = None,
    weights: np.ndarray | None = None,
  ) -> "Scale":
    """Of [N, D] finite numbers, all or some rows; what is constant depends on their type.

    Mean and deviation are those of examples of `weights` [N], above 0; None: all count alike.
    """
    parts = _parts(features, rows)
    number = sum(len(features[part]) for part in parts)
    if weights is not None:
      weights = weights / (weights.mean() if rows is None else weights[rows].mean())

    def mean_of(values: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
      found = 0.0
      for part in parts:
        of_part = values(features[part] / peak[None])
        if weights is not None:
          of_part = of_part * weights[part][:, None]
        found = found + of_part.sum(axis=0)
      return found / number

    smallest = np.min([features[part].min(axis=0) for part in parts], axis=0)
    largest = np.max([features[part].max(axis=0) for part in parts], axis=0)
    peak = np.maximum(largest, -smallest).astype(np.float64)
    peak[peak == 0] = 1
    mean = mean_of(lambda values: values)
    deviation = np.sqrt(mean_of(lambda values: np.square(values - mean[None])))
    deviation[(deviation <= np.finfo(features.dtype).eps) | (smallest == largest)] = 0
    lowest = np.where(smallest < 0, -np.inf, 0.0)
    return cls(peak, mean, deviation, lowest)

  def forward(self, features: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
    """[N, D], all or n rows -> float32 [n, D]; columns that were constant become 0."""
    inverse = np.where(self.deviation > 0, 1 / np.maximum(self.deviation, 1e-300), 0)
    found = np.empty((len(features) if rows is None else len(rows), features.shape[1]), np.float32)
    for number, part in enumerate(_parts(features, rows)):
      moved = (features[part] / self.peak[None] - self.mean[None]) * inverse[None]
      start = number * _ROWS
      found[start : start + len(moved)] = np.clip(moved, -_FARTHEST, _FARTHEST)
    return found

  def backward(self, scaled: np.ndarray) -> np.ndarray:
    """Back to the units of the features, float64; no negative numbers where there were none."""
    raw = (scaled * self.deviation[None] + self.mean[None]) * self.peak[None]
    return np.maximum(raw, self.lowest[None])


@dataclasses.dataclass(frozen=True, eq=False)
class ScaledRows:
  """Some rows of features in a scale, made when they are asked for; none is kept.

  Attributes:
    scale: see there.
    features: [N, D].
    rows: [n] of them.
  """

  scale: Scale
  features: np.ndarray
  rows: np.ndarray

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, picked: slice | np.ndarray) -> np.ndarray:
    return self.scale.forward(self.features, self.rows[picked])


def _parts(features: np.ndarray, rows: np.ndarray | None) -> list[slice | np.ndarray]:
  """What picks all or some rows, a few at a time."""
  starts = range(0, len(features) if rows is None else len(rows), _ROWS)
  if rows is None:
    return [slice(start, start + _ROWS) for start in starts]
  return [rows[start : start + _ROWS] for start in starts]
