"""What a data set is before it is made long-tailed."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Source:
  """A whole labelled set in its official order."""

  class_names: tuple[str, ...]  # C names
  train_images: np.ndarray  # [N, H, W, ch] uint8
  train_labels: np.ndarray  # [N] int in [0, C)
  test_images: np.ndarray
  test_labels: np.ndarray
