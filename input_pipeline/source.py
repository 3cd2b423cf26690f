"""What a data set is before it is made long-tailed."""

import dataclasses

import numpy as np

from input_pipeline.lazy_images import LazyImages


@dataclasses.dataclass(frozen=True)
class Source:
  """A whole labelled set in its official order."""

  class_names: tuple[str, ...]  # C names
  train_images: np.ndarray | LazyImages  # [N, H, W, ch] uint8
  train_labels: np.ndarray  # [N] int in [0, C)
  test_images: np.ndarray | LazyImages
  test_labels: np.ndarray
  train_names: np.ndarray | None = None  # [N] file names, if official lists speak of them
  holdout_images: np.ndarray | LazyImages | None = None  # given apart from train, for selection
  holdout_labels: np.ndarray | None = None
  train_captions: tuple[str, ...] | None = None  # N texts, "" for images without; None: no captions
  test_captions: tuple[str, ...] | None = None
  every_class_tested: bool = True  # False: classes without a test image are allowed
